"""How a run gets on: a line that is drawn over on a terminal; elsewhere a line now and then, and quiet between."""

import sys
import time
from collections.abc import Callable, Sequence

from ldm.console import say
from pipelines.batch.ledger import Record

_OFTEN, _SELDOM = 0.5, 60.0  # seconds between two lines, on a terminal and off it
_RECENT = 120.0  # seconds over which the speed is told


class Progress:
    """Counts a run's pictures, and says so on standard error, where `shown`."""

    def __init__(
        self,
        total: int,
        done: int = 0,
        failed: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        terminal: bool | None = None,
    ):
        """total: of all pictures; done, failed: of those, before now."""
        self.total, self.done, self.failed, self.shown = total, done, failed, shown
        self._clock, self._begun = clock, clock()
        self._before = done + failed
        self._marks = [(self._begun, self._before)]
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._said = self._begun

    def add(self, records: Sequence[Record]) -> None:
        """Count records that are new."""
        failed = sum(1 for record in records if record["error"])
        self.set(self.done + len(records) - failed, self.failed + failed)

    def set(self, done: int, failed: int) -> None:
        """Say how many are done and failed by now, of all processes."""
        self.done, self.failed = done, failed
        now = self._clock()
        self._marks.append((now, done + failed))
        while len(self._marks) > 2 and self._marks[1][0] < now - _RECENT:
            self._marks.pop(0)
        if self.shown and now - self._said >= (_OFTEN if self._terminal else _SELDOM):
            self._said = now
            self._say(self.line())

    @property
    def speed(self) -> float:
        """Pictures a second, lately; 0 where none is done."""
        (begun, first), (now, last) = self._marks[0], self._marks[-1]
        return (last - first) / (now - begun) if now > begun else 0.0

    def line(self) -> str:
        """Return the state in a line."""
        left = self.total - self.done - self.failed
        told = f"{self.done:,} of {self.total:,} drawn, {self.failed:,} failed, {left:,} left"
        if self.speed > 0:
            told += f"; {self.speed:.3g} pictures a second; {duration(left / self.speed)} left"
        return told

    def end(self) -> str:
        """Return what there is to say in the end, and leave the terminal's line."""
        if self.shown and self._terminal:
            self._say("")
            print("\r", end="", file=sys.stderr, flush=True)
        seconds = self._clock() - self._begun
        drawn = self.done + self.failed - self._before
        speed = f", {drawn / seconds:.3g} pictures a second" if drawn and seconds > 0 else ""
        now = (
            f"; {drawn:,} of them now, in {duration(seconds)}{speed}" if drawn else "; nothing was left to do"
        )
        return f"{self.total:,} pictures: {self.done:,} drawn, {self.failed:,} failed{now}"

    def _say(self, line: str) -> None:
        if self._terminal:
            print(f"\r{line:<100.100}", end="", file=sys.stderr, flush=True)
        else:
            say(line)


def duration(seconds: float) -> str:
    """Return a time span in words: 45 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
