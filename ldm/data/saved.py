"""A Hugging Face dataset on disk, as `Dataset.save_to_disk` writes it; read through the `datasets` package."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.listing import (
    ListedPicture,
    Listing,
    captions_of,
    inside,
    no_column,
    one_line,
    read_lines,
    stamp_of,
    why,
)
from ldm.errors import UserError
from ldm.foreign import read_plain

STATE = "state.json"
SPLITS = "dataset_dict.json"


def is_saved(path: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return (path / SPLITS).is_file() or (path / STATE).is_file()


def list_saved(
    path: Path,
    image_column: str = "image",
    caption_column: str = "text",
    outside: bool = False,
    conditioning_column: str = "",
    classes: bool = False,
) -> Listing:
    """List a dataset's rows; `caption_column` "" leaves all captions empty, and may hold lists of several.

    outside: rows may also name picture files that are not below `path`. conditioning_column: of control pictures; ""
    for none. classes: `caption_column` holds each row's class, of which a number may have a name in the dataset.

    Raises:
        UserError: the `datasets` package is missing, a damaged dataset, several splits, no such column, no pictures
            in it, a caption that is no text.
    """
    path = _one_split(path)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{path} is a Hugging Face dataset, which needs a package: pip install datasets"
        ) from None
    state = _object(path / STATE)
    _check_files(path, state.get("_data_files"))
    try:
        # A format that was set would give tensors, and hide columns.
        rows: Any = datasets.load_from_disk(str(path)).with_format(None)
        features = rows.features
    except Exception as error:  # it and pyarrow stumble over damaged files in any way
        raise UserError(f"{path} is no whole dataset: {one_line(str(error))[:200]}") from error
    for column in filter(None, (image_column, caption_column, conditioning_column)):
        if column not in features:
            raise no_column(path, column, features)
    for column in filter(None, (image_column, conditioning_column)):
        if isinstance(features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif getattr(features[column], "dtype", "") not in ("binary", "large_binary"):
            raise UserError(f"{path}: the column {column!r} holds no pictures")
    captions = _captions(path, rows, caption_column, classes) if caption_column else [("",)] * len(rows)
    stamp = f"{state.get('_fingerprint') or stamp_of(path / STATE)}{'-outside' * outside}"
    stamp += f"-{conditioning_column}" if conditioning_column else ""
    within = None if outside else path

    def entry(i: int, own: tuple[str, ...]) -> ListedPicture:
        control = partial(_bytes, rows, i, conditioning_column, within) if conditioning_column else None
        return ListedPicture(f"row {i}", own, stamp, partial(_bytes, rows, i, image_column, within), control)

    return Listing([entry(i, each) for i, each in enumerate(captions)])


def _captions(path: Path, rows: Any, column: str, classes: bool) -> list[tuple[str, ...]]:
    """Each row's captions, on one line each."""
    try:
        values = list(rows[column])
    except Exception as error:  # pyarrow stumbles over damaged files in any way
        raise UserError(
            f"{path}: the column {column!r} can't be read: {one_line(str(error))[:200]}"
        ) from error
    names = getattr(rows.features[column], "names", None) if classes else None  # of datasets.ClassLabel
    captions: list[tuple[str, ...]] = []
    for i, value in enumerate(values):
        if names and isinstance(value, int) and 0 <= value < len(names):
            value = names[value]
        try:
            captions.append(tuple(one_line(each) for each in captions_of(value, classes)))
        except ValueError as error:
            raise UserError(f"{path}, row {i}: {column} is {error}") from None
    return captions


def _one_split(path: Path) -> Path:
    if not (path / SPLITS).is_file():
        return path
    names = _object(path / SPLITS).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        raise UserError(f"{path / SPLITS} names no splits: the dataset is damaged, save it anew")
    if len(names) > 1:
        raise UserError(
            f"{path} holds several splits: give one of them ({', '.join(str(path / n) for n in names)})"
        )
    split = path / names[0]
    if not inside(path, split) or not (split / STATE).is_file():
        raise UserError(f"{path / SPLITS} names the split {names[0]}, which is no dataset in {path}")
    return split


def _check_files(path: Path, files: Any) -> None:
    """Raise UserError where a dataset's state names tables that are not in its own folder."""
    for each in files if isinstance(files, list) else ():
        name = each.get("filename") if isinstance(each, dict) else None
        if not isinstance(name, str) or not inside(path, path / name):
            raise UserError(
                f"{path / STATE} names the table {name}, which is not in {path}: save the dataset anew"
            )


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError."""
    try:
        found = json.loads(read_lines(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no JSON ({one_line(str(error))}): the dataset is damaged, save it anew"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: the dataset is damaged, save it anew")
    return found


def _bytes(rows: Any, index: int, column: str, within: Path | None) -> bytes:
    """The bytes in the row, or of the file that it names, below `within`. Raises OSError, or ValueError without any."""
    try:
        value = rows[index][column]
    except OSError:
        raise
    except Exception as error:  # pyarrow stumbles over damaged files in any way
        raise OSError(why(error)) from error
    if isinstance(value, dict):
        name = value.get("path")
        value = value.get("bytes")
        if value is None and name:
            if within and not inside(within, Path(name)):
                raise ValueError(f"it is in {name}, outside of the dataset: to allow that, set outside: true")
            return read_plain(name)
    if value is None:
        raise ValueError("the row holds no picture")
    return value
