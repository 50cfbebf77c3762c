"""The endless order of pictures: a function of a seed and a position, so that a run resumes to the sample."""

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Order:
    """Batches of one group each (a bucket's pictures have one size), turn after turn through all pictures.

    Each group has its pictures shuffled, again and again, one pass after the other, and is cut into batches without
    regard to where a pass ends: what does not fill a batch is carried over. A turn is as many batches as its pictures
    fill, those of all groups shuffled. So in the long run every picture is seen equally often, and within a turn
    twice at the most, as long as its group fills a batch; a smaller group's batches hold its pictures several times
    (see ldm/data/buckets.py, `assign`).

    groups: a group for each picture.
    """

    def __init__(self, groups: Sequence[Hashable], batch_size: int, seed: int):
        if not groups or batch_size < 1:
            raise ValueError("an order needs pictures and a batch of at least 1")
        self.batch_size, self.seed = batch_size, seed
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self._members = [np.array(each) for each in members.values()]
        # A batch may reach over a pass's end, and a read over a turn's.
        self._pass = lru_cache(maxsize=2 * len(self._members))(self._shuffled)
        self._turn = lru_cache(maxsize=2)(self._batches_of)

    def places(self, start: int, size: int) -> list[tuple[int, int]]:
        """Return (pass, index of the picture) at each position from `start` on: no such pair ever comes again.

        Both numbers count pictures and are multiples of `batch_size`.
        """
        if start % self.batch_size or size % self.batch_size:
            raise ValueError(f"{start} and {size} must be multiples of the batch of {self.batch_size}")
        first = start // self.batch_size
        numbers = range(first, first + size // self.batch_size)
        return [place for number in numbers for place in self._batch(number)]

    def batches_before(self, turn: int) -> int:
        """Return how many batches come before a turn."""
        return sum(turn * len(each) // self.batch_size for each in self._members)

    def _batch(self, number: int) -> list[tuple[int, int]]:
        """The places of a batch of the endless order."""
        # What is carried over is less than a batch a group.
        most = (number + len(self._members) + 1) * self.batch_size // sum(map(len, self._members)) + 1
        turn = bisect_right(range(most + 1), number, key=self.batches_before) - 1
        group, own = self._turn(turn)[number - self.batches_before(turn)]
        count = len(self._members[group])
        positions = range(own * self.batch_size, (own + 1) * self.batch_size)
        return [(p // count, int(self._pass(group, p // count)[p % count])) for p in positions]

    def _batches_of(self, turn: int) -> list[tuple[int, int]]:
        """A turn's batches: (group, number of the group's own batch)."""
        batches = [
            (group, own)
            for group, each in enumerate(self._members)
            for own in range(turn * len(each) // self.batch_size, (turn + 1) * len(each) // self.batch_size)
        ]
        rng = np.random.default_rng((self.seed, 2, turn))
        return [batches[k] for k in rng.permutation(len(batches))]

    def _shuffled(self, group: int, number: int) -> NDArray[np.int64]:
        """A group's pictures in the order of one of its passes."""
        return np.random.default_rng((self.seed, 0, group, number)).permutation(self._members[group])
