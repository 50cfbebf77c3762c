"""What a source of pictures offers before any of them is decoded: names, captions, and how to get the bytes."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError, nearest
from ldm.foreign import plain_status, read_plain

# By the endings of `ldm.pictures.RASTERS`.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".avifs"),
)
# Pictures that are not read, and shards that are compressed, for a note to count them.
_PHOTOGRAPHS = (
    ".heic .heics .heif .heifs .hif .jxl .jp2 .j2k .j2c .jpc .jpf .jpx .jpm .jxr .wdp .hdp .flif .bpg .qoi .raw .dng "
    ".cr2 .cr3 .crw .nef .nrw .arw .sr2 .orf .rw2 .raf .pef .srw .x3f .3fr .erf .kdc .mrw .rwl .exr .hdr .dcm .fits"
)
_GRAPHICS = (
    ".svg .svgz .eps .epsf .ps .ai .pdf .wmf .emf .cdr .psd .psb .xcf .kra .ora .ico .icns .cur .tga .ppm .pgm .pbm "
    ".pnm .pam .pfm .pcx .dds .sgi .ras .xbm .xpm"
)
_PACKED = ".tgz .tar.gz .tar.bz2 .tar.xz .tar.zst"
_OTHERS = frozenset(f"{_PHOTOGRAPHS} {_GRAPHICS} {_PACKED}".split())
_MOST_TEXT = 2**24  # bytes of a file with one caption


@dataclass(frozen=True)
class ListedPicture:
    """One picture, not yet decoded.

    name: for messages, and what it is known by in an index; stamp: changes whenever its bytes do.
    captions: one or several, of which training takes one each time; ("",) where there is none.
    content: returns the file's bytes; an OSError where they can't be had, a ValueError where there never will be any.
    conditioning: the same for the control picture that goes with it, where there is one.
    """

    name: str
    captions: tuple[str, ...]
    stamp: str
    content: Callable[[], bytes]
    conditioning: Callable[[], bytes] | None = None


@dataclass
class Listing:
    """All entries in a stable order; `broken`: reason by name; `notes`: what a user may want to know, a line each.

    others: how many pictures there are of kinds that are not read, by their ending.
    """

    entries: list[ListedPicture] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def stamp_of(path: Path) -> str:
    """Return size and time of a regular file: both stay as they are only while its bytes do.

    Raises OSError for others.
    """
    status = plain_status(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def other_kind(name: str) -> str:
    """Return the ending of a picture, or of a shard, that is of a kind that is not read; "" for all other names."""
    lowered = name.lower()
    first, last = (lowered[at:] if at > 0 else "" for at in (lowered.rfind(".tar."), lowered.rfind(".")))
    return next((each for each in (first, last) if each in _OTHERS), "")


def walk(root: Path, broken: dict[str, str]) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder with its files, sorted; hidden ones are left out, links to folders are followed.

    broken: takes up, by name, folders that can't be read and links that lead nowhere, or to where it was already.
    """

    def refused(error: OSError) -> None:
        broken[relative(root, Path(error.filename))] = f"can't be read: {why(error)}"

    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refused):
        seen.add(os.path.realpath(folder))
        kept: list[str] = []
        for name in sorted(each for each in folders if not each.startswith(".")):
            path = os.path.join(folder, name)
            if os.path.realpath(path) not in seen:
                kept.append(name)
            elif os.path.islink(path):
                broken[relative(root, Path(path))] = "it is a link to a folder that is listed already"
        folders[:] = kept
        yield Path(folder), sorted(each for each in names if not each.startswith("."))


def relative(root: Path, path: Path) -> str:
    """Return the name of a file below `root`, with slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def inside(root: Path, path: Path) -> bool:
    """Return whether a path is below `root` as it is written: links that lie there may lead anywhere."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def why(error: Exception) -> str:
    """Return an error's reason on one line."""
    said = getattr(error, "strerror", None) or str(error)
    return (said.strip().splitlines() or [type(error).__name__])[0][:200]


# Text


def read_lines(path: Path) -> str:
    """Return a text file, UTF-8 with or without a byte order mark, its lines ended by "\\n". Raises UserError."""
    try:
        return as_text(read_plain(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text: {why(error)}") from None


def caption_beside(picture: Path) -> str:
    """Return the caption in the text file beside a picture, on one line; "" without one.

    Raises ValueError where it can't be read.
    """
    path = picture.with_suffix(".txt")
    if not os.path.lexists(path) or path.is_dir():
        return ""
    try:
        return one_line(as_text(read_plain(path, _MOST_TEXT)))
    except (OSError, ValueError) as error:
        raise ValueError(f"its caption {path.name} can't be read: {why(error)}") from None


def as_text(content: bytes) -> str:
    """Return UTF-8 bytes as text, its lines ended by "\\n". Raises ValueError that names the line."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is in UTF-16: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is in another encoding ({error.reason}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def one_line(text: str) -> str:
    return " ".join(text.split())


def captions_of(value: Any, classes: bool = False) -> tuple[str, ...]:
    """Return what stands for a picture's caption in a row or in JSON: a text, several, or None.

    classes: it is the name of a class instead, which may be a whole number.

    Of several, those that are empty are left out; ("",) where nothing is left. Raises ValueError for what is no text,
    and of these UnicodeError for half of a surrogate pair, which JSON may hold and no text encoder takes; the message
    goes on from "the caption is".
    """
    if classes and type(value) is int:
        return (str(value),)
    texts = value if isinstance(value, list | tuple) else [value]
    for each in texts:
        if each is not None and not isinstance(each, str):
            within = "a list with " if texts is value else ""
            shown = repr(each) if len(repr(each)) < 100 else f"{repr(each)[:97]}..."
            raise ValueError(f"{within}{shown}, which is no text but {_kind(each)}")
        if each and any("\ud800" <= character <= "\udfff" for character in each):
            raise UnicodeError(f"{ascii(each)[:97]}, which holds half of a surrogate pair")
    return tuple(filter(None, (each.strip() for each in texts if each))) or ("",)


def _kind(value: Any) -> str:
    """A type in JSON's words."""
    kinds = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")


def no_column(where: str | Path, column: str, known: Iterable[str]) -> UserError:
    """Return the error for a column that is not there; it names those that are."""
    names = list(known)
    have = ", ".join(names) or "none"
    return UserError(f"{where} has no column {column!r}{nearest(column, names)} (its columns: {have})")
