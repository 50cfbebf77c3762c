"""Pictures and captions from disk: a folder, webdataset shards or a saved dataset, with the broken ones told apart."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.buckets import Pixels
from ldm.data.folder import list_folder
from ldm.data.listing import SUFFIXES, Entry, Listing
from ldm.data.saved import is_saved, list_saved
from ldm.data.webdataset import Scan, list_shards
from ldm.errors import UserError, nearest

Row = list[Any]  # of an index: [stamp, height, width, key], or [stamp, reason] of a broken picture
_VERSION = 1  # of the index; another one is built anew
_SAVE_EVERY = 60.0  # seconds between two writings of the index, for a kill to lose little


@dataclass(frozen=True)
class Item:
    """A whole picture. height, width: in pixels, turned as its EXIF says.

    name: for messages; key: the first 16 hex digits of the SHA-256 of the file's bytes.
    """

    name: str
    caption: str
    height: int
    width: int
    key: str


@dataclass(frozen=True)
class PictureSet:
    """Pictures to learn from.

    items: the whole ones, in a stable order; contents: gives each one's bytes.
    broken: those that are skipped, with the reason by name; notes: what a user may want to know, a line each.
    """

    items: Sequence[Item]
    contents: Sequence[Callable[[], bytes]]
    broken: dict[str, str]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int) -> Pixels:
        """uint8 (H, W, 3). Raises UserError where the picture has changed or gone since it was listed."""
        item = self.items[i]
        try:
            content = self.contents[i]()
        except OSError as error:
            raise UserError(f"the picture {item.name} can't be read any more: {_one_line(error)}") from error
        if _key(content) != item.key:
            raise UserError(
                f"the picture {item.name} has changed while it was used: run the same command again"
            )
        return decode(content)


def open_pictures(
    path: str | Path, *, image_column: str = "image", caption_column: str = "text", index: Path | None = None
) -> PictureSet:
    """Find the pictures and captions at `path` and decode each once, to tell the broken ones apart.

    Args:
        path: a folder of pictures (see ldm/data/folder.py), a `.tar` of webdataset's layout or a folder of such
            shards (webdataset.py), or a folder that `Dataset.save_to_disk` wrote (saved.py).
        image_column: the pictures' column of a saved dataset.
        caption_column: the captions' column of a saved dataset or of metadata, or their key in a shard's JSON; "" for
            pictures without captions.
        index: a JSON file that keeps what was found: the next time only new and changed pictures are decoded.

    Raises:
        UserError: nothing there, no whole picture, or what the listing functions refuse.
    """
    path = Path(path)
    before = _read_index(index)
    listing, shards = _list(path, image_column, caption_column, before["shards"])
    if not listing.entries:
        why = "".join(f"; {name}: {why}" for name, why in list(listing.broken.items())[:1])
        raise UserError(f"{path} holds no pictures ({', '.join(SUFFIXES)}){why}")
    rows = _examine(listing.entries, before, shards, index)
    broken = dict(listing.broken)
    items: list[Item] = []
    contents: list[Callable[[], bytes]] = []
    for entry, row in zip(listing.entries, rows, strict=True):
        if len(row) == 2:
            broken[entry.name] = row[1]
        else:
            items.append(Item(entry.name, entry.caption, *row[1:]))
            contents.append(entry.content)
    if not items:
        name, why = next(iter(broken.items()))
        raise UserError(f"none of the {len(rows)} pictures of {path} is whole; the first, {name}: {why}")
    bare = sum(not item.caption for item in items)
    if bare and caption_column:
        listing.notes.append(
            f"{path}: without a caption, so theirs is empty: {bare} of {len(items)} pictures"
        )
    return PictureSet(items, contents, broken, listing.notes)


def decode(content: bytes) -> Pixels:
    """A picture file's bytes as uint8 RGB (H, W, 3): turned as EXIF says, clear parts over white, 16 bits rounded to 8.

    Colour profiles are not applied.

    Raises ValueError for what is no whole picture, with the reason.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as file:
            picture = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise ValueError("not a picture of a kind that can be read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"it claims too many pixels: {error}") from None
    except MemoryError:  # says nothing of the picture
        raise
    except Exception as error:  # a decoder may stumble over damaged bytes in any way
        raise ValueError(_one_line(error)) from error
    if picture.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        grey = (np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8)
        return np.stack([grey] * 3, -1)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _list(
    path: Path, image_column: str, caption_column: str, scans: dict[str, Scan]
) -> tuple[Listing, dict[str, Scan]]:
    """What lies at `path`, whichever kind of source it is, and the scans of its shards."""
    if path.is_file() and path.suffix == ".tar":
        return list_shards(path.parent, [path], caption_column, scans)
    if not path.is_dir():
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is no folder and no .tar file" if path.exists() else "is not there"
        raise UserError(f"{path} {what}{nearest(path.name, beside)}")
    if is_saved(path):
        return list_saved(path, image_column, caption_column), {}
    shards = sorted(path.rglob("*.tar"))
    listing = list_folder(path, caption_column)
    if shards and listing.entries:
        raise UserError(f"{path} holds pictures and .tar shards: give each a folder of its own")
    return list_shards(path, shards, caption_column, scans) if shards else (listing, {})


def _examine(
    entries: Sequence[Entry], before: dict[str, Any], shards: dict[str, Scan], index: Path | None
) -> list[Row]:
    """A row for each entry: as the index knows it, or from decoding it now, several at a time."""
    from tqdm import tqdm

    known: dict[str, Row] = before["pictures"]
    rows = {e.name: known[e.name] for e in entries if known.get(e.name, [""])[0] == e.stamp}
    fresh = list({e.name: e for e in entries if e.name not in rows}.values())
    found: dict[str, Any] = {"version": _VERSION, "pictures": rows, "shards": shards}
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoders work outside Python's lock
    saved = time.monotonic()
    try:
        checked = pool.map(_look, fresh)
        progress = tqdm(
            checked, "checking pictures", len(fresh), disable=None if fresh else True, leave=False
        )
        for entry, row in zip(fresh, progress, strict=True):
            rows[entry.name] = row
            if index and time.monotonic() - saved > _SAVE_EVERY:
                _write_index(index, found)
                saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        if index and found != before:
            _write_index(index, found)
    return [rows[entry.name] for entry in entries]


def _look(entry: Entry) -> Row:
    try:
        content = entry.content()
    except OSError as error:  # no stamp: it may be readable the next time although nothing of it has changed
        return ["", f"can't be read: {_one_line(error)}"]
    try:
        height, width = decode(content).shape[:2]
    except ValueError as error:
        return [entry.stamp, str(error)]
    return [entry.stamp, height, width, _key(content)]


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_index(path: Path | None) -> dict[str, Any]:
    """What was found before; nothing where the file is missing or of another making."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        found = {}
    current = isinstance(found, dict) and found.get("version") == _VERSION
    return found if current else {"pictures": {}, "shards": {}}


def _write_index(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all. Raises UserError where it can't be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"can't write the index {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
