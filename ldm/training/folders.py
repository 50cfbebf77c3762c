"""The folders a run writes to: made, and freed of what a killed process left."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from ldm.checkpoints.files import unwritable


def make_folder(folder: Path) -> None:
    """Make the folder that a run writes to. Raises UserError where it can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unwritable(folder, error) from error


def sweep(folder: Path, stem: str, idle: float = 0.0) -> None:
    """Remove what processes that were killed left of files they were writing, by the names that whole_file gives.

    stem: how the final names begin. idle: spare what was written to in the last so many seconds; 0 where nobody
    else can be writing.
    """
    for path in folder.glob(f".{stem}*.tmp"):
        with suppress(FileNotFoundError):  # another run was done with it
            if not idle or time.time() - path.stat().st_mtime > idle:
                path.unlink()
