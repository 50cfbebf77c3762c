"""A folder of pictures with captions: `metadata.jsonl` or `metadata.csv`, or a `.txt` beside each picture.

The metadata is that of the `datasets` library's imagefolder: a line a picture, with the columns `file_name`
(relative to the metadata's own folder) and, by default, `text`.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.data.listing import SUFFIXES, Entry, Listing, no_column, read_lines, stamp_of
from ldm.errors import UserError, nearest

METADATA = ("metadata.jsonl", "metadata.csv")


def list_folder(root: Path, caption_column: str = "text") -> Listing:
    """List the pictures below `root`.

    In and below a folder with metadata, the pictures are those that the metadata names (one named twice, with two
    captions, counts twice); the others are left out, and counted in a note. Elsewhere every picture counts, its
    caption the text file of its name ("" without one). `caption_column` "" leaves all captions empty.

    Raises:
        UserError: a line that is no JSON object, has no file_name or names a file that is not there; no such column.
    """
    listing = Listing()
    covered, named, loose = set[Path](), set[Path](), set[Path]()
    for folder, names in _walk(root):
        metadata = [name for name in METADATA if name in names]
        if len(metadata) > 1:
            raise UserError(f"{folder} holds both {' and '.join(metadata)}: keep one of them")
        if metadata or folder.parent in covered:
            covered.add(folder)
        for path, caption in _rows(folder / metadata[0], caption_column) if metadata else ():
            named.add(path)
            listing.entries.append(_entry(root, path, caption))
        for name in names:
            if Path(name).suffix.lower() not in SUFFIXES:
                continue
            if folder in covered:
                loose.add(folder / name)
            else:
                caption = _beside(folder / name) if caption_column else ""
                listing.entries.append(_entry(root, folder / name, caption))
    if unlisted := len(loose - named):
        listing.notes.append(f"{root}: left out, as no line of the metadata names them: {unlisted} pictures")
    return listing


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder with its files, sorted; hidden ones left out, links to folders followed unless they lead back."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _entry(root: Path, path: Path, caption: str) -> Entry:
    return Entry(Path(os.path.relpath(path, root)).as_posix(), caption, stamp_of(path), path.read_bytes)


def _beside(picture: Path) -> str:
    """The caption in the text file beside a picture, on one line."""
    path = picture.with_suffix(".txt")
    return " ".join(read_lines(path).split()) if path.is_file() else ""


def _rows(path: Path, caption_column: str) -> Iterator[tuple[Path, str]]:
    """Pictures and captions that a metadata file names, in its order."""
    columns: dict[str, None] = {}
    captioned = False
    for place, row in _lines(path):
        columns |= dict.fromkeys(row)
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise UserError(
                f"{place} has no file_name{nearest('file_name', row)}: it names the line's picture"
            )
        picture = path.parent / file_name
        if not picture.is_file():
            raise UserError(f"{place} names {file_name}, which is not there")
        captioned |= caption_column in row
        caption = row.get(caption_column) or ""
        if not isinstance(caption, str):
            raise UserError(f"{place}: {caption_column} is {caption!r}, which is no text")
        yield picture, caption.strip()
    if columns and caption_column and not captioned:
        raise no_column(path, caption_column, columns)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a metadata file as a mapping, and what to call the line."""
    text = read_lines(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f'{place} is no JSON object: write {{"file_name": ..., "text": ...}}')
        yield place, row
