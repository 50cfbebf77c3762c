"""Texts to chunks that fill one window of an encoder each: every program splits long ones at other places."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ldm.conditioning.prompts.weighted import Text, WeightedText

_LOOK_BACK = 20  # tokens: AUTOMATIC1111's default
_WHOLE = 8  # tokens: of fewer ComfyUI takes a piece whole to the next window


class _Token(NamedTuple):
    id: int
    weight: float
    piece: int  # the number of the piece that it is of


@dataclass(frozen=True)
class Chunk:
    """The tokens of one window, without special ones and padding, and the text that they are of."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    pieces: tuple[int, ...]
    source: Text

    @property
    def weighted(self) -> bool:
        """Whether a token has another weight than 1."""
        return any(weight != 1 for weight in self.weights)


def chunks_of(text: Text, tokenize: Callable[[str], list[int]], capacity: int | None) -> list[Chunk]:
    """Split a text, at least into one chunk of at most `capacity` tokens; None keeps it in one whatever its length.

    A string is cut where a window is full, and so is compel's text. AUTOMATIC1111's goes back to a comma where there
    is one among the last 20 tokens; ComfyUI's takes pieces of fewer than 8 tokens whole into the next window.
    """
    windows = _tokens(text, tokenize)
    if capacity is None:
        return [_chunk([token for window in windows for token in window], text)]
    parts: list[Sequence[_Token]] = []
    for window in windows:
        if isinstance(text, WeightedText) and text.syntax == "a1111":
            parts += _at_commas(window, tokenize(","), capacity)
        elif isinstance(text, WeightedText) and text.syntax == "comfyui":
            parts += _by_pieces(window, capacity)
        else:
            parts += [window[i : i + capacity] for i in range(0, max(1, len(window)), capacity)]
    if len(parts) > 1 and not parts[-1]:  # nothing after the last BREAK
        parts.pop()
    return [_chunk(part, text) for part in parts]


def _chunk(tokens: Sequence[_Token], text: Text) -> Chunk:
    ids, weights, pieces = zip(*tokens, strict=True) if tokens else ((), (), ())
    return Chunk(ids, weights, pieces, text)


def _tokens(text: Text, tokenize: Callable[[str], list[int]]) -> list[list[_Token]]:
    if isinstance(text, str):
        return [[_Token(each, 1.0, 0) for each in tokenize(text)]]
    windows: list[list[_Token]] = []
    number = 0
    for window in text.windows:
        windows.append([])
        for piece in window:
            windows[-1] += [_Token(each, piece.weight, number) for each in tokenize(piece.text)]
            number += 1
    return windows


def _at_commas(tokens: list[_Token], comma: list[int], capacity: int) -> list[Sequence[_Token]]:
    done: list[Sequence[_Token]] = []
    part: list[_Token] = []
    last = -1  # where the last comma stands in the part
    for token in tokens:
        full = len(part) == capacity
        if [token.id] == comma:
            last = len(part)
        elif full and last != -1 and len(part) - last <= _LOOK_BACK and last + 1 < capacity:
            done.append(part[: last + 1])
            part, last, full = part[last + 1 :], -1, False
        if full:
            done.append(part)
            part, last = [], -1
        part.append(token)
    return [*done, part]


def _by_pieces(tokens: list[_Token], capacity: int) -> list[Sequence[_Token]]:
    done: list[Sequence[_Token]] = []
    part: list[_Token] = []
    start = 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and tokens[end].piece == tokens[start].piece:
            end += 1
        piece = tokens[start:end]
        small = len(piece) < min(_WHOLE, capacity + 1)
        while len(part) + len(piece) > capacity:
            room = 0 if small else capacity - len(part)
            done.append(part + piece[:room])
            part, piece = [], piece[room:]
        part = part + piece
        start = end
    return [*done, part]
