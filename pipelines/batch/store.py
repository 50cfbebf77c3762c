"""Where a run's pictures go: files named by their content, or shards in webdataset's layout.

Pictures of shards wait in the hidden folder until all of their shard are there: a tar file is written whole.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ldm.files import whole_file, write_bytes, writing
from pipelines.batch.ledger import HIDDEN, Ledger, Record

Format = Literal["files", "wds"]


class Store(Protocol):
    """Keeps pictures."""

    def save(self, item: int, png: bytes) -> Record:
        """Put a picture on the disk; returns file_name, sha256 and bytes for its record. Raises UserError."""
        ...

    def is_there(self, record: Record) -> bool:
        """Whether the picture of a record is still there."""
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

    def settle(self, ledger: Ledger, block: int | None = None) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class Shards:
    """`shards/000003.tar`, each of the pictures of `blocks` blocks: 00000012.png, .txt (the prompt) and .json."""

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
        tar = self.out / record["file_name"].rpartition("/")[0]
        return _size(tar) is not None or _size(self._waiting(record["item"])) == record["bytes"]

    def settle(self, ledger: Ledger, block: int | None = None) -> None:
        """Write the shard of a block, None: every shard, of which all blocks are done, and that isn't there yet."""
        last = -(-ledger.blocks // self.blocks)
        shards = range(last) if block is None else [block // self.blocks]
        still_open = set(ledger.open_blocks())
        for shard in shards:
            own = range(shard * self.blocks, min((shard + 1) * self.blocks, ledger.blocks))
            if still_open.isdisjoint(own):
                with ledger.claim_shard(shard) as mine:
                    if mine:
                        self._write(
                            self.out / self._name(shard), [r for b in own for r in ledger.records_of(b)]
                        )

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


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None
