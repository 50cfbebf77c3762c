"""Tensors that are computed once and kept on disk by what decides their content: latents, text embeddings."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.files import check_finite, read_metadata, write_tensors
from ldm.checkpoints.rows import StoredRows
from ldm.errors import UserError
from ldm.files import sweep
from ldm.foreign import parse_json
from ldm.training.distributed import processes

Entry = dict[str, Tensor]  # named tensors of one key, without a batch dimension


class TensorCache:
    """Named tensors by key, in safetensors shards of one folder, float16 where they are floating.

    A key should hold all that decides its entry (a picture's bytes, its cut, the network's weights): then nothing in
    the folder is ever out of date, what was made otherwise merely has other keys, and deleting the folder costs time
    only. Shards are written whole or not at all, and there may be any number of them, from any number of builds.
    An entry is read from the disk each time; nothing is held, and nothing is mapped.

    every: a build writes what it has after so many seconds, which is what an interrupted one loses.

    Raises UserError for a damaged shard.
    """

    def __init__(self, folder: str | Path, every: float = 60.0):
        self.folder, self.every = Path(folder), every
        self._places: dict[str, tuple[Path, str, int]] = {}  # by key: shard, group of equal shapes in it, row
        self._notes: dict[str, str] = {}
        self._shards: dict[Path, StoredRows | None] = {}  # None: not read from yet
        self._scan()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def keys(self) -> KeysView[str]:
        """Return all that can be read."""
        return self._places.keys()

    def read(self, key: str) -> Entry:
        """Return the tensors of a key.

        Raises KeyError where it was never filled, UserError where its shard was damaged.
        """
        path, group, row = self._places[key]
        shard = self._shards[path]
        if shard is None:
            shard = self._shards[path] = StoredRows(path)
        names = [name for name in shard.names if name.startswith(group)]
        if not names:
            raise UserError(f"{path} lacks the tensors of {group!r}: delete it, it is built anew")
        return {name.removeprefix(group): shard.read(name, row) for name in names}

    def note(self, key: str) -> str:
        """Return the text kept with a key, "" if none."""
        return self._notes.get(key, "")

    def fill(
        self,
        keys: Sequence[str],
        make: Callable[[Sequence[str]], Sequence[Entry]],
        chunk: int = 16,
        shard: int = 2048,
        note: Callable[[str], str] | None = None,
    ) -> None:
        """Compute the entries that are missing, up to `shard` of them to a file.

        Of several processes, each of which must call this with the same keys, the main one computes and the others
        wait until it is done.

        Args:
            keys: what should be there afterwards, in the order to compute it in.
            make: gives the entries of up to `chunk` keys.
            note: a text to keep with a key; asked after the key's entry was made.

        Raises:
            UserError: the folder can't be written to, or NaN or infinity (in float16) in an entry.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self]
        if missing and processes().is_main_process:
            self._compute(missing, make, chunk, shard, note)
        while not all(key in self for key in missing):
            time.sleep(0.2)
            self._scan()

    def _compute(
        self,
        keys: Sequence[str],
        make: Callable[[Sequence[str]], Sequence[Entry]],
        chunk: int,
        shard: int,
        note: Callable[[str], str] | None,
    ) -> None:
        from tqdm import tqdm

        sweep(self.folder)
        seldom = 0.1 if sys.stderr.isatty() else 30.0  # a log file needs no more
        written = time.monotonic()
        with tqdm(desc=f"filling {self.folder}", total=len(keys), mininterval=seldom) as progress:
            for part in _parts(keys, shard):
                entries: dict[str, Entry] = {}
                for some in _parts(part, chunk):
                    made = make(some)
                    if len(made) != len(some):
                        raise ValueError(f"{len(made)} entries were made for {len(some)} keys")
                    entries |= zip(some, made, strict=True)
                    progress.update(len(some))
                    if some[-1] == part[-1] or time.monotonic() - written > self.every:
                        self._write(entries, {key: note(key) if note else "" for key in entries})
                        entries, written = {}, time.monotonic()

    def _write(self, entries: Mapping[str, Entry], notes: Mapping[str, str]) -> None:
        """One shard; entries of equal names, shapes and dtypes are rows of one stack, for a small header."""
        groups: dict[object, tuple[str, list[Entry]]] = {}
        rows: list[tuple[str, str, int, str]] = []
        for key, entry in entries.items():
            small = {
                name: (each.half() if each.is_floating_point() else each).cpu()
                for name, each in entry.items()
            }
            check_finite(small, f"the entry {key} for {self.folder}")
            kind = tuple((name, tuple(each.shape), each.dtype) for name, each in sorted(small.items()))
            group, members = groups.setdefault(kind, (f"{len(groups)}/", []))
            rows.append((key, group, len(members), notes[key]))
            members.append(small)
        tensors = {
            group + name: torch.stack([each[name] for each in members])
            for group, members in groups.values()
            for name in members[0]
        }
        name = hashlib.sha256("\n".join(entries).encode()).hexdigest()[:16]
        path = self.folder / f"shard-{name}.safetensors"
        write_tensors(path, tensors, {"rows": json.dumps(rows)})
        self._add(path)

    def _scan(self) -> None:
        """Take in the shards that have come since."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path not in self._shards:
                self._add(path)

    def _add(self, path: Path) -> None:
        try:
            rows = parse_json(read_metadata(path)["rows"], path)
            if not isinstance(rows, list) or not all(map(_is_row, rows)):
                raise UserError("its rows are no rows of a cache")
        except (UserError, KeyError) as error:
            raise UserError(
                f"{path} is no whole shard of a cache ({error}): delete it, it is built anew"
            ) from error
        self._shards[path] = None
        for key, group, row, note in rows:
            self._places[key] = path, group, row
            if note:
                self._notes[key] = note


def _is_row(row: object) -> bool:
    """Whether an entry of a shard's list is one: its key, the group of its tensors, its place in them, a note."""
    return isinstance(row, list) and [type(each) for each in row] == [str, str, int, str] and row[2] >= 0


def _parts(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))
