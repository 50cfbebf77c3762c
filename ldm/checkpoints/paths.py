"""Paths as people type them: what is wrong with one, in a line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError, nearest
from ldm.foreign import one_line, plain_status


def nearby(path: Path) -> str:
    """Return ", did you mean X?" with what lies where a missing path was looked for, "" where nothing is close."""
    try:
        return nearest(path.name, [each.name for each in path.parent.iterdir()])
    except (OSError, ValueError):  # no such folder either, or one that can't be listed
        return ""


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Have what the system says of odd or forbidden paths, while it is asked about one, come as a UserError.

    A name too long and a folder without permission are OSErrors, a NUL in it is a ValueError, a `~` of nobody a
    RuntimeError.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        shown = repr(str(path))
        shown = shown if len(shown) < 200 else f"{shown[:100]}...{shown[-20:]}"
        raise UserError(f"{shown} can't be read: {reason}") from error


def must_be_file(path: Path) -> None:
    """Raise UserError unless there is a file that can be read, with more in it than a pointer of Git LFS."""
    with readable(path):
        if path.is_dir():
            raise UserError(f"{path} is a folder, where a file was expected")
        if not path.is_file():
            if path.exists():
                raise UserError(f"{path} is no regular file, but a pipe or a device, which is not read")
            raise UserError(f"{path}: no such file{nearby(path)}")
        plain_status(path)
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
    if pointer:
        raise UserError(f"{path} is only a Git LFS pointer to the weights; run `git lfs pull` for them")
