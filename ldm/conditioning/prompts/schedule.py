"""AUTOMATIC1111's prompt editing and alternation: one prompt to the texts of the steps.

[from:to:when] is `from` in the steps before `when` and `to` after; [to:when] and [from::when] are its halves;
[a|b|c] is one of them a step, in turn. `when` with a point is a share of all steps, without one a number of steps.
As in AUTOMATIC1111 a bracket whose inside is not well formed is text, and so is what is around it.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from ldm.conditioning.prompts.weighted import named
from ldm.errors import UserError

# The text is lexed once, brackets without a partner become text, and so every prompt parses.
_GRAMMAR = r"""
start: _item*
_item: TEXT | COLON | BAR | round | square
round: "(" _item* ")"
square: "[" _item* "]"
COLON: ":"
BAR: "|"
TEXT: /(?:[^\\\[\]():|]|\\.|\\)+/s
"""
_CLOSES = {"RPAR": "LPAR", "RSQB": "LSQB"}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(slots=True)
class _Group:
    """Parts that follow each other: texts, groups, edits, alternations. sound: well formed."""

    parts: list[Any]
    sound: bool = True


@dataclass(slots=True)
class _Edit:
    before: _Group
    after: _Group
    when: str


@dataclass(slots=True)
class _Alternation:
    options: list[_Group]


def schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """Return (step, text) pairs: from step number `step`, counted from 0, on the text holds until the next.

    Weights and escapes are still in the texts. Raises UserError where a `when` is no usable number.
    """
    whole = _parser().parse(prompt) if "[" in prompt else _Group([prompt])
    starts = {0}
    for node in _all(whole):
        if isinstance(node, _Alternation):
            starts.update(range(steps))
        elif isinstance(node, _Edit):
            starts.add(_step(node, steps, prompt))
    found: list[tuple[int, str]] = []
    for start in sorted(each for each in starts if 0 <= each < steps):
        text = _text_at(whole, start, steps, prompt)
        if not found or found[-1][1] != text:
            found.append((start, text))
    return found


def _text_at(whole: _Group, step: int, steps: int, prompt: str) -> str:
    # No recursion: brackets may be as deep as a prompt is long.
    waiting: list[Any] = [whole]
    texts: list[str] = []
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, _Edit):
            waiting.append(node.before if step < _step(node, steps, prompt) else node.after)
        elif isinstance(node, _Alternation):
            waiting.append(node.options[step % len(node.options)])
        else:
            waiting.extend(reversed(node.parts))
    return "".join(texts)


def _all(whole: _Group) -> Iterator[Any]:
    waiting: list[Any] = [whole]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, _Edit):
            waiting += [node.before, node.after]
        elif isinstance(node, _Alternation | _Group):
            waiting += node.options if isinstance(node, _Alternation) else node.parts


def _step(edit: _Edit, steps: int, prompt: str) -> int:
    """The number of steps before the edit, as AUTOMATIC1111 counts them."""
    value = float(edit.when) * (steps if "." in edit.when else 1)
    if not math.isfinite(value):
        raise UserError(
            f"{named(prompt)}: [...:{edit.when[:24]}] names no step: give a step, or a share of all"
        )
    return int(max(min(value, steps), -1))


class _Partners:
    """Turns brackets that have no partner into text, between lexer and parser.

    A closing bracket of the wrong kind takes all that are open with it, for none of them can then be well formed.
    """

    always_accept = ()

    def process(self, stream: Iterable[Any]) -> Iterator[Any]:
        tokens, waiting, alone = list(stream), list[int](), set[int]()
        for place, token in enumerate(tokens):
            if token.type in _CLOSES.values():
                waiting.append(place)
            elif token.type in _CLOSES and waiting and tokens[waiting[-1]].type == _CLOSES[token.type]:
                waiting.pop()
            elif token.type in _CLOSES:
                alone.update([place, *waiting])
                waiting.clear()
        alone.update(waiting)
        for place, token in enumerate(tokens):
            yield token.update(type="TEXT") if place in alone else token


def _split(parts: list[Any], kind: str) -> list[_Group]:
    found = [_Group([])]
    for part in parts:
        if getattr(part, "type", "") == kind:
            found.append(_Group([]))
        else:
            found[-1].parts.append(part)
    return found


def _count(parts: list[Any], kind: str) -> int:
    return sum(getattr(part, "type", "") == kind for part in parts)


def _sound(parts: list[Any]) -> bool:
    return all(part.sound for part in parts if isinstance(part, _Group))


def _round(parts: list[Any]) -> _Group:
    sound = _sound(parts) and _count(parts, "COLON") <= 1 and not _count(parts, "BAR")
    return _Group(["(", *parts, ")"], sound)


def _square(parts: list[Any]) -> _Group | _Edit | _Alternation:
    colons, bars = _count(parts, "COLON"), _count(parts, "BAR")
    if _sound(parts):
        if bars and not colons:
            return _Alternation(_split(parts, "BAR"))
        if colons in (1, 2) and not bars:
            *texts, when = _split(parts, "COLON")
            number = when.parts[0].strip() if len(when.parts) == 1 and isinstance(when.parts[0], str) else ""
            if _NUMBER.fullmatch(number):
                return _Edit(texts[0] if colons == 2 else _Group([]), texts[-1], number)
    return _Group(["[", *parts, "]"], _sound(parts) and not colons and not bars)


@cache
def _parser() -> Any:
    import lark  # here, for it takes a while to import

    class Build(lark.Transformer[Any, Any]):
        def start(self, parts: list[Any]) -> _Group:
            return _Group(parts)

        def round(self, parts: list[Any]) -> _Group:
            return _round(parts)

        def square(self, parts: list[Any]) -> _Group | _Edit | _Alternation:
            return _square(parts)

    return lark.Lark(
        _GRAMMAR, parser="lalr", lexer="basic", postlex=cast(Any, _Partners()), transformer=Build()
    )
