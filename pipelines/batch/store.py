"""Where a run's pictures go: files named by their content, or shards in webdataset's layout.

Pictures of shards wait in the hidden folder until all of their shard are there: a tar file is written whole.
"""

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from ldm.data.tar import members_of, read_at
from ldm.files import whole_file, write_bytes, writing
from pipelines.batch.ledger import HIDDEN, Ledger, Record

_WAIT = 0.2  # seconds until a shard that another process writes is looked at again
Format = Literal["files", "wds"]


class Store(Protocol):
    """Keeps pictures."""

    def save(self, item: int, png: bytes) -> Record:
        """Put a picture on the disk; returns file_name, sha256 and bytes for its record. Raises UserError."""
        ...

    def is_there(self, record: Record) -> bool:
        """Whether the picture of a record is still there."""
        ...

    def reopen(self, ledger: Ledger, block: int) -> None:
        """Make ready for pictures of a block that was done. Raises UserError."""
        ...

    def settle(self, ledger: Ledger, block: int | None = None) -> None:
        """Do what can be done once a block, None: all of them, is done. Raises UserError."""
        ...


@dataclass(frozen=True)
class Files:
    """`images/3f/3f9a...png`, named by the SHA-256 of the file: equal pictures are one file."""

    out: Path

    def save(self, item: int, png: bytes) -> Record:
        """See `Store`."""
        stated = _stated(png)
        stated["file_name"] = f"images/{stated['sha256'][:2]}/{stated['sha256']}.png"
        if not self.is_there(stated):
            write_bytes(self.out / stated["file_name"], png)
        return stated

    def is_there(self, record: Record) -> bool:
        """See `Store`."""
        return _size(self.out / record["file_name"]) == record["bytes"]

    def reopen(self, ledger: Ledger, block: int) -> None:
        """There is nothing to do."""

    def settle(self, ledger: Ledger, block: int | None = None) -> None:
        """There is nothing to do."""


@dataclass(frozen=True)
class Shards:
    """`shards/000003.tar`, each of the pictures of `blocks` blocks: 00000012.png, .txt (the prompt) and .json.

    What is noted of a block whose shard isn't written yet waits; nothing waits of what is in its shard.
    """

    out: Path
    blocks: int
    block_size: int

    def save(self, item: int, png: bytes) -> Record:
        """See `Store`."""
        write_bytes(self._waiting(item), png)
        shard = item // (self.blocks * self.block_size)
        return {**_stated(png), "file_name": f"{self._name(shard)}/{item:08d}.png"}

    def is_there(self, record: Record) -> bool:
        """See `Store`."""
        name, _, member = record["file_name"].rpartition("/")
        size = record["bytes"]
        return _sizes(self.out / name).get(member) == size or _size(self._waiting(record["item"])) == size

    def reopen(self, ledger: Ledger, block: int) -> None:
        """Let the pictures of its shard wait again, and give the shard up: with other pictures it is another one."""
        path = self.out / self._name(block // self.blocks)
        for member, (offset, size) in _places(path).items():
            if member.endswith(".png"):
                write_bytes(self._waiting(int(member.removesuffix(".png"))), read_at(path, offset, size))
        with writing(path):
            path.unlink(missing_ok=True)

    def settle(self, ledger: Ledger, block: int | None = None) -> None:
        """Write the shard of a block, if its blocks are done; None: every shard, and wait for those of others."""
        if block is not None:
            self._settle(ledger, block // self.blocks)
            return
        for shard in range(-(-ledger.blocks // self.blocks)):
            while not self._settle(ledger, shard):
                time.sleep(_WAIT)

    def _settle(self, ledger: Ledger, shard: int) -> bool:
        """Write a shard, if its blocks are done and nobody else is at it; returns whether it is all there."""
        own = range(shard * self.blocks, min((shard + 1) * self.blocks, ledger.blocks))
        if not set(ledger.open_blocks()).isdisjoint(own):
            return False
        with ledger.claim_shard(shard) as mine:
            if mine:
                self._write(self.out / self._name(shard), [r for b in own for r in ledger.records_of(b)])
            return mine

    def _write(self, path: Path, records: list[Record]) -> None:
        drawn = [record for record in records if record["file_name"]]
        if drawn and not path.exists():
            with (
                whole_file(path) as temporary,
                tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for record in drawn:
                    for ending, content in self._sample(record):
                        member = tarfile.TarInfo(f"{record['item']:08d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        with writing(path):
            for record in drawn:
                self._waiting(record["item"]).unlink(missing_ok=True)

    def _sample(self, record: Record) -> Iterable[tuple[str, bytes]]:
        yield "png", self._waiting(record["item"]).read_bytes()
        yield "txt", record["prompt"].encode()
        told = {name: record[name] for name in ("id", "prompt", "negative_prompt", "seed", "sha256")}
        more: dict[str, Any] = {"caption": record["prompt"], "settings": json.loads(record["settings"])}
        yield "json", json.dumps(told | more, ensure_ascii=False, sort_keys=True).encode()

    def _name(self, shard: int) -> str:
        return f"shards/{shard:06d}.tar"

    def _waiting(self, item: int) -> Path:
        return self.out / HIDDEN / "waiting" / f"{item // 1000:06d}" / f"{item:08d}.png"


def _stated(png: bytes) -> Record:
    return {"sha256": hashlib.sha256(png).hexdigest(), "bytes": len(png)}


def _places(tar: Path) -> dict[str, tuple[int, int]]:
    """Where the members of a tar file are, by name: (offset, size); none where there is no such file."""
    try:
        return members_of(tar).places
    except OSError:
        return {}


def _sizes(tar: Path) -> dict[str, int]:
    """Bytes of the members of a tar file, by name."""
    try:
        status = tar.stat()
    except OSError:
        return {}
    return _sizes_of(tar, status.st_mtime_ns, status.st_size)


@lru_cache(2)
def _sizes_of(tar: Path, changed: int, size: int) -> dict[str, int]:
    return {name: length for name, (_, length) in _places(tar).items()}


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None
