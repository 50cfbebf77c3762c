"""The manifest of a run: one parquet file, a line a picture, in the order of the rows.

`pandas.read_parquet(folder + "/metadata.parquet")` reads it, and `datasets.load_dataset(folder)` with the pictures.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import whole_file
from pipelines.batch.ledger import Record

_LINES = 1000  # a row group of the file: so many are held
# Names and types, see `docs/batch.md`. What a row that failed has none of is null.
COLUMNS = {
    "file_name": "string",
    "prompt": "string",
    "negative_prompt": "string",
    "seed": "int64",
    "width": "int32",
    "height": "int32",
    "settings": "string",
    "sha256": "string",
    "bytes": "int64",
    "id": "string",
    "index": "int32",
    "line": "int64",
    "seconds": "float32",
    "time": "timestamp",
    "device": "string",
    "notes": "string",
    "error": "string",
}


def arrow() -> Any:
    """Return the module pyarrow. Raises UserError where it isn't installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            'batches keep their manifest as parquet, which needs pyarrow: pip install "ldm-text-to-image[batch]"'
        ) from error
    return pyarrow


def write_manifest(path: Path, records: Iterator[Record], asked: Mapping[str, Any]) -> None:
    """Write it, whole or not at all. asked: what the run was begun with, kept beside. Raises UserError."""
    pyarrow = arrow()
    types = {**{name: getattr(pyarrow, kind)() for name, kind in COLUMNS.items() if kind != "timestamp"}}
    types["time"] = pyarrow.timestamp("ms", tz="UTC")
    types["seed"] = pyarrow.uint64()
    schema = pyarrow.schema([(name, types[name]) for name in COLUMNS], {"ldm-batch": json.dumps(asked)})
    # An open file: not every path can be said to pyarrow.
    with (
        whole_file(path) as temporary,
        temporary.open("wb") as file,
        pyarrow.parquet.ParquetWriter(file, schema) as writer,
    ):
        while some := [_line(record) for record in islice(records, _LINES)]:
            writer.write_table(pyarrow.Table.from_pylist(some, schema))


def _line(record: Record) -> dict[str, Any]:
    line = {name: _text(record.get(name)) for name in COLUMNS}
    return {**line, "time": datetime.fromtimestamp(record["time"], UTC)}


def _text(value: Any) -> Any:
    """A text, in which what is no Unicode (a file's name may hold it) is escaped; anything else as it is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
