"""A Hugging Face dataset on disk, as `Dataset.save_to_disk` writes it; read through the `datasets` package."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.listing import Entry, Listing, no_column, read_lines, stamp_of
from ldm.errors import UserError

STATE = "state.json"
SPLITS = "dataset_dict.json"


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / SPLITS).is_file() or (path / STATE).is_file()


def list_saved(path: Path, image_column: str = "image", caption_column: str = "text") -> Listing:
    """List a dataset's rows; `caption_column` "" leaves all captions empty.

    Raises:
        UserError: the `datasets` package is missing, several splits, no such column, no pictures in it.
    """
    path = _one_split(path)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{path} is a Hugging Face dataset, which needs a package: pip install datasets"
        ) from None
    try:
        rows: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no whole dataset: {' '.join(str(error).split())[:200]}") from error
    for column in filter(None, (image_column, caption_column)):
        if column not in rows.features:
            raise no_column(path, column, rows.features)
    if isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    elif getattr(rows.features[image_column], "dtype", "") not in ("binary", "large_binary"):
        raise UserError(f"{path}: the column {image_column!r} holds no pictures")
    captions = list(rows[caption_column]) if caption_column else [""] * len(rows)
    fingerprint = json.loads(read_lines(path / STATE)).get("_fingerprint") or stamp_of(path / STATE)
    entries = [
        Entry(
            f"row {i}",
            " ".join(str(caption or "").split()),
            fingerprint,
            partial(_bytes, rows, i, image_column),
        )
        for i, caption in enumerate(captions)
    ]
    return Listing(entries)


def _one_split(path: Path) -> Path:
    if not (path / SPLITS).is_file():
        return path
    names: list[str] = json.loads(read_lines(path / SPLITS)).get("splits", [])
    if len(names) == 1:
        return path / names[0]
    raise UserError(
        f"{path} holds several splits: give one of them ({', '.join(str(path / n) for n in names)})"
    )


def _bytes(rows: Any, index: int, column: str) -> bytes:
    """The bytes in the row, or of the file that it names."""
    value = rows[index][column]
    if isinstance(value, dict):
        value = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    return value or b""
