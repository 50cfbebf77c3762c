"""Claims between processes, on one machine or on several that share a folder: who has one alone may do the work.

A claim ends with the process, however that ends, so that nothing has to be swept up after a kill.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import writing

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Claims:
    """Claims by number, each a lock on one byte of a file; network file systems know such locks too.

    Open one a process and file: POSIX gives up all locks that a process has on a file when it closes it once. Within a
    process they exclude nobody. Where there are no locks, every claim succeeds, and `shared` is False.
    """

    def __init__(self, path: Path):
        """path: of a file that is made if it is not there. Raises UserError."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.shared = fcntl is not None
        if self.shared:
            try:
                self.take(_PROBE)
            except OSError:
                self.shared = False
            else:
                self.leave(_PROBE)

    def close(self) -> None:
        """Give up all claims."""
        os.close(self._file)

    def take(self, number: int, beside_others: bool = False) -> bool:
        """Claim a number, from 0; returns whether it is ours now.

        beside_others: have it together with all who claim it so; two who want it alone never have it.
        """
        if not self.shared:
            return True
        kind = fcntl.LOCK_SH if beside_others else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True

    def leave(self, number: int) -> None:
        """Give up a claim."""
        if self.shared:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    @contextmanager
    def held(self, number: int) -> Iterator[bool]:
        """Claim a number for the time of the block, if it is free; gives whether it was."""
        mine = self.take(number)
        try:
            yield mine
        finally:
            if mine:
                self.leave(number)

    def require(self) -> None:
        """Raise UserError where this file system has no locks."""
        if not self.shared:
            raise UserError(
                "this folder's file system has no locks, so that only one process can write there"
            )


_PROBE = 2**40  # no claim that is meant has this number
