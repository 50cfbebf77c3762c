"""Files of rows, read: lines of text, JSON, CSV and parquet, to what each row states, or to why it can't be read."""

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ldm.config.kinds import field_hints, members_of
from ldm.errors import UserError
from ldm.foreign import foreign, parse_json, plain_status
from pipelines.recipe import PER_IMAGE, SETTINGS, Recipe

LONGEST = 2**20  # characters of a line, of a row of a table, and of a text in one
_CHUNK = 2**16  # bytes, or characters, that are read at once
_BATCH = 256  # rows of a parquet file that are decoded at once
_EXACT = 2**53  # from here on floats skip whole numbers
_UNFIT = re.compile(
    "[\0\ud800-\udfff]"
)  # what is in no text: NUL, and what stands for bytes that are no UTF-8
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")  # the column of a table's index, which pandas adds
_TOO_LONG = f"it is longer than {LONGEST:,} characters"

_SETTINGS = {*PER_IMAGE, *SETTINGS} - {"beside"}
# What a row may state, and of which type: settings of a picture, and what is of the row itself.
HINTS: dict[str, Any] = {
    **{name: hint for name, hint in field_hints(Recipe).items() if name in _SETTINGS},
    "id": str | int,
    "count": int,
}

Found = tuple[int, Mapping[str, Any] | str]  # a line, and what it states or why that can't be read


def found_in(path: Path) -> Iterator[Found]:
    """Yield what a file's rows state, by the kind that its ending names. Raises UserError when that is met."""
    return _READERS.get(path.suffix.lower(), _prompts)(path)


def unfit(text: str) -> str:
    """Return what is wrong with the characters of a text, or ""."""
    if len(text) > LONGEST:
        return _TOO_LONG
    if not (match := _UNFIT.search(text)):
        return ""
    if match[0] == "\0":
        return "it holds a NUL character: take that out"
    return "it is not valid UTF-8 text: save the file as UTF-8"


# Lines of text


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Yield a text's lines without their ends, numbered from 1; None for one over LONGEST, which isn't held.

    Bytes that are no UTF-8 come as lone surrogates, see `unfit`. Raises UserError.
    """
    try:
        if not plain_status(path).st_size:
            return
        with open(path, "rb") as file:
            head = file.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(0) >= (2 if len(head) == 4 else 1):
            raise UserError(f"{path} is text as UTF-16 or UTF-32: save it as UTF-8")
        number = 0
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                whole = line.endswith("\n") or len(line) <= LONGEST
                yield number, line.removesuffix("\n") if whole else None
                while not whole:
                    line = file.readline(_CHUNK)
                    whole = not line or line.endswith("\n")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


def _prompts(path: Path) -> Iterator[Found]:
    """Yield a prompt a line, without the spaces around it."""
    for number, line in _lines(path):
        if line is None:
            yield number, _TOO_LONG
        elif text := line.strip():
            yield number, {"prompt": text}


def _objects(path: Path) -> Iterator[Found]:
    """Yield a JSON object a line."""
    for number, line in _lines(path):
        if line is None:
            yield number, _TOO_LONG
        elif line.strip():
            yield number, unfit(line) or _object(line)


def _object(line: str) -> Mapping[str, Any] | str:
    try:
        found = parse_json(line, "it")
    except UserError as error:
        return str(error)
    return found if isinstance(found, dict) else 'expected an object such as {"prompt": "a fox", "seed": 1}'


# Tables


class _Feed:
    """A file's lines for a reader of CSV, which takes several for a row: `line` is the first of these.

    Set `fresh` before each row. Raises UserError for a row over LONGEST: a quote that nothing closes would take all
    that follows for one cell.
    """

    def __init__(self, path: Path):
        self._path, self._lines = path, _lines(path)
        self.fresh, self.ended, self.line, self._size = True, False, 0, 0

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        number, text = next(self._lines, (0, ""))
        if not number:
            self.ended = True
            raise StopIteration
        if self.fresh:
            self.fresh, self.line, self._size = False, number, 0
        self._size += len(text or "") + 1
        if text is None or self._size > LONGEST + 1:
            raise UserError(
                f"{self._path}, line {self.line}: a row of more than {LONGEST:,} characters begins here: is there a "
                'quote (") that is not closed?'
            )
        return text + "\n"


def _next(reader: Iterator[list[str]]) -> list[str]:
    """Return the next row, whose cells may be as long as a row; the limit is the whole process's, so it is put back."""
    limit = csv.field_size_limit(LONGEST + 1)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(limit)


def _cells(path: Path, delimiter: str) -> Iterator[Found]:
    """Yield the rows of a CSV file, of which those without any value are passed over. Raises UserError."""
    feed, names = _Feed(path), None
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.fresh = True
        try:
            cells = _next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if feed.ended:
                raise UserError(
                    f'{path}, line {feed.line}: a quote (") that begins in this row is never closed'
                ) from error
            if names is None:
                raise UserError(f"{path}: its columns' names can't be read: {error}") from error
            yield feed.line, f"it is not valid CSV: {error}"
            continue
        if not any(map(str.strip, cells)):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            _check_columns(path, names)
        elif len(cells) > len(names):
            yield (
                feed.line,
                f"it has {len(cells)} cells for {len(names)} columns: put a text that holds {delimiter!r} in quotes",
            )
        else:
            pairs = zip(names, cells, strict=False)
            yield feed.line, _stated((name, _cell(name, cell)) for name, cell in pairs)


def _cell(name: str, cell: str) -> Any:
    """Return the value of a cell: a text where the setting is one, else JSON, else (for messages) the text."""
    text = cell.strip()
    if not text:
        return None
    if _is_text(name):
        return cell
    if text.lower() in ("true", "false"):  # as Python and spreadsheets write them too
        return text.lower() == "true"
    try:
        return parse_json(text, name)
    except UserError:
        return cell


@cache
def _is_text(name: str) -> bool:
    """Whether a cell of this column is a text: it is one of several words, a file's name, or any."""
    members = members_of(HINTS.get(name, str))
    return any(each is str or get_origin(each) is Literal or is_dataclass(each) for each in members)


def _table(path: Path) -> Iterator[Found]:
    """Yield the rows of a parquet file, decoded few at a time. Raises UserError, also where it is damaged midway."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f'{path} is read by pyarrow: pip install "ldm-text-to-image[batch]", or give rows as .jsonl or .csv'
        ) from error
    line = 0
    try:
        plain_status(path)
        with open(path, "rb") as file:
            with foreign(path, "is no parquet file that can be read"):
                whole = parquet.ParquetFile(
                    file, buffer_size=_CHUNK, pre_buffer=False, page_checksum_verification=True
                )
                names = list(whole.schema_arrow.names)
            _check_columns(path, names)
            batches: Iterator[Any] = whole.iter_batches(_BATCH, use_threads=False)
            while True:
                with foreign(path, f"is damaged after row {line}"):
                    batch = next(batches, None)
                if batch is None:
                    return
                for found in _python(batch):
                    line += 1
                    yield line, found
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


def _python(batch: Any) -> Iterator[Mapping[str, Any] | str]:
    """Yield the rows of a pyarrow.RecordBatch: of one whose values Python can't hold, such as no UTF-8, why."""
    rows = list[Any]()
    with suppress(Exception):  # whatever it is, it is raised again below: by the row that is at fault
        rows = batch.to_pylist()
    for k in range(batch.num_rows):
        try:
            with foreign("it", "can't be read"):
                row = rows[k] if rows else batch.slice(k, 1).to_pylist()[0]
                plain = [(name, _plain(row[name])) for name in row if not _PANDAS_INDEX.fullmatch(name)]
            yield _stated(plain)
        except UserError as error:
            yield str(error)


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Raise UserError for columns of which no row could be made."""
    if wrong := next(filter(None, map(unfit, names)), ""):
        raise UserError(f"{path}: a column's name can't be read: {wrong}")
    if twice := [name for name, times in Counter(filter(None, names)).items() if times > 1]:
        raise UserError(f"{path} has the column {twice[0][:60]!r} twice: leave one out")
    if "prompt" not in names:
        shown = ", ".join(names)
        raise UserError(f"{path} has no column named prompt: what it has is {shown[:100]!r}")


def _stated(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return what a table's row states, whole floats as the ints that they should be; null and NaN state nothing."""
    given = ((name, value) for name, value in pairs if not (value is None or value != value))
    return {name: _fitted(value, HINTS.get(name)) for name, value in given}


def _fitted(value: Any, hint: Any) -> Any:
    """Return the value with whole floats as ints where the type asks for these: tables of numbers have gaps as NaN."""
    if isinstance(value, str | int):
        return value
    members = members_of(hint)
    if isinstance(value, float) and int in members and float not in members:
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if isinstance(value, list):
        args = next((get_args(each) for each in members if get_origin(each) is tuple), ())
        types = args[:1] * len(value) if args[1:] == (...,) else args
        return list(map(_fitted, value, types)) if len(types) == len(value) else value
    if isinstance(value, Mapping):
        hints = next((field_hints(each) for each in members if is_dataclass(each)), {})
        return {name: _fitted(each, hints.get(name)) for name, each in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Return a value of pyarrow's as JSON might hold it; what is null in a struct is left out.

    Raises UnicodeDecodeError.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):  # texts, of writers that don't say so
        return value.decode()
    if isinstance(value, list):
        pairs = bool(value) and all(isinstance(each, tuple) for each in value)  # of a map
        return _plain({str(name): each for name, each in value}) if pairs else list(map(_plain, value))
    if isinstance(value, Mapping):
        plain = ((str(name), _plain(each)) for name, each in value.items() if each is not None)
        return {name: each for name, each in plain if not (isinstance(each, float) and math.isnan(each))}
    return str(value)


_READERS: Mapping[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _objects,
    ".ndjson": _objects,
    ".csv": partial(_cells, delimiter=","),
    ".tsv": partial(_cells, delimiter="\t"),
    ".parquet": _table,
}
