"""Files and texts that strangers made, read: regular files of sane size, JSON, and whatever a reader may raise.

Nothing that such a file holds may end in more than one line, nor take more time or memory than its size is worth. All
that is read from outside goes through here or, for pictures, through `ldm.pictures`.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import UserError

LARGEST = 2**30  # bytes of a file that is read into memory
LARGEST_TEXT = 2**25  # of one that is parsed: tokenizers of many languages have half of that
DEEPEST = 100  # levels of brackets within brackets
LONGEST_NUMBER = 250  # characters, also of a hexadecimal one: what is longer is no float
_HOLE = 2**24  # bytes from which on a file must not be mostly hole


def plain_status(path: str | Path) -> os.stat_result:
    """Return what the system says of a regular file.

    Raises OSError for what is none: a pipe, a device, a link to nothing.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise FileNotFoundError("it is a link to what is not there") from None
        raise
    except ValueError as error:  # a NUL, or half a surrogate pair, is in no file's name
        raise OSError(f"there is no file of such a name ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no regular file")
    on_disk = getattr(status, "st_blocks", 0) * 512  # 0 where the system doesn't say
    if status.st_size > _HOLE and 0 < on_disk < status.st_size // 16:
        raise OSError(
            f"of its {status.st_size:,} bytes {on_disk:,} are on the disk: a download that was not finished"
        )
    return status


def read_plain(path: str | Path, most: int = LARGEST) -> bytes:
    """Return the bytes of a regular file. Raises OSError for what is none, or for more than `most` bytes."""
    size = plain_status(path).st_size
    if size > most:
        raise OSError(f"its {size:,} bytes are more than the {most:,} that are read")
    if not size:  # so say files of /proc, some of which are waited for without end
        return b""
    with open(path, "rb") as file:
        return file.read(size)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, "" where it has none."""
    return (str(error).strip().splitlines() or [""])[0][:200]


@contextmanager
def foreign(where: object, complaint: str = "can't be read", advice: str = "") -> Iterator[None]:
    """Have whatever a reader raises about what stands in a file come as a UserError that names `where`.

    Readers of formats raise errors of any kind about bytes that nobody thought of (struct.error, zlib.error,
    AssertionError, RecursionError, OverflowError, MemoryError); all mean the same to who gave the file. Only reading
    belongs into the block, none of our own work.
    """
    try:
        yield
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{where} {complaint}: it is nested too deeply{advice}") from error
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise UserError(f"{where} {complaint}: {reason}{advice}") from error


def parse_json(text: str | bytes, where: object) -> Any:
    """Return what a JSON text holds; NaN and infinities are read, as Python's and diffusers' writers write them.

    Raises UserError that names `where`: no JSON, nested deeper than DEEPEST, or a whole number that no float holds.
    """
    with foreign(where, "is not valid JSON"):
        found = json.loads(text, parse_int=_whole_number)
        check_depth(found)
    return found


def json_object(text: str | bytes, where: object) -> dict[str, Any]:
    """Return the object that a JSON text holds. Raises UserError as `parse_json` does, and for anything else."""
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise UserError(
            f"{where} holds a {type(found).__name__}, where an object with named entries was expected"
        )
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def check_depth(value: Any) -> None:
    """Raise ValueError for lists and mappings nested deeper than DEEPEST: what walks them later would break."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")
