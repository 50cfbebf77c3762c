"""Pictures and captions from disk: a folder, webdataset shards or a saved dataset, with the broken ones told apart."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ldm.data.buckets import Pixels
from ldm.data.folder import list_folder
from ldm.data.listing import SUFFIXES, ListedPicture, Listing, other_kind, walk, why
from ldm.data.saved import is_saved, list_saved
from ldm.data.webdataset import Scan, is_scan, list_shards
from ldm.errors import UserError, nearest, printable
from ldm.files import write_text
from ldm.pictures import open_raster

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

T = TypeVar("T")
Row = list[Any]  # of an index: [stamp, height, width, key], or [stamp, reason] of a broken picture
_VERSION = 2  # of the index; another one is built anew
_BITS, _PHOTOMETRIC = 258, 262  # TIFF's tags, in which photometric 1 says that 0 is black
_SHAPE = 0.02  # by how much the sides of a control picture may be others, as a ratio: rounding
_SAVE_EVERY = 60.0  # seconds between two writings of the index, for a kill to lose little


@dataclass(frozen=True)
class Item:
    """A whole picture. height, width: in pixels, turned as its EXIF says.

    name: for messages; captions: one or several, ("",) where there is none; key: the first 16 hex digits of the
    SHA-256 of the file's bytes.
    """

    name: str
    captions: tuple[str, ...]
    height: int
    width: int
    key: str

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]

    def pick(self, rng: np.random.Generator) -> str:
        """Return one of its captions, each as likely as the others."""
        return (
            self.captions[int(rng.integers(len(self.captions)))] if len(self.captions) > 1 else self.caption
        )


@dataclass(frozen=True)
class Decoded:
    """A picture, as `eight_bits` gives it, with what its file says of it.

    texts: a PNG's text chunks by keyword. profile: the ICC profile of its colours, where it is still theirs.
    """

    picture: "Image"
    texts: dict[str, str]
    profile: bytes | None


@dataclass(frozen=True)
class PictureSet:
    """Pictures to learn from.

    items: the whole ones, in a stable order; contents: gives each one's bytes.
    broken: those that are skipped, with the reason by name; notes: what a user may want to know, a line each.
    conditionings: gives the bytes of each one's control picture; none where there are no such.
    """

    items: Sequence[Item]
    contents: Sequence[Callable[[], bytes]]
    broken: dict[str, str]
    notes: list[str]
    conditionings: Sequence[Callable[[], bytes]] = ()

    def __len__(self) -> int:
        return len(self.items)

    def report(self) -> list[str]:
        """Return what the user should know of them, a line each, fit to print: the notes, and what was skipped."""
        skipped = [f"skipped {name}: {why}" for name, why in self.broken.items()]
        count = [f"{len(skipped)} broken pictures were skipped"] if skipped else []
        return [printable(each) for each in (*self.notes, *skipped, *count)]

    def read(self, i: int) -> Pixels:
        """Return the picture, uint8 (H, W, 3).

        Raises UserError where the picture has changed or gone since it was listed.
        """
        item = self.items[i]
        try:
            content = self.contents[i]()
        except (OSError, ValueError) as error:
            raise UserError(
                f"the picture {printable(item.name)} can't be read any more: {why(error)}"
            ) from error
        if _key(content) != item.key:
            raise UserError(
                f"the picture {printable(item.name)} has changed while it was used: run the same command again"
            )
        return decode(content)

    def read_conditioning(self, i: int) -> Pixels:
        """Return the control picture, uint8 (H, W, 3). Raises UserError where it has gone since it was listed."""
        try:
            return decode(self.conditionings[i]())
        except (OSError, ValueError) as error:
            name = printable(self.items[i].name)
            raise UserError(f"the control picture of {name} can't be read any more: {why(error)}") from error


def open_pictures(
    path: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    outside: bool = False,
    conditioning_column: str = "",
    index: Path | None = None,
    classes: bool = False,
) -> PictureSet:
    """Find the pictures and captions at `path` and decode each once, to tell the broken ones apart.

    Args:
        path: a folder of pictures (see ldm/data/folder.py), a `.tar` of webdataset's layout or a folder of such
            shards (webdataset.py), or a folder that `Dataset.save_to_disk` wrote (saved.py).
        image_column: the pictures' column of a saved dataset.
        caption_column: the captions' column of a saved dataset or of metadata, or their key in a shard's JSON; "" for
            pictures without captions.
        outside: whether metadata and rows may name picture files that are not below `path`.
        conditioning_column: the column of control pictures, in a saved dataset or, as file names, in metadata; "" for
            none. They are of the pictures' shape, if not of their size.
        classes: `caption_column` names each picture's class instead, which may be a whole number.
        index: a JSON file that keeps what was found: the next time only new and changed pictures are decoded.

    Raises:
        UserError: nothing there, no whole picture, or what the listing functions refuse.
    """
    path = Path(path)
    before = _read_index(index)
    try:
        columns = image_column, caption_column, conditioning_column
        listing, shards = _list(path, *columns, outside, before["shards"], classes)
    except OSError as error:  # a name too long, a disk that fails
        raise UserError(f"{path} can't be read: {why(error)}") from error
    if listing.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(listing.others.items()))
        listing.notes.append(f"{path}: skipped, as these kinds are not read: {kinds}")
    if not listing.entries:
        more = [
            *(f"{printable(name)}: {reason}" for name, reason in list(listing.broken.items())[:1]),
            *listing.notes,
        ]
        raise UserError("; ".join([f"{path} holds no pictures ({', '.join(SUFFIXES)})", *more]))
    if conditioning_column and (bare := [e for e in listing.entries if e.conditioning is None]):
        raise UserError(
            f"{path}: {printable(bare[0].name)} has no {conditioning_column}: control pictures are a column of "
            "metadata.jsonl, of metadata.csv, or of a saved dataset"
        )
    rows = _examine(listing.entries, before, shards, index)
    broken = dict(listing.broken)
    items: list[Item] = []
    contents: list[Callable[[], bytes]] = []
    conditionings: list[Callable[[], bytes]] = []
    for entry, row in zip(listing.entries, rows, strict=True):
        if len(row) == 2:
            broken[entry.name] = row[1]
        else:
            items.append(Item(entry.name, entry.captions, *row[1:]))
            contents.append(entry.content)
            conditionings += [entry.conditioning] if entry.conditioning else []
    if not items:
        name, reason = next(iter(broken.items()))
        raise UserError(
            f"none of the {len(rows)} pictures of {path} is whole; the first, {printable(name)}: {reason}"
        )
    bare = sum(not item.caption for item in items)
    if bare and caption_column and not classes:
        listing.notes.append(
            f"{path}: without a caption, so theirs is empty: {bare} of {len(items)} pictures"
        )
    return PictureSet(items, contents, broken, listing.notes, conditionings)


def decode(content: bytes) -> Pixels:
    """Decode a picture file's bytes to uint8 RGB (H, W, 3): turned as EXIF says, clear parts over white, 16 bits as 8.

    Of an animation, or of several pages, it is the first. Colour profiles are not applied.

    Raises ValueError for what is no whole picture, with the reason.
    """
    from PIL import ImageOps

    return _read(content, lambda file: rgb(ImageOps.exif_transpose(file)))


def decode_whole(content: bytes) -> Decoded:
    """Decode a picture file's bytes, with all that stays of it where it is changed and saved again: see `Decoded`.

    Raises ValueError as `decode` does.
    """
    return _read(content, _decoded)


def eight_bits(picture: "Image") -> "Image":
    """Return a picture turned as its EXIF says, 16 bits as 8, in the mode L, LA, RGB or RGBA: grey and clear stay so.

    Raises ValueError for numbers of which nothing says which of them is white.
    """
    from PIL import Image, ImageOps

    _check_range(picture)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        return Image.fromarray(_grey(picture))
    mode = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    return picture.convert(f"{mode}A" if picture.has_transparency_data else mode)


def _decoded(file: "ImageFile") -> Decoded:
    picture = eight_bits(file)
    texts = {str(name): str(text) for name, text in getattr(file, "text", {}).items()}
    profile = file.info.get("icc_profile") if file.mode not in ("CMYK", "LAB") else None
    return Decoded(picture, texts, profile)


def _read(content: bytes, form: Callable[["ImageFile"], T]) -> T:
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise ValueError("the file is empty")
    try:
        with open_raster(content) as file:
            _check_range(file)
            return form(file)
    except UnidentifiedImageError:
        raise ValueError("not a picture of a kind that can be read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"it claims too many pixels: {error}") from None
    except MemoryError:  # says nothing of the picture
        raise
    except Exception as error:  # a decoder may stumble over damaged bytes in any way
        raise ValueError(why(error)) from error


def _check_range(file: "Image") -> None:
    """Raise ValueError for numbers of which nothing says which of them is white, or which Pillow takes as they are."""
    if file.mode == "F" or (file.mode == "I" and getattr(file, "format", None) != "PNG"):
        raise ValueError("its pixels are not of 8 or 16 bits, so nothing says which is white: convert it")
    tags = getattr(file, "tag_v2", None)
    if file.mode.startswith("I;16") and tags and (tags.get(_PHOTOMETRIC), tags.get(_BITS)) != (1, (16,)):
        raise ValueError("its grey is of 12 bits or inverted: convert it")


def rgb(picture: "Image") -> Pixels:
    """Return a picture of any mode as uint8 RGB (H, W, 3): clear parts over white, 16 bits as 8."""
    from PIL import Image

    if picture.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        return np.stack([_grey(picture)] * 3, -1)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _grey(picture: "Image") -> np.ndarray:
    """16 bits as 8: uint8 (H, W)."""
    return (np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8)


def _list(
    path: Path,
    image_column: str,
    caption_column: str,
    conditioning_column: str,
    outside: bool,
    scans: dict[str, Scan],
    classes: bool,
) -> tuple[Listing, dict[str, Scan]]:
    """What lies at `path`, whichever kind of source it is, and the scans of its shards."""
    if path.is_file() and path.suffix.lower() == ".tar":
        return list_shards(path.parent, [path], caption_column, scans, classes)
    if not path.is_dir():
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is no folder and no .tar file" if path.exists() else "is not there"
        packed = ": unpack it to a plain .tar" if other_kind(path.name).startswith((".tar.", ".tgz")) else ""
        raise UserError(f"{path} {what}{packed or nearest(path.name, beside)}")
    if is_saved(path):
        return list_saved(path, image_column, caption_column, outside, conditioning_column, classes), {}
    shards = [
        folder / name for folder, names in walk(path, {}) for name in names if name.lower().endswith(".tar")
    ]
    listing = list_folder(path, caption_column, outside, conditioning_column, classes)
    if not shards:
        return listing, {}
    if listing.entries:
        raise UserError(f"{path} holds pictures and .tar shards: give each a folder of its own")
    found, scans = list_shards(path, sorted(shards), caption_column, scans, classes)
    found.broken = listing.broken | found.broken
    found.others += listing.others
    return found, scans


def _examine(
    entries: Sequence[ListedPicture], before: dict[str, Any], shards: dict[str, Scan], index: Path | None
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


def _look(entry: ListedPicture) -> Row:
    try:
        content = entry.content()
    except OSError as error:  # no stamp: it may be readable the next time although nothing of it has changed
        return ["", f"can't be read: {why(error)}"]
    except ValueError as error:
        return [entry.stamp, str(error)]
    try:
        height, width = decode(content).shape[:2]
    except ValueError as error:
        return [entry.stamp, str(error)]
    if entry.conditioning and (fault := _unlike(entry.conditioning, height, width)):
        return [entry.stamp, f"its control picture: {fault}"]
    return [entry.stamp, height, width, _key(content)]


def _unlike(conditioning: Callable[[], bytes], height: int, width: int) -> str:
    """Why a control picture can't go with a picture of this size; "" where it can."""
    try:
        own = decode(conditioning())
    except (OSError, ValueError) as error:
        return why(error)
    ratio = len(own) * width / (own.shape[1] * height)
    shape = f"it has {own.shape[1]} x {len(own)} pixels, another shape than the picture's {width} x {height}"
    return shape if abs(ratio - 1) > _SHAPE else ""


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read_index(path: Path | None) -> dict[str, Any]:
    """What was found before; nothing where the file is missing, damaged or of another making."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
        rows, scans = found["pictures"].values(), found["shards"].values()
        if found["version"] == _VERSION and all(map(_is_row, rows)) and all(map(is_scan, scans)):
            return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # it only saves time
    return {"pictures": {}, "shards": {}}


def _is_row(row: Row) -> bool:
    """Whether a row of an index is one."""
    reason, whole = [str, str], [str, int, int, str]
    kinds = [type(each) for each in row] if isinstance(row, list) else []
    return kinds == reason or (kinds == whole and min(row[1], row[2]) > 0)


def _write_index(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all. Raises UserError where it can't be written."""
    write_text(path, json.dumps(found))
