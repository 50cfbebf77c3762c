"""What a source of pictures offers before any of them is decoded: names, captions, and how to get the bytes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import UserError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Entry:
    """One picture, not yet decoded.

    name: for messages, and what it is known by in an index; stamp: changes whenever its bytes do.
    content: returns the file's bytes; an OSError where they can't be had.
    """

    name: str
    caption: str
    stamp: str
    content: Callable[[], bytes]


@dataclass
class Listing:
    """All entries in a stable order; `broken`: reason by name; `notes`: what a user may want to know, a line each."""

    entries: list[Entry] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def stamp_of(path: Path) -> str:
    """Size and time of a file: both stay as they are only while its bytes do."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def read_lines(path: Path) -> str:
    """A text file, UTF-8 with or without a byte order mark. Raises UserError where it is not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text: {error}") from None


def no_column(where: str | Path, column: str, known: Iterable[str]) -> UserError:
    """The error for a column that is not there; it names those that are."""
    names = list(known)
    have = ", ".join(names) or "none"
    return UserError(f"{where} has no column {column!r}{nearest(column, names)} (its columns: {have})")
