"""Shards in the webdataset layout: plain tar files in which the members of one basename belong together.

A picture and its caption are `0001.jpg` and `0001.txt`, or `0001.json` with the caption under a key. The headers are
read once; afterwards each picture is read at its offset, in any order.
"""

import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.listing import SUFFIXES, Entry, Listing, stamp_of

Scan = dict[str, Any]  # of one shard, as JSON holds it: stamp, column, members, broken
_BLOCK = 512  # bytes; a tar file is made of these


def list_shards(
    root: Path, shards: Sequence[Path], caption_column: str, known: Mapping[str, Scan]
) -> tuple[Listing, dict[str, Scan]]:
    """List the pictures of `shards`, named relative to `root`; also what was found in each shard's headers.

    known: what an earlier call found; a shard that is still the same is not scanned again. A shard that is cut short
    or no tar file counts as broken; what is whole in it is used.
    """
    listing, scans = Listing(), dict[str, Scan]()
    for path in shards:
        name, stamp = path.relative_to(root).as_posix(), stamp_of(path)
        scan: Scan = known.get(name, {})
        if (scan.get("stamp"), scan.get("column")) != (stamp, caption_column):
            scan = {"stamp": stamp, "column": caption_column, **_scan(path, caption_column)}
        scans[name] = scan
        listing.broken |= {f"{name}/{member}".rstrip("/"): why for member, why in scan["broken"].items()}
        listing.entries += [
            Entry(f"{name}/{member}", caption, f"{stamp}-{offset}", partial(_span, path, offset, size))
            for member, caption, offset, size in scan["members"]
        ]
    return listing, scans


def _span(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _scan(path: Path, caption_column: str) -> Scan:
    """Members (name, caption, offset, size) in the tar's order, and what is broken: "" stands for the shard itself."""
    pictures: dict[str, tuple[str, int, int]] = {}
    captions: dict[str, dict[str, str]] = {"txt": {}, "json": {}}
    unreadable: dict[str, str] = {}
    broken: dict[str, str] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                base, kind = _split(member.name)
                if not member.isreg():
                    continue
                if f".{kind}" in SUFFIXES:
                    pictures[base] = (member.name, member.offset_data, member.size)
                elif kind in captions and caption_column and (file := shard.extractfile(member)):
                    try:
                        captions[kind][base] = _caption(file.read(), kind, caption_column)
                    except ValueError as error:
                        unreadable[base] = f"its caption in {member.name} can't be read: {error}"
        # tarfile takes a header that is no header for the end, unless it is the first.
        if _span(path, end, _BLOCK).strip(b"\0"):
            broken[""] = f"damaged after {len(pictures)} pictures"
    except (tarfile.TarError, OSError, EOFError) as error:
        broken[""] = f"cut short or no tar file, {len(pictures)} pictures found ({error})"
    members: list[list[Any]] = []
    for base, (name, offset, size) in pictures.items():
        if base in unreadable:
            broken[name] = unreadable[base]
        else:
            caption = captions["txt"].get(base) or captions["json"].get(base, "")
            members.append([name, caption, offset, size])
    return {"members": members, "broken": broken}


def _split(name: str) -> tuple[str, str]:
    """Basename and kind: webdataset splits the file's name at its first dot."""
    folder, slash, file = name.rpartition("/")
    base, _, kind = file.partition(".")
    return folder + slash + base, kind.lower()


def _caption(content: bytes, kind: str, caption_column: str) -> str:
    """The text of a caption member: of JSON, what stands under the column's name or "caption"."""
    text = content.decode("utf-8-sig")
    if kind == "txt":
        return " ".join(text.split())
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    caption = found.get(caption_column, found.get("caption")) or ""
    if not isinstance(caption, str):
        raise ValueError(f"{caption!r} is no text")
    return " ".join(caption.split())
