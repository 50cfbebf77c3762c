"""The lines of a folder's `metadata.jsonl` or `metadata.csv`; what is wrong with one is named with its line."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.data.listing import read_lines
from ldm.errors import UserError

FILES = ("metadata.jsonl", "metadata.csv")


def lines_of(path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line as a mapping, and what to call the line. notes: takes up what is passed over.

    Raises UserError.
    """
    text = read_lines(path)
    yield from _csv(path, text, notes) if path.suffix == ".csv" else _json(path, text)


def _json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except RecursionError:
            raise UserError(f"{place} is no JSON that can be read (nested too deeply)") from None
        except ValueError as error:
            array = ", of one array: write an object a line" if text.lstrip().startswith("[") else ""
            raise UserError(f"{place} is no JSON ({error}){array}") from None
        if not isinstance(row, dict):
            raise UserError(f'{place} is no JSON object: write {{"file_name": ..., "text": ...}}, one a line')
        yield place, row


def _csv(path: Path, text: str, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    header: list[str] = []
    for place, cells in _cells(path, text):
        if not header:
            header = _header(place, cells, notes)
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{place} has {len(cells)} cells, where the header has {len(header)}: a caption with commas goes in "
                'double quotes, "a cat, asleep"'
            )
        yield place, {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _header(place: str, cells: list[str], notes: list[str]) -> list[str]:
    """The columns' names, "" for those without one, as of an index that pandas wrote."""
    names = [each.strip() for each in cells]
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and mark in names[0]:
            raise UserError(f"{place}: its cells are parted by {called}, save it with commas")
    doubled = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if doubled:
        raise UserError(f"{place} has two columns {doubled[0]!r}: keep one of them")
    if "" in names:
        notes.append(f"{place}: passed over, as they have no name: {names.count('')} columns")
    return names


def _cells(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not empty, and what to call each: it may go on over several lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{place} is no CSV ({error}): does a quote there open and not close?") from None
        if any("\0" in each for each in cells):
            raise UserError(f"{place} holds a NUL byte: save the file anew as UTF-8 text")
        if any(each.strip() for each in cells):
            yield place, cells
