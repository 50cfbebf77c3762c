"""What a run is and what is done of it, in its folder: killed at any moment, it is known exactly what is left.

    .ldm-batch/run.json            what was asked for: the same again, or nothing
    .ldm-batch/claims              who is at work (see `claims`)
    .ldm-batch/blocks/000012.part  records of a block that is begun: a line for each group of pictures, appended
    .ldm-batch/blocks/000012.done  all of a block's records, in order, a line each: written whole
    metadata.parquet               the manifest, once all blocks are done: written whole

A picture is on the disk before its record is, so that a record is a promise.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import flush_to_disk, sweep, write_text, writing
from ldm.foreign import json_object, read_plain
from pipelines.batch.claims import Claims

MANIFEST = "metadata.parquet"  # of this name, and with a column file_name, `datasets` finds the pictures too
HIDDEN = ".ldm-batch"
Record = dict[str, Any]  # as a line of JSON: what `manifest.COLUMNS` names, and "item"

_WAIT = 0.2  # seconds until a claim is tried again
_KEYS = {"item", "file_name", "error", "where", "time"}  # that every record has
_ROUNDING = ("version", "torch", "openvino")
_RUN, _BEGIN, _SHARDS, _BLOCKS = (
    0,
    1,
    2,
    2**21,
)  # claims: of the run, from here on of shards, from here on of blocks


class Ledger:
    """The state of a run in the folder `out`. One a process; close it in the end."""

    def __init__(self, out: Path, begun: bool = False):
        """Open it, and the folder too. begun: it is there already. Raises UserError where it isn't, or is read-only."""
        self.out, self.hidden = out, out / HIDDEN
        if begun and not (self.hidden / "run.json").exists():
            raise UserError(f"no run is in {out} here: each machine needs the run's own folder at this path")
        self._blocks = self.hidden / "blocks"
        with writing(out):
            self._blocks.mkdir(parents=True, exist_ok=True)
        self.claims = Claims(self.hidden / "claims")
        self.asked: dict[str, Any] = {}
        self._tallies: dict[int, tuple[int, int]] = {}

    def close(self) -> None:
        """Give up all claims."""
        self.claims.close()

    # The run

    def enter(self, join: bool) -> None:
        """Be one of those who work here; the only one at first, unless `join`, until `share`.

        Raises UserError where another one is here, and without `join`.
        """
        if not join:
            if not self.claims.take(_RUN):
                raise UserError(
                    f"another run is drawing into {self.out}: wait for it, share its work (--join), or give another "
                    "folder"
                )
            return
        self.claims.require()
        while not self.claims.take(_RUN, beside_others=True):
            time.sleep(_WAIT)

    def share(self) -> None:
        """Let others join."""
        self.claims.take(_RUN, beside_others=True)

    def stated(self) -> dict[str, Any] | None:
        """Return what the run was begun with; None where it was not begun. Raises UserError."""
        path = self.hidden / "run.json"
        try:
            found = json_object(read_plain(path), path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from error
        counts = [found.get(name) for name in ("items", "block size", "blocks", "threads")]
        if not all(type(count) is int and count > 0 for count in counts):
            raise UserError(f"{path} is damaged: give another folder, or delete this one")
        return found

    def begin(self, asked: Mapping[str, Any], alone: bool = False) -> list[str]:
        """Begin the run that is asked for, or go on with it. Raises UserError where the folder holds another one.

        asked: JSON values by name, with "blocks" among them, how many there are. alone: nobody else is here, so that a
        run of which no picture is drawn yet may be put in place of another such. Returns notes.
        """
        self.asked = json.loads(json.dumps(asked))
        while not self.claims.take(_BEGIN):  # of several who join at once one begins
            time.sleep(_WAIT)
        try:
            if alone and self._is_nothing():
                self._clear()
            return self._begin()
        finally:
            self.claims.leave(_BEGIN)

    def _begin(self) -> list[str]:
        before = self.stated()
        if before is None:
            if (self.out / MANIFEST).exists():
                raise UserError(
                    f"{self.out} holds the {MANIFEST} of something else: give another folder, or move it away"
                )
            write_text(self.hidden / "run.json", json.dumps(self.asked, indent=1))
            return []
        notes = list[str]()
        for name in dict.fromkeys([*before, *self.asked]):
            old, new = before.get(name), self.asked.get(name)
            if old != new and name in _ROUNDING:
                notes.append(
                    f"the run in {self.out} was begun with {name} {old}, and goes on with {new}: what is drawn from "
                    "now on may be rounded otherwise"
                )
            elif old != new:
                raise UserError(_otherwise(self.out, name, old, new))
        return notes

    def _is_nothing(self) -> bool:
        """Whether a run was begun here, and none of its pictures is drawn: a mistake, perhaps."""
        before = self.stated()
        return before is not None and not any(
            (self.tally(block) if self._path(block, "done").exists() else self.tally_begun(block))[0]
            for block in range(before["blocks"])
        )

    def _clear(self) -> None:
        with writing(self.out):
            (self.out / MANIFEST).unlink(missing_ok=True)
            (self.hidden / "run.json").unlink()
            for path in self._blocks.iterdir():
                path.unlink()
        self._tallies.clear()

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.asked["blocks"]

    # Blocks

    def open_blocks(self) -> list[int]:
        """Return the blocks that aren't done, in order."""
        done = {name for name in os.listdir(self._blocks) if name.endswith(".done")}
        return [block for block in range(self.blocks) if f"{block:06d}.done" not in done]

    @contextmanager
    def claim(self, block: int) -> Iterator[bool]:
        """Have a block to oneself; gives False where another process has it, or it is done."""
        with self.claims.held(_BLOCKS + block) as mine:
            yield mine and not self._path(block, "done").exists()

    @contextmanager
    def claim_shard(self, shard: int) -> Iterator[bool]:
        """Have a shard, or the manifest (the last number, see `all_of_it`), to oneself; gives False where not."""
        with self.claims.held(_SHARDS + shard) as mine:
            yield mine

    def begun(self, block: int) -> dict[int, Record]:
        """Return the records of a block that are there, by item; what a kill left half written is cut off first."""
        path = self._path(block, "part")
        if not path.exists():
            return {}
        with writing(path):
            text = path.read_bytes()
            records, whole = _records_in(text)
            if whole != len(text):
                os.truncate(path, whole)
        return {record["item"]: record for record in records}

    def add(self, block: int, records: Sequence[Record]) -> None:
        """Note that these pictures, or what prevented them, are on the disk. Raises UserError."""
        path = self._path(block, "part")
        line = json.dumps(list(records), ensure_ascii=True) + "\n"
        # Unbuffered: what a full disk has refused must not be tried once more by closing the file.
        with writing(path), open(path, "ab", buffering=0) as file:
            whole, left = file.tell(), line.encode()
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), whole)
                raise

    def finish(self, block: int) -> None:
        """Note that all of a block is there. Raises UserError."""
        records = [record for _, record in sorted(self.begun(block).items())]
        self._write_done(block, records)
        self._path(block, "part").unlink()

    def reopen(self, block: int, keep: Callable[[Record], bool]) -> None:
        """Undo what is noted of a block, but for the records to keep. Raises UserError."""
        done = self._path(block, "done").exists()
        found = self.records_of(block) if done else list(self.begun(block).values())
        kept = [record for record in found if keep(record)]
        with writing(self.out):
            (self.out / MANIFEST).unlink(missing_ok=True)
            write_text(self._path(block, "part"), json.dumps(kept, ensure_ascii=True) + "\n")
            self._path(block, "done").unlink(missing_ok=True)
        self._tallies.pop(block, None)

    def records_of(self, block: int) -> list[Record]:
        """Return the records of a block that is done, in order. Raises UserError."""
        path = self._path(block, "done")
        try:
            text = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from error
        records, whole = _records_in(text)
        if whole != len(text):
            raise UserError(f"{path} is damaged: delete it, and the same command draws its rows again")
        return records

    def tally(self, block: int) -> tuple[int, int]:
        """Return how many pictures of a block that is done are drawn, and how many failed; they don't change."""
        if block not in self._tallies:
            self._tallies[block] = _tally(self.records_of(block))
        return self._tallies[block]

    def tally_begun(self, block: int) -> tuple[int, int]:
        """The same of a block that isn't done, perhaps another process's."""
        try:
            text = self._path(block, "part").read_bytes()
        except OSError:  # not begun, or just done
            return 0, 0
        return _tally(_records_in(text)[0])

    def records(self) -> Iterator[Record]:
        """Yield all records of a run that is done, in order. Raises UserError."""
        for block in range(self.blocks):
            yield from self.records_of(block)

    def sweep(self) -> None:
        """Remove what processes that were killed have left of files that they were writing."""
        for folder, _, _ in os.walk(self.out):
            sweep(Path(folder))

    def all_of_it(self) -> int:
        """The claim of the end of the run, among those of shards."""
        return _BLOCKS - _SHARDS - 1

    def _write_done(self, block: int, records: Sequence[Record]) -> None:
        path = self._path(block, "done")
        write_text(path, "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in records))
        flush_to_disk(path.parent)

    def _path(self, block: int, kind: str) -> Path:
        return self._blocks / f"{block:06d}.{kind}"


def _records_in(text: bytes) -> tuple[list[Record], int]:
    """The records in the lines of a block, one or a list of them a line, and how many bytes are whole lines of such."""
    records, whole = list[Record](), 0
    for line in text.split(b"\n")[:-1]:
        try:
            found = json.loads(line)
        except ValueError:
            break
        some = found if isinstance(found, list) else [found]
        if not all(isinstance(each, dict) and each.keys() >= _KEYS for each in some):
            break
        records += some
        whole += len(line) + 1
    return records, whole


def _tally(records: Iterable[Record]) -> tuple[int, int]:
    failed = [bool(record["error"]) for record in records]
    return failed.count(False), failed.count(True)


def _otherwise(out: Path, name: str, before: Any, now: Any) -> str:
    """What to tell whoever asks for something else than the run was begun with."""
    if name == "rows":
        return (
            f"the rows have changed since the run in {out} began: put the file back as it was, or give another "
            "folder (all that is drawn stays in this one)"
        )
    said = [f"{each!r:.80}" if each is not None else "not stated" for each in (before, now)]
    return (
        f"the run in {out} was begun with {name.replace('_', ' ')} {said[0]}, now {said[1]}: give the same again, or "
        "another folder"
    )
