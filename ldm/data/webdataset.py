"""Shards in the webdataset layout: plain tar files in which the members of one basename belong together.

A picture and its caption are `0001.jpg` and `0001.txt`, or `0001.json` with the caption, or a list of several, under
a key. The headers are read once; afterwards each picture is read at its offset, in any order.
"""

import json
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.listing import (
    SUFFIXES,
    ListedPicture,
    Listing,
    as_text,
    captions_of,
    one_line,
    other_kind,
    stamp_of,
    why,
)
from ldm.data.tar import Members, members_of, read_at
from ldm.foreign import LARGEST

Scan = dict[str, Any]  # of one shard, as JSON holds it: stamp, column, and what `_scan` returns
_TEXTS = ("txt", "json")  # where a caption is looked for, in this order
_CLASSES = ("cls", "json")  # where a class is
_MOST_TEXT = 2**24  # bytes of a member with one caption


def list_shards(
    root: Path,
    shards: Sequence[Path],
    caption_column: str,
    known: Mapping[str, Scan],
    classes: bool = False,
) -> tuple[Listing, dict[str, Scan]]:
    """List the pictures of `shards`, named relative to `root`; also what was found in each shard's headers.

    known: what an earlier call found; a shard that is still the same is not scanned again. A shard that is cut short
    or no tar file counts as broken; what is whole in it is used. classes: `caption_column` holds each picture's class,
    or a member `.cls` does.
    """
    column = f"class {caption_column}" if classes else caption_column
    listing, scans = Listing(), dict[str, Scan]()
    for path in shards:
        name = path.relative_to(root).as_posix()
        try:
            stamp = stamp_of(path)
            scan: Scan = known.get(name, {})
            if (scan.get("stamp"), scan.get("column")) != (stamp, column):
                scan = {"stamp": stamp, "column": column, **_scan(path, caption_column, classes)}
        except OSError as error:
            listing.broken[name] = f"can't be read: {why(error)}"
            continue
        scans[name] = scan
        listing.broken |= {
            f"{name}/{member}".rstrip("/"): reason for member, reason in scan["broken"].items()
        }
        listing.notes += [f"{path}: {note}" for note in scan["notes"]]
        listing.others.update(scan["others"])
        listing.entries += [
            ListedPicture(
                f"{name}/{member}", tuple(captions), f"{stamp}-{offset}", partial(read_at, path, offset, size)
            )
            for member, captions, offset, size in scan["members"]
        ]
    return listing, scans


def is_scan(scan: Scan) -> bool:
    """Return whether what an index holds for a shard is of this making.

    Raises TypeError or LookupError for odd JSON.
    """
    members = (
        isinstance(name, str)
        and bool(captions)
        and isinstance(captions, list)
        and all(isinstance(each, str) for each in captions)
        and type(offset) is type(size) is int
        and offset >= 0 <= size <= LARGEST
        for name, captions, offset, size in scan["members"]
    )
    texts = (*scan["notes"], *scan["broken"].values(), *scan["broken"])
    counts = (type(each) is int for each in scan["others"].values())
    return all(members) and all(isinstance(each, str) for each in texts) and all(counts)


def _scan(path: Path, caption_column: str, classes: bool) -> Scan:
    """Members (name, captions, offset, size) in the tar's order, and what is broken: "" stands for the shard itself."""
    found = members_of(path)
    seen = [name for name in (*found.places, *found.odd) if not _is_hidden(name)]
    owners, fields = _owners(seen, _CLASSES if classes else _TEXTS)
    members: list[list[Any]] = []
    broken: dict[str, str] = {}
    read: dict[str, tuple[str, ...]] = {}  # captions by their member
    for name, texts in owners.items():
        offset, size = found.places.get(name, (0, 0))
        if name in found.odd or size > LARGEST:
            broken[name] = found.odd.get(
                name, f"its {size:,} bytes are more than the {LARGEST:,} that are read"
            )
            continue
        try:
            captions = _captions(path, found, texts if caption_column else [], caption_column, read, classes)
        except ValueError as error:
            broken[name] = str(error)
        else:
            members.append([name, captions, offset, size])
    if found.damage:
        broken[""] = f"cut short or no tar file, {len(owners)} pictures found ({found.damage})"
    elif found.damage is not None:
        broken[""] = f"damaged after {len(owners)} pictures"
    notes = [f"left out, as parts of other samples: {_some(fields)}"] if fields else []
    doubled = [name for name in found.twice if name in owners]
    notes += [f"in it twice, of which the last is used: {_some(doubled)}"] if doubled else []
    others = Counter(filter(None, map(other_kind, seen)))
    return {"members": members, "broken": broken, "notes": notes, "others": dict(others)}


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} pictures (the first is {names[0]})"


def _is_hidden(name: str) -> bool:
    """Whether a member, or a folder above it, is hidden, such as macOS's `._` files: webdataset passes over them."""
    return any(part.startswith(".") for part in posixpath.normpath(name).split("/") if part != "..")


def _owners(names: Sequence[str], kinds: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The members, of these kinds, that may hold each picture's caption, and pictures that are no samples of their own.

    webdataset splits a file's name at its first dot: `1.jpg`, `1.txt` and `1.seg.png` are one sample. Where a name has
    further dots, as `photo.v1.jpg` and `photo.v1.txt` have, that would throw pictures together; so one whose text has
    the same name up to the last dot, or whose sample has no picture of plain name, is a sample of its own.
    """
    texts: dict[tuple[str, str], str] = {}  # member by (basename, kind)
    pictures: list[tuple[str, str, str]] = []  # member, and its basename by the last dot and by the first
    for name in names:
        folder, file = posixpath.split(posixpath.normpath(name))
        last, _, kind = file.rpartition(".")
        if kind.lower() in kinds:
            texts[posixpath.join(folder, last), kind.lower()] = name
        elif f".{kind.lower()}" in SUFFIXES:
            first = file.partition(".")[0]
            pictures.append((name, posixpath.join(folder, last), posixpath.join(folder, first)))

    def beside(base: str) -> list[str]:
        return [texts[base, kind] for kind in kinds if (base, kind) in texts]

    plain = {first for _, last, first in pictures if last == first}
    of_sample = Counter(first for _, _, first in pictures)
    owners: dict[str, list[str]] = {}
    fields: list[str] = []
    for name, last, first in pictures:
        own = beside(last)
        if last != first and first in plain and not own:
            fields.append(name)
        else:
            alone = of_sample[first] == 1
            owners[name] = own or (beside(first) if alone else [])
    return owners, fields


def _captions(
    path: Path,
    found: Members,
    texts: Sequence[str],
    caption_column: str,
    read: dict[str, tuple[str, ...]],
    classes: bool,
) -> tuple[str, ...]:
    """The captions of a picture: those of the first member that holds any. Raises ValueError."""
    for name in texts:
        if name not in read:
            try:
                read[name] = _read(path, found, name, caption_column, classes)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"its caption in {name} can't be read: {why(error)}") from None
        if any(read[name]):
            return read[name]
    return ("",)


def _read(path: Path, found: Members, name: str, caption_column: str, classes: bool) -> tuple[str, ...]:
    """The text of a caption member: of JSON, what stands under the column's name or "caption"."""
    if name in found.odd:
        raise ValueError(found.odd[name])
    offset, size = found.places[name]
    if size > _MOST_TEXT:
        raise ValueError(f"its {size:,} bytes are too many")
    text = as_text(read_at(path, offset, size))
    if name.lower().endswith((".txt", ".cls")):
        return (one_line(text),)
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    key = caption_column if caption_column in row or classes else "caption"
    try:
        return tuple(one_line(each) for each in captions_of(row.get(key), classes))
    except ValueError as error:
        raise ValueError(f"{key} is {error}") from None
