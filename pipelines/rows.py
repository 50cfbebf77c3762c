"""Rows of a file for batch generation: read one by one, so that a million take no more memory than one.

A mistake in a row is that row's `error`, and reading goes on; a mistake of the whole file is a UserError.
"""

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm.errors import UserError, nearest
from pipelines.recipe import Recipe
from pipelines.row_files import HINTS, found_in, unfit

MOST_PICTURES = 10_000  # of a row
LONGEST_ID = 200  # characters

_OF_THE_RUN = tuple(each.name for each in fields(Recipe) if each.name not in HINTS)
_CALLED = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "size": "height and width",
    "mask": "mask_image",
    "lora": "loras",
    "negative": "negative_prompt",
}


@dataclass(frozen=True)
class Row:
    """A row of a file.

    number: from 0, among the file's rows; empty lines are none. line: of the file from 1, the first of those that the
    row takes; of a parquet file the row from 1. settings: by Recipe's names, `prompt` among them, not yet completed and
    of types that `Recipe.parse` checks; files stand in them as the row names them, and are not opened. id: the row's
    own, where it states one. count: how many pictures of it. error: why it can't be used, in one line, or "";
    settings then hold what could be read. A message that begins with "it is" is of the row as a whole.
    """

    number: int
    line: int
    settings: Mapping[str, Any]
    id: str | None = None
    count: int = 1
    error: str = ""


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a file, whose ending says what it is.

    `.jsonl` and `.ndjson` hold an object a line, `.csv` and `.tsv` a table whose first line names the columns,
    `.parquet` a table, anything else a prompt a line. Texts are UTF-8, with or without a byte order mark, lines end in
    any of the three ways. Raises UserError, at the first row or when it is met, for what is wrong with the file as a
    whole.
    """
    if Path(path).suffix.lower() == ".json":
        raise UserError(
            f"{path}: prompts come one a line, or as .jsonl with an object a line, not as one .json"
        )
    number = -1
    for number, (line, found) in enumerate(found_in(Path(path))):
        yield _row(number, line, found)
    if number < 0:
        raise UserError(f"{path} holds no prompt")


def place(path: str | Path, row: Row) -> str:
    """Return where a row stands, for messages: "rows.jsonl, line 7", "rows.parquet, row 7"."""
    return f"{path}, {'row' if Path(path).suffix.lower() == '.parquet' else 'line'} {row.line}"


# What a row may state


def _row(number: int, line: int, found: Mapping[str, Any] | str) -> Row:
    """Return the row of what a line states, or of why it can't be read."""
    wrong = found if isinstance(found, str) else next(filter(None, map(unfit, _texts_in(found))), "")
    if isinstance(found, str) or wrong:
        return Row(number, line, {}, error=wrong)
    settings = {name: found[name] for name in found if name in HINTS and name not in ("id", "count")}
    id, wrong_id = _id(found.get("id"))
    count, wrong_count = _count(found.get("count"))
    error = _wrong_names(found) or _wrong_prompt(found) or wrong_id or wrong_count
    return Row(number, line, settings, id, count, error)


def _texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in lists and mappings within each other."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            left += each.keys()
            left += each.values()
        elif isinstance(each, list):
            left += each


def _wrong_names(found: Mapping[str, Any]) -> str:
    for name in found:
        if name in HINTS:
            continue
        if name in _CALLED:
            return f"{name!r} is called {_CALLED[name]} in a row, as in Python"
        if name in _OF_THE_RUN:
            return f"{name!r} holds for the whole run, not for a row"
        if not name:
            return "it has a value in a column without a name: give that a name, or leave it out"
        return f"unknown key {name[:60]!r}{nearest(name[:60], HINTS)}"
    return ""


def _wrong_prompt(found: Mapping[str, Any]) -> str:
    prompt = found.get("prompt")
    if prompt is None:
        return "it has no prompt: give it one"
    if not isinstance(prompt, str):
        return f"'prompt' is {_shown(prompt)}: give a text"
    return "" if prompt.strip() else "its prompt is empty: give it one"


def _id(value: Any) -> tuple[str | None, str]:
    """Return an id, and what is wrong with it."""
    if value is None:
        return None, ""
    if type(value) not in (str, int):
        return None, f"'id' is {_shown(value)}: give a text or a whole number"
    text = str(value)
    if not text.strip():
        return None, "its id is empty: give it one, or leave it out"
    if len(text) > LONGEST_ID:
        return None, f"its id has {len(text)} characters: give one of at most {LONGEST_ID}"
    return text, ""


def _count(value: Any) -> tuple[int, str]:
    """Return how many pictures, and what is wrong with that."""
    if value is None:
        return 1, ""
    if type(value) is not int or not 1 <= value <= MOST_PICTURES:
        return 1, f"'count' is {_shown(value)}: give a whole number from 1 to {MOST_PICTURES:,}"
    return value, ""


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)[:60]} ({type(value).__name__})"
