"""What a prompt is after it was read: texts with weights, and from which step on each of them holds."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from ldm.errors import UserError

Syntax = Literal["plain", "a1111", "comfyui", "compel"]
# What becomes of hidden states under AUTOMATIC1111's weights, by the names of its option "Emphasis": "Original" puts
# the mean of all states back to what it was, "No norm" does not, and is often better for SDXL.
Emphasis = Literal["original", "no_norm"]
HEAVIEST = 1000.0  # the largest weight: more of one does not fit float16 beside the states' own size


class Lora(NamedTuple):
    """A LoRA that a prompt asks for, and how much of it."""

    name: str
    weight: float


@dataclass(frozen=True)
class Piece:
    """A run of words under one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class WeightedText:
    """A text with weights. It stands wherever a text encoder takes a string.

    windows: its pieces; each group of them starts a new window of the encoder (AUTOMATIC1111's BREAK).
    syntax: says how long texts are split and by what formula weights act, see `chunks` and `weights`.
    emphasis: of AUTOMATIC1111's formula.
    """

    windows: tuple[tuple[Piece, ...], ...]
    syntax: Syntax
    emphasis: Emphasis = "original"

    @property
    def text(self) -> str:
        """The words alone."""
        return " ".join("".join(piece.text for piece in window) for window in self.windows)


Text = str | WeightedText


@dataclass(frozen=True)
class Segment:
    """A text that holds from step number `step`, counted from 0, until the next segment begins."""

    step: int
    text: Text


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was read.

    segments: at least one, in ascending order; the first begins at step 0. loras: taken out of the text, in their
    order. embeddings: words of textual inversion that the text names as such (ComfyUI). notes: what to tell the user.
    """

    segments: tuple[Segment, ...]
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def at(self, step: int) -> Text:
        """Return the text that holds at step number `step`, counted from 0."""
        return next(each.text for each in reversed(self.segments) if each.step <= step)

    @property
    def texts(self) -> list[Text]:
        """The different texts, in the order of their coming."""
        return list(dict.fromkeys(each.text for each in self.segments))


def plain(prompt: str) -> Prompt:
    """Return the prompt that is a text without weights."""
    return Prompt((Segment(0, prompt),))


def as_prompts(prompts: Sequence[str | Prompt]) -> list[Prompt]:
    """Return the prompts; strings are plain ones. Raises UserError unless there is at least one, and each is either."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(each, str | Prompt) for each in prompts):
        raise UserError("give a list of at least one prompt, each a string")
    return [plain(each) if isinstance(each, str) else each for each in prompts]


def named(prompt: str) -> str:
    """Return how an error or a note names a prompt: by its beginning."""
    short = prompt[:24].strip()
    return f'prompt "{short}..."' if len(prompt) > 24 else f'prompt "{short}"'


def usable(weight: float, text: str, prompt: str) -> float:
    """Return the weight. Raises UserError, which names the prompt and the words, where it is no usable number."""
    if math.isfinite(weight) and abs(weight) <= HEAVIEST:
        return weight
    raise UserError(
        f'{named(prompt)}: the weight {weight:g} of "{text.strip()[:24]}" is no usable number: give one between '
        f"{-HEAVIEST:g} and {HEAVIEST:g}, or write \\( and \\) for brackets that are text"
    )


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join neighbours of the same weight, and leave out what is empty then."""
    for weight, run in groupby(pieces, lambda piece: piece.weight):
        if text := "".join(piece.text for piece in run):
            yield Piece(text, weight)
