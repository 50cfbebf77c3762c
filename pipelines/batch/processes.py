"""Other processes of this machine that take part in a run: each loads the model and draws what it can claim."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from ldm.console import note, say
from ldm.errors import UserError
from pipelines.batch.setup import Setup
from pipelines.batch.work import Work, draw_open

_DEATHS = 3  # of a helper that is started again


class Helpers:
    """`count` processes, from the block's beginning to its end. They end with this one, however it ends."""

    def __init__(self, setup: Setup, count: int):
        self._setup, self._context = setup, multiprocessing.get_context("spawn")
        self._deaths = [0] * count
        self._running: list[BaseProcess | None] = [None] * count

    def __enter__(self) -> "Helpers":
        for k in range(len(self._running)):
            self._start(k)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._running:
            if each is None:
                continue
            if kind is not None:
                each.kill()
            each.join()

    def mend(self) -> None:
        """Start a process again that was killed; one that ended with an error has said so, and stays away."""
        for k, each in enumerate(self._running):
            if each is None or each.exitcode is None or each.exitcode >= 0:
                continue
            self._deaths[k] += 1
            if self._deaths[k] > _DEATHS:
                note(
                    f"a process was killed {_DEATHS + 1} times (is memory short?): the others go on without it"
                )
                self._running[k] = None
            else:
                self._start(k)

    def _start(self, k: int) -> None:
        process = self._context.Process(target=_help, args=(self._setup, k + 1), daemon=True)
        process.start()
        self._running[k] = process


def _help(setup: Setup, place: int) -> None:
    """Take part in a run that has begun, as process number `place`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to hear
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = Work.joined(setup, place)
        draw_open(work, work.ledger)
    except UserError as error:
        say(f"error: {error}")
        os._exit(2)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
