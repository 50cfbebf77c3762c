"""The endless order of pictures: a function of a seed and a position, so that a run resumes to the sample."""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Order:
    """Batches of one group each (a bucket's pictures have one size), turn after turn through all pictures.

    In each turn every group is shuffled and cut into batches, and the batches of all groups are shuffled. A group
    whose size is no multiple of the batch is filled up with its own first pictures of that turn: each turn shows every
    picture at least once, and at most `batch_size - 1` of a group once more (more often where the group is smaller
    than a batch). So a turn always has the same number of batches.

    groups: a group for each picture. shuffle: without it, every turn goes through the groups as they first appear, each
    in its pictures' order.
    """

    def __init__(self, groups: Sequence[Hashable], batch_size: int, seed: int, shuffle: bool = True):
        if not groups or batch_size < 1:
            raise ValueError("an order needs pictures and a batch of at least 1")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self._members = [np.array(each) for each in members.values()]
        self.batches = sum(-(-len(each) // batch_size) for each in self._members)
        self._turn = lru_cache(maxsize=2)(self._shuffled)  # a read may reach over a turn's end

    def places(self, start: int, size: int) -> list[tuple[int, int]]:
        """(turn, index of the picture) at each position from `start` on.

        Both numbers count pictures and are multiples of `batch_size`.
        """
        if start % self.batch_size or size % self.batch_size:
            raise ValueError(f"{start} and {size} must be multiples of the batch of {self.batch_size}")
        first = start // self.batch_size
        numbered = [divmod(k, self.batches) for k in range(first, first + size // self.batch_size)]
        return [(turn, int(index)) for turn, k in numbered for index in self._turn(turn)[k]]

    def _shuffled(self, turn: int) -> NDArray[np.int64]:
        """The batches of a turn: (batches, batch_size)."""
        rng = np.random.default_rng((self.seed, 0, turn))
        parts: list[NDArray[np.int64]] = []
        for members in self._members:
            order = rng.permutation(members) if self.shuffle else members
            count = -(-len(order) // self.batch_size)
            parts.append(np.resize(order, (count, self.batch_size)))  # repeated from its start
        batches = np.concatenate(parts)
        return rng.permutation(batches) if self.shuffle else batches
