"""What a first stage learns from, behind one protocol: a recipe's compositions, and pictures from disk."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.buckets import Crop, Pixels, frame
from ldm.data.order import Order
from ldm.data.pictures import PictureSet
from ldm.data.recipe import Example, Recipe
from ldm.data.things import choose
from ldm.errors import UserError
from ldm.pictures import to_tensor
from ldm.training.sources import told

Labels = Literal["kind", "thing"]
_UNSEEN = 10**9  # the first index of compositions that are never trained on, and how many there are
_ALL = slice(None)


@dataclass(frozen=True)
class Batch:
    """pictures: (B, 3, H, W) in [-1, 1]. labels: (B,), where there are any. start: pictures seen before the batch."""

    pictures: Tensor
    labels: Tensor | None
    start: int

    def to(self, device: torch.device) -> "Batch":
        pictures = self.pictures.to(device, memory_format=torch.channels_last)
        return replace(
            self, pictures=pictures, labels=None if self.labels is None else self.labels.to(device)
        )


class Examples(Protocol):
    """Squares to learn from.

    side: of a whole one, in pixels. labels: the names of what they can show; none where they have no labels.
    held_out: how many are there for validation, and never trained on. count: how many whole ones there are.
    """

    side: int
    labels: list[str]
    held_out: int
    count: int

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        """The `rows` of pictures `start` .. `start + size` of the endless order, cut where that is asked for."""
        ...

    def whole(self, start: int, size: int) -> Batch:
        """Whole ones, those that are held out first."""
        ...

    def notes(self) -> list[str]:
        """What the user should know of them, a line each."""
        ...


class Compositions:
    """A recipe's compositions, each of them new. cut: a side in pixels, or None for whole ones."""

    def __init__(self, recipe: Recipe, cut: int | None, labels: Labels | None, held_out: int):
        self.recipe, self.cut, self.kind = recipe, cut, labels
        self.side, self.held_out, self.count = recipe.config.size, held_out, _UNSEEN
        things = [thing.name for thing in choose(recipe.config.things)]
        self.labels = {None: [], "kind": recipe.kinds, "thing": things}[labels]

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        """As Examples says. Of a picture, the liveliest of three cuts: plain background teaches little."""
        indices = range(start, start + size)[rows]
        examples = [self.recipe.sample(i) for i in indices]
        pictures = [each.picture for each in examples]
        if self.cut:
            rngs = (np.random.default_rng((self.recipe.config.seed, 3, i)) for i in indices)
            pictures = [_liveliest(each, self.cut, rng) for each, rng in zip(pictures, rngs, strict=True)]
        return Batch(to_tensor(pictures), self._labels(examples), start)

    def whole(self, start: int, size: int) -> Batch:
        examples = [self.recipe.sample(_UNSEEN + i) for i in range(start, start + size)]
        return Batch(to_tensor([each.picture for each in examples]), self._labels(examples), start)

    def notes(self) -> list[str]:
        return []

    def _labels(self, examples: list[Example]) -> Tensor | None:
        if self.kind is None:
            return None
        names = [each.kind if self.kind == "kind" else each.parts["things"][0] for each in examples]
        return torch.tensor([self.labels.index(name) for name in names])


class Photographs:
    """Pictures from disk: the last of them held out, the others shuffled anew in each turn.

    Args:
        side: pixels of the square that each is resized and cut to, whole; `crop` says how.
        cut: of that square, training sees one of so many pixels a side, at random; None for the whole.
        flip: mirror half of them, anew in each turn.
        held_out: how many at the most; a tenth is the limit, and one the least.

    Raises:
        UserError: fewer than two pictures.
    """

    def __init__(
        self, found: PictureSet, side: int, cut: int | None, crop: Crop, flip: bool, seed: int, held_out: int
    ):
        if len(found) < 2:
            raise UserError(
                "autoencoder.pictures: there is one picture, and one is held out: give it more of them"
            )
        self.found, self.side, self.cut, self.flip, self.seed = found, side, cut, flip, seed
        self.crop: Crop = crop
        self.held_out, self.count = min(held_out, max(1, len(found) // 10)), len(found)
        self.labels: list[str] = []
        self._order: Order | None = None
        self._workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoders work outside Python's lock

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        """As Examples says; `start` is a multiple of `size`."""
        trained = self.count - self.held_out
        if self._order is None or self._order.batch_size != size:
            self._order = Order([self.side] * trained, size, self.seed)
        places = self._order.places(start, size)[rows]
        return Batch(to_tensor(list(self._workers.map(self._drawn, places))), None, start)

    def whole(self, start: int, size: int) -> Batch:
        last = self.count - 1
        indices = range(last - start, last - start - size, -1)
        return Batch(to_tensor(list(self._workers.map(self._plain, indices))), None, start)

    def notes(self) -> list[str]:
        kept = f"the last {self.held_out} of {self.count} pictures were kept for validation"
        return [*told(self.found.notes, self.found.broken), kept]

    def _plain(self, index: int) -> Pixels:
        return frame(self.found.read(index), (self.side, self.side))[0]

    def _drawn(self, place: tuple[int, int]) -> Pixels:
        """A picture as its turn has it: (turn, index)."""
        rng = np.random.default_rng((self.seed, 1, *place))
        square = (self.side, self.side)
        picture, _ = frame(self.found.read(place[1]), square, crop=self.crop, flip=self.flip, rng=rng)
        return _cut(picture, self.cut, rng) if self.cut else picture


def _liveliest(picture: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    cuts = (_cut(picture, side, rng) for _ in range(3))
    return max(cuts, key=lambda cut: float(cut.std()))


def _cut(picture: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    top, left = rng.integers(0, np.array(picture.shape[:2]) - side + 1)
    return picture[top : top + side, left : left + side]
