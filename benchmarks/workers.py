"""Contenders in processes of their own, which take turns: one that raises or dies is reported, and the rest goes on.

A contender's memory goes with its process. While one works the others wait, so a machine that slows down slows all.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# Does a round's work, given the round's number, and returns the seconds that it took and what came out.
Work = Callable[[int], tuple[float, Any]]
# What a process makes its work of; runs in that process, so it and what it is given can be pickled.
Build = Callable[..., tuple[Work, dict[str, Any]]]


class FailedError(Exception):
    """A contender that can't go on, and why, in a line."""


class Runner(Protocol):
    """A contender that is ready. facts: what is known of it, such as its precision."""

    facts: dict[str, Any]

    def once(self, turn: int) -> tuple[float, Any]:
        """Do a round's work; return its seconds and what came out, of the first call alone. Raises FailedError."""
        ...

    def close(self) -> None: ...


@dataclass
class Figures:
    """What was measured of a contender. seconds: of each round. output: the first call's. failed: why it ended."""

    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    output: Any = None
    failed: str | None = None


class Worker:
    """A process that has built its work and does it when it is asked to."""

    def __init__(self, build: Build, *given: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, given), daemon=True)
        self._process.start()
        theirs.close()  # else its end would never be noticed
        self.facts: dict[str, Any] = self._answer()

    def once(self, turn: int) -> tuple[float, Any]:
        return self.ask(turn)

    def ask(self, what: Any) -> Any:
        try:
            self._connection.send(what)
        except OSError:
            raise FailedError(self._end()) from None
        return self._answer()

    def close(self) -> None:
        self._connection.close()  # its `recv` ends, and so does it
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            raise FailedError(self._end()) from None
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if kind == "failed":
            self.close()
            raise FailedError(answer)
        return answer

    def _end(self) -> str:
        self.close()
        return ending(self._process.exitcode or 0)


def ending(code: int) -> str:
    """Say in a line how a process ended that had this exit code."""
    if code >= 0:
        return f"its process ended with status {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"its process died of {names.get(-code, f'signal {-code}')}"


def reason(error: BaseException) -> str:
    """Say in a line what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _serve(connection: Any, build: Build, given: Sequence[Any]) -> None:
    try:
        work, facts = build(*given)
        connection.send(("ready", facts))
        first = True
        while True:
            turn = connection.recv()
            seconds, output = work(turn)
            connection.send(("done", (seconds, output if first else None)))
            first = False
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # nobody asks any more
    except Exception as error:
        traceback.print_exc(limit=-3)
        connection.send(("failed", reason(error)))


# In turns


def in_turns(
    makers: Mapping[str, Callable[[], Runner]], rounds: int, apart: bool = False
) -> dict[str, Figures]:
    """Let each warm up by one call that doesn't count, then all take turns, every other round backwards.

    apart: where memory does not hold all at once, each is loaded twice, first forwards and then backwards, and does
    half of the rounds each time.
    """
    figures = {name: Figures() for name in makers}
    if not apart:
        _visits(makers, figures, range(rounds))
        return figures
    half = (rounds + 1) // 2
    for name in makers:
        _visits({name: makers[name]}, figures, range(half))
    for name in reversed(makers) if rounds > half else ():
        if not figures[name].failed:
            _visits({name: makers[name]}, figures, range(half, rounds))
    return figures


def _visits(
    makers: Mapping[str, Callable[[], Runner]], figures: Mapping[str, Figures], turns: Sequence[int]
) -> None:
    runners: dict[str, Runner] = {}

    def attempt(name: str, turn: int | None) -> None:
        own = figures[name]
        try:
            if turn is None:
                runners[name] = makers[name]()
                own.facts |= runners[name].facts
                _, output = runners[name].once(0)
                own.output = output if own.output is None else own.output
            elif name in runners:
                own.seconds.append(runners[name].once(turn + 1)[0])
        except FailedError as error:
            own.failed = str(error)
            runners.pop(name, None)

    try:
        for name in makers:
            attempt(name, None)
        for turn in turns:
            for name in list(makers) if turn % 2 == 0 else list(makers)[::-1]:
                attempt(name, turn)
        for name, runner in runners.items():
            figures[name].facts |= runner.facts
    finally:
        for runner in runners.values():
            runner.close()
