"""Turns: threads use one pipeline one after the other, and a forked process finds it whole."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldm.errors import UserError


class Turns:
    """A lock that knows who holds it, and in which process it was made."""

    def __init__(self) -> None:
        self._lock, self._holder, self._process = threading.Lock(), 0, os.getpid()

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Have the pipeline, which lies on `device`, to oneself.

        Raises UserError where the thread would wait for itself, and in a forked process that can't use it.
        """
        if self._process != os.getpid():
            self._adopt(device)
        if self._holder == threading.get_ident():
            raise UserError("a callback can't use the pipeline that called it: it is busy with that call")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0

    @contextmanager
    def look(self, device: torch.device) -> Iterator[None]:
        """A turn for what changes nothing: a callback may take it within the call that it watches."""
        if self._process == os.getpid() and self._holder == threading.get_ident():
            yield
            return
        with self.turn(device):
            yield

    def _adopt(self, device: torch.device) -> None:
        """Make this forked process, which has a copy of all memory but only one of the threads, the pipeline's own."""
        if device.type != "cpu":
            raise UserError(
                f"a pipeline on {device} can't be used in a forked process: load it there, or start processes by "
                "'spawn'"
            )
        if self._lock.locked():
            raise UserError(
                "this process was forked while its pipeline was busy, whose work is half done here: load it again"
            )
        # OpenMP waits for ever for the threads that it had before the fork; torch's own DataLoader does the same.
        torch.set_num_threads(1)
        self._process = os.getpid()
