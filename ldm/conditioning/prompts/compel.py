"""compel's prompts: a+ is a times 1.1, a- times 0.9, and so on for more signs; (a b)1.3 and "a b"1.3 are times 1.3.

Nested weights multiply. Its .blend(), .and() and .swap() are refused. See https://github.com/damian0815/compel.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from ldm.conditioning.prompts.weighted import Lora, Piece, Prompt, Segment, WeightedText, named, usable
from ldm.errors import UserError

# Brackets that are text come escaped, see `_escaped`, and so every prompt parses.
_GRAMMAR = r"""
start: (_SPACE | WEIGHTED | QUOTED | TEXT | group)*
group: "(" (_SPACE | WEIGHTED | QUOTED | TEXT | group)* CLOSE
_SPACE: /\s+/
CLOSE: /\)(?:\++|-+|[0-9]+\.?[0-9]*|\.[0-9]+)?/
QUOTED.3: /"[^"]*"(?:\++|-+|[0-9]+\.?[0-9]*|\.[0-9]+)?/
WEIGHTED.2: /(?:\\.|[^\s()"\\,.=+-]|[+-](?=[^\s()",.=+-]))+(?:\++|-+)(?=[\s()",.=]|$)/
TEXT: /(?:\\.|[^\s()\\])+|\\/s
"""
_PLUS, _MINUS = 1.1, 0.9
_MOST_SIGNS = 1000  # of more the weight would not fit a float, and is far too heavy already
_METHOD = re.compile(r"\.(?:blend|and|add|swap|attend)\(")
_LORA = re.compile(r"\b(?:withLora|useLora)\(([\w-]+)(?:, ?([0-9]+\.?[0-9]*|\.[0-9]+))?\)")
_SCAN = re.compile(r'\\.|"[^"]*"|\s+|[()]|[^\\"()\s]+|\\|"', re.DOTALL)


@dataclass(slots=True)
class _Group:
    """Words and groups under a factor."""

    parts: list[Any]
    factor: float = 1.0


def read(prompt: str) -> Prompt:
    """Read a prompt of compel. Raises UserError for numbers that can't be used and methods that are not to be had."""
    if found := _METHOD.search(prompt):
        raise UserError(
            f"{named(prompt)}: compel's {found[0][:-1]}() is not read here: leave it out, or write \\( if it is text"
        )
    loras = [Lora(each[1], usable(float(each[2] or 1), each[0], prompt)) for each in _LORA.finditer(prompt)]
    spaced = re.sub(r",(?=\S)", ", ", _LORA.sub("", prompt))
    words = groupby(_words(spaced, prompt), lambda piece: piece.weight)
    pieces = tuple(Piece(" ".join(piece.text for piece in run), weight) for weight, run in words)
    return Prompt((Segment(0, WeightedText((pieces,), "compel")),), tuple(loras))


def _words(text: str, prompt: str) -> Iterator[Piece]:
    waiting: list[tuple[Any, float]] = [(_parser().parse(_escaped(text)), 1.0)]
    while waiting:
        node, weight = waiting.pop()
        if isinstance(node, _Group):
            waiting.extend((part, weight * node.factor) for part in reversed(node.parts))
        elif word := re.sub(r'\\([()"+-])', r"\1", node):
            yield Piece(word, usable(weight, word, prompt))


def _factor(operator: str) -> float:
    if operator[:1] in ("+", "-"):
        return (_PLUS if operator[0] == "+" else _MINUS) ** min(len(operator), _MOST_SIGNS)
    return float(operator) if operator else 1.0


def _escaped(text: str) -> str:
    """The text in which all brackets that are text are escaped: without a partner, or in a word outside of brackets."""
    tokens = _SCAN.findall(text)
    waiting: list[int] = []
    partners: set[int] = set()
    before = ""
    for place, token in enumerate(tokens):
        if token == "(" and (waiting or not before.strip() or place - 1 in partners):
            waiting.append(place)
        elif token == ")" and waiting:
            partners |= {place, waiting.pop()}
        before = token
    return "".join(f"\\{t}" if t in ("(", ")") and k not in partners else t for k, t in enumerate(tokens))


@cache
def _parser() -> Any:
    import lark  # here, for it takes a while to import

    class Build(lark.Transformer[Any, Any]):
        def start(self, parts: list[Any]) -> _Group:
            return _Group(parts)

        def group(self, parts: list[Any]) -> _Group:
            return _Group(parts[:-1], _factor(parts[-1][1:]))

        def QUOTED(self, token: str) -> _Group:
            _, text, operator = token.split('"')
            return _Group([text], _factor(operator))

        def WEIGHTED(self, token: str) -> _Group:
            word = token.rstrip(token[-1])
            return _Group([word], _factor(token[len(word) :]))

    return lark.Lark(_GRAMMAR, parser="lalr", lexer="basic", transformer=Build())
