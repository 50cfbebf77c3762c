"""A folder of pictures with captions: `metadata.jsonl` or `metadata.csv`, or a `.txt` beside each picture.

The metadata is that of the `datasets` library's imagefolder: a line a picture, with the columns `file_name`
(relative to the metadata's own folder) and, by default, `text`: one caption, or in JSON a list of several.
"""

import os
from functools import partial
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from ldm.data.listing import (
    SUFFIXES,
    ListedPicture,
    Listing,
    caption_beside,
    captions_of,
    inside,
    no_column,
    other_kind,
    relative,
    stamp_of,
    walk,
    why,
)
from ldm.data.metadata import FILES, lines_of
from ldm.errors import UserError, nearest, printable
from ldm.foreign import read_plain


def list_folder(
    root: Path,
    caption_column: str = "text",
    outside: bool = False,
    conditioning_column: str = "",
    classes: bool = False,
) -> Listing:
    """List the pictures below `root`.

    In and below a folder with metadata, the pictures are those that the metadata names (one named twice, with two
    captions, counts twice); the others are left out, and counted in a note. Elsewhere every picture counts, its
    caption the text file of its name ("" without one). `caption_column` "" leaves all captions empty.
    outside: metadata may also name files that are not below `root`. conditioning_column: the metadata's column with
    the file names of control pictures, which are then no pictures themselves; "" for none. classes: `caption_column`
    holds each picture's class, which may be a whole number and is in no text file.

    Raises:
        UserError: a line that is no JSON object or no whole CSV, has no file_name or a caption that is no text, or
            names a file that is not there; no such column.
    """
    listing = Listing()
    covered, named, loose = set[Path](), set[Path](), set[Path]()
    free: dict[
        Path, int
    ] = {}  # where among the entries a picture is that no metadata of its own folder names
    for folder, names in walk(root, listing.broken):
        metadata = [name for name in FILES if name in names]
        if len(metadata) > 1:
            raise UserError(f"{folder} holds both {' and '.join(metadata)}: keep one of them")
        if metadata or folder.parent in covered:
            covered.add(folder)
        if metadata:
            columns = caption_column, conditioning_column
            named.update(_named(listing, root, folder / metadata[0], *columns, outside, classes))
        for path in (folder / name for name in names):
            if not _is_picture(listing, root, path):
                continue
            if folder in covered:
                loose.add(path)
            else:
                before = len(listing.entries)
                _beside(listing, root, path, bool(caption_column) and not classes)
                if len(listing.entries) > before:
                    free[path] = before
    again = {free[path] for path in named & free.keys()}  # by metadata of another folder
    listing.entries = [each for i, each in enumerate(listing.entries) if i not in again]
    if unlisted := len(loose - named):
        listing.notes.append(f"{root}: left out, as no line of the metadata names them: {unlisted} pictures")
    return listing


def _is_picture(listing: Listing, root: Path, path: Path) -> bool:
    """Whether a file is one by its ending; other kinds of picture are counted, links that lead nowhere named."""
    if kind := other_kind(path.name):
        listing.others[kind] += 1
    elif (
        path.is_symlink() and not os.path.exists(path) and guess_type(path.name) == (None, None)
    ):  # a folder's?
        listing.broken[relative(root, path)] = "it is a link to what is not there"
    return path.suffix.lower() in SUFFIXES


def _beside(listing: Listing, root: Path, path: Path, captioned: bool) -> None:
    """Add a picture with the caption in the text file beside it."""
    try:
        caption = caption_beside(path) if captioned else ""
    except ValueError as error:
        listing.broken[relative(root, path)] = str(error)
    else:
        _add(listing, root, path, (caption,))


def _add(
    listing: Listing, root: Path, path: Path, captions: tuple[str, ...], control: Path | None = None
) -> None:
    name = relative(root, path)
    try:
        stamp = stamp_of(path) + (f"+{stamp_of(control)}" if control else "")
        beside = partial(read_plain, control) if control else None
        listing.entries.append(ListedPicture(name, captions, stamp, partial(read_plain, path), beside))
    except OSError as error:
        listing.broken[name] = f"can't be read: {why(error)}"


def _named(
    listing: Listing,
    root: Path,
    path: Path,
    caption_column: str,
    conditioning_column: str,
    outside: bool,
    classes: bool,
) -> set[Path]:
    """Add the pictures that a metadata file names, in its order; returned are all paths that it names."""
    named, columns = set[Path](), dict[str, None]()
    for place, row in lines_of(path, listing.notes):
        columns |= dict.fromkeys(row)
        picture = _file(place, path, row, "file_name", "the line's picture", root, outside)
        named.add(picture)
        control = None
        if conditioning_column and conditioning_column in row:
            what = "the picture's control picture"
            control = _file(place, path, row, conditioning_column, what, root, outside)
            named.add(control)
        try:
            captions = captions_of(row.get(caption_column), classes) if caption_column else ("",)
        except UnicodeError as error:
            listing.broken[relative(root, picture)] = f"in {place}, its {caption_column} is {error}"
        except ValueError as error:
            raise UserError(f"{place}: {caption_column} is {error}") from None
        else:
            _add(listing, root, picture, captions, control)
    if not columns:
        listing.notes.append(f"{path} names no pictures")
    for column in filter(None, (caption_column, conditioning_column)):
        if columns and column not in columns:
            raise no_column(path, column, columns)
    return named


def _file(
    place: str, metadata: Path, row: dict[str, Any], column: str, what: str, root: Path, outside: bool
) -> Path:
    """The file that a line names in a column. Raises UserError where it names none, or one that it may not."""
    name = row.get(column)
    if not isinstance(name, str) or not name:
        odd = f"has {str(name)[:60]!r} for {column}, which is no text"
        said = odd if name else f"has no {column}{nearest(column, row)}"
        raise UserError(f"{place} {printable(said)}: it names {what}")
    path, shown = Path(os.path.normpath(metadata.parent / name)), printable(name[:200])
    if not outside and not inside(root, path):
        raise UserError(
            f"{place} names {shown}, which is outside of {root}: move it there, or allow it by outside: true"
        )
    if not os.path.lexists(path):
        raise UserError(f"{place} names {shown}, which is not there")
    return path
