"""ComfyUI's prompts: (a) is a times 1.1, (a:1.3) is a at 1.3, embedding:name a word of textual inversion.

A number stands in place of the weight around it: ((a:1.3)) is 1.3, and (a (b):1.3) gives b 1.43. Only \\( and \\) are
escapes. As in ComfyUI a bracket that is not closed leaves the rest as text.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, cast

from ldm.conditioning.prompts.weighted import Piece, Prompt, Segment, WeightedText, usable

_GRAMMAR = r"""
start: _item*
_item: TEXT | group
group: "(" _item* ")"
TEXT: /(?:\\[()]|[^()])+/
"""
_TIMES = 1.1
_EMBEDDING = re.compile(r"(?<!\S)embedding:(\S+)")
_FILE = re.compile(r"\.(?:safetensors|pt|bin)$", re.IGNORECASE)


@dataclass(slots=True)
class _Group:
    """Texts and groups inside a pair of brackets."""

    parts: list[Any]


def read(prompt: str) -> Prompt:
    """Read a prompt of ComfyUI. Raises UserError for numbers that can't be used."""
    pieces: list[Piece] = []
    embeddings: list[str] = []
    for text, weight in _weighted(prompt):
        plain = text.replace("\\(", "(").replace("\\)", ")")
        start = 0
        for found in _EMBEDDING.finditer(plain):
            written = found[1].rstrip(",")
            if written:
                name = _FILE.sub("", written)
                embeddings.append(name)
                pieces += [Piece(plain[start : found.start()], weight), Piece(name, weight)]
                start = found.start(1) + len(written)
        pieces.append(Piece(plain[start:], weight))
    kept = tuple(piece for piece in pieces if piece.text)
    return Prompt(
        (Segment(0, WeightedText((kept,), "comfyui")),), embeddings=tuple(dict.fromkeys(embeddings))
    )


def _weighted(prompt: str) -> Iterator[tuple[str, float]]:
    waiting: list[tuple[Any, float]] = [(_parser().parse(prompt), 1.0)]
    while waiting:
        node, weight = waiting.pop()
        if isinstance(node, str):
            yield node, usable(weight, node, prompt)
            continue
        for part in reversed(node.parts):
            waiting.append(_inside(part, weight) if isinstance(part, _Group) else (part, weight))


def _inside(group: _Group, around: float) -> tuple[_Group, float]:
    """The group without the number at its end, and its weight."""
    last = str(group.parts[-1]) if group.parts and isinstance(group.parts[-1], str) else ""
    text, colon, number = last.rpartition(":")
    if colon and (text or len(group.parts) > 1):
        try:
            weight = float(number)
        except ValueError:
            return group, around * _TIMES
        return _Group([*group.parts[:-1], *([text] if text else [])]), weight
    return group, around * _TIMES


class _Partners:
    """Turns brackets that have no partner into text, as ComfyUI counts them, between lexer and parser.

    One that closes nothing takes the next that opens with it; one that is not closed takes all that follows.
    """

    always_accept = ()

    def process(self, stream: Iterable[Any]) -> Iterator[Any]:
        tokens, level, outermost = list(stream), 0, 0
        alone: set[int] = set()
        for place, token in enumerate(tokens):
            if token.type == "LPAR":
                if level < 0:
                    alone.add(place)
                elif level == 0:
                    outermost = place
                level += 1
            elif token.type == "RPAR":
                if level <= 0:
                    alone.add(place)
                level -= 1
        end = outermost if level > 0 else len(tokens)
        for place, token in enumerate(tokens):
            yield token.update(type="TEXT") if place in alone or place >= end else token


@cache
def _parser() -> Any:
    import lark  # here, for it takes a while to import

    class Build(lark.Transformer[Any, Any]):
        def start(self, parts: list[Any]) -> _Group:
            runs = groupby(parts, lambda part: isinstance(part, str))
            return _Group([each for text, run in runs for each in (["".join(run)] if text else run)])

        def group(self, parts: list[Any]) -> _Group:
            return _Group(parts)

    return lark.Lark(
        _GRAMMAR, parser="lalr", lexer="basic", postlex=cast(Any, _Partners()), transformer=Build()
    )
