"""Small sets of pictures or points that lie in memory: scikit-learn's digits, and toys in two dimensions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.data.order import Order
from ldm.errors import UserError
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import Batch, Examples
from ldm.training.data.kinds import Data

_ALL = slice(None)
_UNSEEN = 10**9  # the first index of points that are never trained on


class ArrayExamples:
    """Pictures (N, C, H, W) in [-1, 1] with labels (N,): the last ones held out, the others shuffled in each turn."""

    def __init__(self, pictures: Tensor, labels: Tensor, names: list[str], held_out: int, seed: int):
        self.pictures, self._of, self.labels, self.seed = pictures, labels, names, seed
        self.side, self.count = pictures.shape[-1], len(pictures)
        self.regions: list[str] = []
        self.held_out = min(held_out, self.count // 4)
        self._order: Order | None = None

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        """See `Examples`; `start` is a multiple of `size`."""
        if self._order is None or self._order.batch_size != size:
            self._order = Order([0] * (self.count - self.held_out), size, self.seed)
        return self._batch([index for _, index in self._order.places(start, size)[rows]], start)

    def whole(self, start: int, size: int) -> Batch:
        return self._batch([(self.count - 1 - k) % self.count for k in range(start, start + size)], start)

    def notes(self) -> list[str]:
        return [f"the last {self.held_out} of {self.count} pictures were kept for validation"]

    def _batch(self, indices: list[int], start: int) -> Batch:
        return Batch(self.pictures[indices], self._of[indices], start)


@dataclass(frozen=True)
class DigitsConfig(Data, kind="digits"):
    """The 1,797 handwritten digits of 8x8 pixels in scikit-learn (UCI's optical recognition set), with their classes.

    (1, 8, 8) in [-1, 1]; the classes are named "0" to "9".
    """

    seed: int = 0

    def check(self, where: str) -> None:
        refuse_outside(where, self, ("seed",), 0)

    def examples(self, where: str, crop: int | None, held_out: int) -> Examples:
        if crop is not None:
            raise UserError(f"{where}: digits are of 8x8 pixels and not cut: leave the crop out")
        pictures, labels = digits()
        return ArrayExamples(pictures, labels, [str(k) for k in range(10)], held_out, self.seed)


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits (1797, 1, 8, 8) in [-1, 1], of 17 levels of grey, and their classes (1797,).

    Shuffled once, for they come in the order of who wrote them. Raises UserError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits are scikit-learn's: pip install 'ldm-text-to-image[lectures]' to have it"
        ) from None
    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pictures = torch.from_numpy(found.images[order]).float()[:, None] / 8 - 1
    return pictures, torch.from_numpy(found.target[order]).long()


Points = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ToysConfig(Data, kind="toys"):
    """Points in two dimensions, each of them new: (2, 1, 1), of about unit variance, with classes.

    shape: swiss_roll (one class), two_moons (two), checkerboard (one) or mixture (eight Gaussians on a circle).
    """

    shape: Literal["swiss_roll", "two_moons", "checkerboard", "mixture"] = "swiss_roll"
    seed: int = 0

    def check(self, where: str) -> None:
        refuse_outside(where, self, ("seed",), 0)

    def examples(self, where: str, crop: int | None, held_out: int) -> Examples:
        if crop is not None:
            raise UserError(f"{where}: points are not cut: leave the crop out")
        return Toys(self.shape, held_out, self.seed)


class Toys:
    """An endless supply of points of one shape.

    Those of a training batch are a function of the seed, its start and size; a whole one is of the seed and its number.
    """

    def __init__(self, shape: str, held_out: int, seed: int):
        self.points, self.labels = SHAPES[shape]
        self.regions: list[str] = []
        self.side, self.count, self.held_out, self.seed = 1, _UNSEEN, held_out, seed

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        points, labels = self.points(np.random.default_rng((self.seed, start)), size)
        return _batch_of(points[rows], labels[rows], start)

    def whole(self, start: int, size: int) -> Batch:
        """See `Examples`. Each is drawn by itself: a figure over those that are held out must not know of batches."""
        numbers = range(_UNSEEN + start, _UNSEEN + start + size)
        drawn = [self.points(np.random.default_rng((self.seed, number)), 1) for number in numbers]
        points, labels = (np.concatenate(each) for each in zip(*drawn, strict=True))
        return _batch_of(points, labels, start)

    def notes(self) -> list[str]:
        return []


def _batch_of(points: np.ndarray, labels: np.ndarray, start: int) -> Batch:
    return Batch(torch.from_numpy(points).float()[:, :, None, None], torch.from_numpy(labels).long(), start)


def _swiss_roll(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    angle = 1.5 * np.pi * (1 + 2 * rng.random(count))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1) + rng.normal(0, 0.5, (count, 2))
    return points / 7, np.zeros(count, np.int64)


def _two_moons(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    angle, label = np.pi * rng.random(count), rng.integers(0, 2, count)
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], 1)
    points = np.where(label[:, None] == 0, upper, -upper) + rng.normal(0, 0.06, (count, 2))
    return points * 1.3, label


def _checkerboard(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    column, x, y = rng.integers(0, 4, count), rng.random(count), rng.random(count)
    row = 2 * rng.integers(0, 2, count) + column % 2
    return np.stack([column + x - 2, row + y - 2], 1) * 0.85, np.zeros(count, np.int64)


MIXTURE_RADIUS, MIXTURE_STD = 1.4, 0.15


def _mixture(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(0, 8, count)
    angle = label * np.pi / 4
    centres = MIXTURE_RADIUS * np.stack([np.cos(angle), np.sin(angle)], 1)
    return centres + rng.normal(0, MIXTURE_STD, (count, 2)), label


SHAPES: dict[str, tuple[Points, list[str]]] = {
    "swiss_roll": (_swiss_roll, ["roll"]),
    "two_moons": (_two_moons, ["upper", "lower"]),
    "checkerboard": (_checkerboard, ["board"]),
    "mixture": (_mixture, [str(k) for k in range(8)]),
}
