"""A folder of pictures with captions: `metadata.jsonl` or `metadata.csv`, or a `.txt` beside each picture.

The metadata is that of the `datasets` library's imagefolder: a line a picture, with the columns `file_name`
(relative to the metadata's own folder) and, by default, `text`: one caption, or in JSON a list of several.
"""

import os
from functools import partial
from mimetypes import guess_type
from pathlib import Path

from ldm.data.listing import (
    SUFFIXES,
    Entry,
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


def list_folder(root: Path, caption_column: str = "text", outside: bool = False) -> Listing:
    """List the pictures below `root`.

    In and below a folder with metadata, the pictures are those that the metadata names (one named twice, with two
    captions, counts twice); the others are left out, and counted in a note. Elsewhere every picture counts, its
    caption the text file of its name ("" without one). `caption_column` "" leaves all captions empty.
    outside: metadata may also name files that are not below `root`.

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
            named.update(_named(listing, root, folder / metadata[0], caption_column, outside))
        for path in (folder / name for name in names):
            if not _is_picture(listing, root, path):
                continue
            if folder in covered:
                loose.add(path)
            else:
                before = len(listing.entries)
                _beside(listing, root, path, bool(caption_column))
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


def _add(listing: Listing, root: Path, path: Path, captions: tuple[str, ...]) -> None:
    name = relative(root, path)
    try:
        listing.entries.append(Entry(name, captions, stamp_of(path), partial(read_plain, path)))
    except OSError as error:
        listing.broken[name] = f"can't be read: {why(error)}"


def _named(listing: Listing, root: Path, path: Path, caption_column: str, outside: bool) -> set[Path]:
    """Add the pictures that a metadata file names, in its order; returned are their paths."""
    named, columns = set[Path](), dict[str, None]()
    for place, row in lines_of(path, listing.notes):
        columns |= dict.fromkeys(row)
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            odd = f"has {str(file_name)[:60]!r} for file_name, which is no text"
            said = odd if file_name else f"has no file_name{nearest('file_name', row)}"
            raise UserError(f"{place} {printable(said)}: it names the line's picture")
        picture, shown = Path(os.path.normpath(path.parent / file_name)), printable(file_name[:200])
        if not outside and not inside(root, picture):
            raise UserError(
                f"{place} names {shown}, which is outside of {root}: move it there, or allow it by outside: "
                "true"
            )
        if not os.path.lexists(picture):
            raise UserError(f"{place} names {shown}, which is not there")
        named.add(picture)
        try:
            captions = captions_of(row.get(caption_column)) if caption_column else ("",)
        except UnicodeError as error:
            listing.broken[relative(root, picture)] = f"in {place}, its {caption_column} is {error}"
        except ValueError as error:
            raise UserError(f"{place}: {caption_column} is {error}") from None
        else:
            _add(listing, root, picture, captions)
    if not columns:
        listing.notes.append(f"{path} names no pictures")
    elif caption_column and caption_column not in columns:
        raise no_column(path, caption_column, columns)
    return named
