"""What a first stage learns from, behind one protocol, and that of pictures from disk."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.buckets import Crop, Pixels, frame
from ldm.data.order import Order
from ldm.data.pictures import PictureSet
from ldm.pictures import to_tensor
from ldm.training.layout import memory_format

_ALL = slice(None)


@dataclass(frozen=True)
class Batch:
    """Pictures and what goes with them.

    pictures: (B, C, H, W) in [-1, 1], or points. labels: (B,), where there are any. start: pictures seen before the
    batch. maps: (B, H, W) int64, what lies at each pixel, where that is known.
    """

    pictures: Tensor
    labels: Tensor | None
    start: int
    maps: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        pictures = self.pictures.to(device, memory_format=memory_format(device))
        labels, maps = (None if each is None else each.to(device) for each in (self.labels, self.maps))
        return replace(self, pictures=pictures, labels=labels, maps=maps)


class Examples(Protocol):
    """Squares to learn from.

    side: of a whole one, in pixels. labels: the names of what they can show; none where they have no labels.
    regions: the names of what can lie at a pixel; none where there are no maps. held_out: how many are there for
    validation, and never trained on. count: how many whole ones there are.
    """

    side: int
    labels: list[str]
    regions: list[str]
    held_out: int
    count: int

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        """Return the `rows` of pictures `start` .. `start + size` of the endless order, cut where that is asked for."""
        ...

    def whole(self, start: int, size: int) -> Batch:
        """Return whole ones, those that are held out first; after the last they begin again."""
        ...

    def notes(self) -> list[str]:
        """Return what the user should know of them, a line each."""
        ...


class PictureExamples:
    """Pictures from disk, two or more: the last of them held out, the others shuffled anew in each turn.

    Args:
        side: pixels of the square that each is resized and cut to, whole; `crop` says how.
        cut: of that square, training sees one of so many pixels a side, at random; None for the whole.
        flip: mirror half of them, anew in each turn.
        held_out: how many at the most; a tenth is the limit, and one the least.
        labels: the names of the classes, and each picture's number.
    """

    def __init__(
        self,
        found: PictureSet,
        side: int,
        cut: int | None,
        crop: Crop,
        flip: bool,
        seed: int,
        held_out: int,
        labels: tuple[list[str], list[int]] | None = None,
    ):
        self.found, self.side, self.cut, self.flip, self.seed = found, side, cut, flip, seed
        self.crop: Crop = crop
        self.held_out, self.count = min(held_out, max(1, len(found) // 10)), len(found)
        self.labels, numbers = labels or ([], [])
        self.regions: list[str] = []
        self._numbers = torch.tensor(numbers) if labels else None
        self._order: Order | None = None
        self._workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoders work outside Python's lock

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        """See `Examples`; `start` is a multiple of `size`."""
        trained = self.count - self.held_out
        if self._order is None or self._order.batch_size != size:
            self._order = Order([self.side] * trained, size, self.seed)
        places = self._order.places(start, size)[rows]
        drawn = to_tensor(list(self._workers.map(self._drawn, places)))
        return Batch(drawn, self._labels([index for _, index in places]), start)

    def whole(self, start: int, size: int) -> Batch:
        indices = [(self.count - 1 - k) % self.count for k in range(start, start + size)]
        return Batch(to_tensor(list(self._workers.map(self._plain, indices))), self._labels(indices), start)

    def notes(self) -> list[str]:
        kept = f"the last {self.held_out} of {self.count} pictures were kept for validation"
        return [*self.found.report(), kept]

    def _labels(self, indices: Sequence[int]) -> Tensor | None:
        return None if self._numbers is None else self._numbers[list(indices)]

    def _plain(self, index: int) -> Pixels:
        return frame(self.found.read(index), (self.side, self.side))[0]

    def _drawn(self, place: tuple[int, int]) -> Pixels:
        """A picture as its turn has it: (turn, index)."""
        rng = np.random.default_rng((self.seed, 1, *place))
        square = (self.side, self.side)
        picture, _ = frame(self.found.read(place[1]), square, crop=self.crop, flip=self.flip, rng=rng)
        return random_cut(picture, self.cut, rng) if self.cut else picture


def random_cut(picture: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """Cut a square of `side` pixels out of a picture, anywhere."""
    top, left = rng.integers(0, np.array(picture.shape[:2]) - side + 1)
    return picture[top : top + side, left : left + side]
