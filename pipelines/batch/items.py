"""The pictures of a run, one after the other: rows of a file, each as often as it says, with ids and seeds."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from pipelines.recipe import MOST, shown
from pipelines.rows import Row, read_rows


@dataclass(frozen=True)
class Item:
    """A picture to draw. number: among all of the run, from 0. index: among those of its row, from 0."""

    number: int
    row: Row
    index: int
    error: str = ""

    def seed(self, stated: Any) -> Any:
        """The seed: what is `stated` for the row, counted up; else one that follows from the row's id or number alone.

        So it is the same whoever draws it, in whatever order. Rows that are added change the seed of no row with an id.
        """
        if stated is None:
            own = f"row {self.row.number}" if self.row.id is None else f"id {self.row.id}"
            return int.from_bytes(hashlib.sha256(f"{own}\n{self.index}".encode()).digest()[:4], "big")
        return stated + self.index if type(stated) is int else stated


def items_of(path: str | Path) -> Iterator[Item]:
    """Yield the pictures of a file of rows; of two rows with one id the second is an error. Raises UserError."""
    seen, number = set[bytes](), 0  # of ids a few bytes each: there may be millions
    for row in read_rows(path):
        error = row.error
        if row.id is not None and not error:
            mark = hashlib.sha256(row.id.encode("utf-8", "surrogatepass")).digest()[:8]
            if mark in seen:
                error = f"another row before it has the id {row.id!r}: give each its own"
            seen.add(mark)
        for index in range(1 if error else row.count):
            yield Item(number, row, index, error)
            number += 1


def count_items(path: str | Path) -> int:
    """Return how many pictures a file of rows asks for. Raises UserError."""
    count = sum(1 for _ in islice(items_of(path), MOST + 1))
    if count > MOST:
        raise UserError(f"{path} asks for more than the {shown(MOST)} pictures of one run: split it")
    return count


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


class Blocks:
    """The items of a file in blocks of `size`: those of a block, by its number, read forward as long as that goes."""

    def __init__(self, path: Path, size: int, total: int):
        self._path, self._size, self._total = path, size, total
        self._next, self._items = 0, iter(())

    def get(self, block: int) -> list[Item]:
        """Return the items of a block. Raises UserError, also where the file has been cut short meanwhile."""
        if block < self._next or not self._next:
            self._items, self._next = items_of(self._path), 0
        skipped = (block - self._next) * self._size
        next(islice(self._items, skipped, skipped), None)
        found = list(islice(self._items, self._size))
        self._next = block + 1
        if len(found) != min(self._size, self._total - block * self._size):
            raise UserError(f"{self._path} has become shorter since the run began: put it back as it was")
        return found
