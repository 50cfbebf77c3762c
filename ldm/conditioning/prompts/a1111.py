"""AUTOMATIC1111's prompts: (a) is a times 1.1, (a:1.3) times 1.3, [a] by 1.1; BREAK; <lora:name:0.8>; see `schedule`.

Brackets of the two kinds count each for itself, as there: those not closed reach to the end of the text, closing ones
alone are text.
"""

import re
from collections.abc import Iterator

from ldm.conditioning.prompts.schedule import schedule
from ldm.conditioning.prompts.weighted import (
    Emphasis,
    Lora,
    Piece,
    Prompt,
    Segment,
    WeightedText,
    merged,
    named,
    usable,
)
from ldm.errors import UserError

_ROUND, _SQUARE = 1.1, 1 / 1.1
_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^<>]+)>")
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_TOKEN = re.compile(
    rf"(?P<escape>\\[()\[\]\\]?)|(?P<open>\()|(?P<wide>\[)|:\s*(?P<weight>{_NUMBER})\s*\)"
    r"|(?P<close>\))|(?P<narrow>\])|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\bBREAK\b")


def read(prompt: str, steps: int, emphasis: Emphasis) -> Prompt:
    """Read a prompt of AUTOMATIC1111 for so many steps. Raises UserError for numbers that can't be used."""
    loras: list[Lora] = []
    notes: list[str] = []

    def take(found: re.Match[str]) -> str:
        if found[1] == "hypernet":
            notes.append(f"{named(prompt)}: {found[0][:60]} was left out: there are no hypernetworks here")
        else:
            loras.append(_lora(found, prompt))
        return ""

    text = _NETWORK.sub(take, prompt)
    if re.search(r"\bAND\b", text):
        notes.append(f"{named(prompt)}: AND was read as a word: prompts are not composed by it here")
    segments = [
        Segment(step, WeightedText(_windows(each, prompt), "a1111", emphasis))
        for step, each in schedule(text, steps)
    ]
    return Prompt(tuple(segments), tuple(loras), notes=tuple(notes))


def _lora(found: re.Match[str], prompt: str) -> Lora:
    name, *more = found[2].split(":")
    weight = more[0].strip() if more else "1"
    if len(more) > 1 or not re.fullmatch(_NUMBER, weight):
        raise UserError(
            f"{named(prompt)}: {found[0][:60]} must be <lora:name> or <lora:name:weight>, one number"
        )
    return Lora(name.strip(), usable(float(weight), found[0], prompt))


def _windows(text: str, prompt: str) -> tuple[tuple[Piece, ...], ...]:
    windows: list[list[Piece]] = [[]]
    for piece, may_break in _pieces(text, prompt):
        first, *rest = _BREAK.split(piece.text) if may_break else [piece.text]
        windows[-1].append(Piece(first.rstrip() if rest else first, piece.weight))
        for k, each in enumerate(rest):
            between = each.strip() if k + 1 < len(rest) else each.lstrip()
            windows.append([Piece(between, piece.weight)])
    return tuple(tuple(merged(window)) for window in windows)


def _pieces(text: str, prompt: str) -> Iterator[tuple[Piece, bool]]:
    """Each token's text with its weight, and whether BREAK in it means something."""
    tokens = list(_TOKEN.finditer(text))
    factors, partners = _factors(tokens)
    # The product of all that is open, for each kind of bracket.
    products = {"open": [1.0], "wide": [1.0]}
    for place, token in enumerate(tokens):
        kind = str(token.lastgroup)
        if kind in products:
            products[kind].append(products[kind][-1] * factors[place])
        elif place in partners:
            products["wide" if kind == "narrow" else "open"].pop()
        else:
            own = token[0][1:] if kind == "escape" else token[0]
            weight = products["open"][-1] * products["wide"][-1]
            yield Piece(own, usable(weight, own, prompt) if own else weight), kind != "escape"


def _factors(tokens: list[re.Match[str]]) -> tuple[dict[int, float], set[int]]:
    """By what each opening bracket, by its place, multiplies; and the places of those that close one."""
    factors: dict[int, float] = {}
    partners: set[int] = set()
    waiting: dict[str, list[int]] = {"open": [], "wide": []}
    for place, token in enumerate(tokens):
        kind = str(token.lastgroup)
        if kind in waiting:
            waiting[kind].append(place)
            factors[place] = _ROUND if kind == "open" else _SQUARE
        elif kind in ("weight", "close", "narrow"):
            own = waiting["wide" if kind == "narrow" else "open"]
            if own:
                partners.add(place)
                opened = own.pop()
                factors[opened] = float(token["weight"]) if kind == "weight" else factors[opened]
    return factors, partners
