"""The folders a run writes to: made, and held by one run at a time."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError
from ldm.files import try_lock, writing


def make_folder(folder: Path) -> None:
    """Make the folder that a run writes to. Raises UserError where it can't be written to."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            # Of a file system that is mounted for reading, the system says another thing than of permissions.
            number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number))


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this run; another, also in this process, is refused meanwhile. Gives False where none can be.

    It is the folder itself that is locked: nothing is written for it, and the lock ends with the process. Some network
    file systems can't.

    Raises:
        UserError: another run holds it.
    """
    try:
        lock = try_lock(folder.resolve())
    except OSError:
        yield False
        return
    if lock is None:
        raise UserError(
            f"another training writes to {folder}: wait for its end, stop it, or give this one another output"
        )
    try:
        yield True
    finally:
        os.close(lock)
