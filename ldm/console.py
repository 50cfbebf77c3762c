"""What command lines print, and how they end: one line for every mistake, and no stream that can end the work.

A command's `main` is decorated with `command`. While it runs, both streams take any text: what is not printable is
escaped, so that nothing in a file's name or content speaks to the terminal. A stream that is closed or full is given up
instead of the work. This module imports nothing heavy: a command that imports the rest inside `main` has all of it
guarded, Ctrl-C during the imports included.
"""

import argparse
import errno
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec

from ldm.errors import UserError, printable

P = ParamSpec("P")
_LONGEST = 2000  # characters of a message; a name may be far longer
_MOVES = re.compile(r"(\n|\x1b\[A)+")  # how tqdm goes to the line of one of several bars
# The allocators' words, of C, C++, torch, CUDA and its libraries: not all of them have an error of their own for it.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can(?:'t|not) allocate memory|failed to allocate|unable to allocate"
    r"|bad[_ ]alloc|alloc_failed|can't start new thread|failed to map segment",
    re.IGNORECASE,
)


# Printing


def line(text: str) -> None:
    """Print one line of a command's result, such as a file's name, on standard output."""
    print(printable(text), flush=True)


def say(text: str) -> None:
    """Print one line on standard error, its middle left out where it is very long."""
    text = printable(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 400]} ... {text[-390:]}"
    print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print what the user should know, on standard error."""
    say(f"note: {text}")


class Parser(argparse.ArgumentParser):
    """Arguments whose mistakes cost one line, like all others."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.color = False  # of Python 3.14: codes that the guarded streams would escape

    def error(self, message: str) -> NoReturn:
        say(f"error: {message} (see --help)")
        sys.exit(2)


# Running


def command(
    stopped: str = "stopped; what is written is whole",
    memory: str = "close other programs, or take a smaller model",
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate a command's `main`, which returns its exit status.

    A UserError, a fault of the system (a full disk, no permission) and a lack of memory become one line and status 2,
    Ctrl-C one line and 130. Any other exception is a bug of ours, and passes.

    stopped: the line for Ctrl-C. memory: what to do where memory is short.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def guarded(*arguments: P.args, **named: P.kwargs) -> int:
            with _guarded_streams():
                try:
                    return main(*arguments, **named)
                except KeyboardInterrupt as error:
                    status, message = 130, str(error) or stopped
                except Exception as error:
                    found = _message(error, memory)
                    if found is None:
                        raise
                    status, message = 2, f"error: {found}"
                # Only now, when the error's frames have let go of what they held: printing takes memory too.
                say(message)
                return status

        return guarded

    return decorate


def _message(error: Exception, memory: str) -> str | None:
    """What to tell the user of an error; None for a bug."""
    short = out_of_memory(error)
    if isinstance(
        error, UserError
    ):  # a file that is called damaged may only have been too large for this machine
        return f"{error} (out of memory)" if short and "memory" not in str(error) else str(error)
    if short:
        return f"out of memory: {memory}"
    if isinstance(error, OSError) and error.errno:
        names = [
            os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, str | bytes)
        ]
        return f"{' and '.join(names) or 'the system says'}: {error.strerror}"
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, is a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, UserError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False


# Streams


class _Stream:
    """A text stream that takes any text, and that is given up, not raised from, where it can take no more."""

    def __init__(self, stream: Any, failed: Callable[[Exception], None] = lambda error: None):
        self._stream, self._failed, self._lost = stream, failed, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, _shown(text, self._stream.encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for each in lines:
            self.write(each)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., Any], *arguments: Any) -> None:
        if self._lost:
            return
        try:
            act(*arguments)
        except (OSError, ValueError) as error:  # a ValueError: it is closed
            self._lost = True
            try:  # what it still holds is written when Python ends: that must not fail either
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            except (OSError, ValueError):
                pass  # no stream of the system's
            self._failed(error)


def _shown(text: str, encoding: str | None) -> str:
    """Text as a terminal may have it: line ends, tabs and a progress bar's own moves stay, all else is escaped."""
    if _MOVES.fullmatch(text):
        return text
    back = "\r" if text.startswith("\r") else ""  # so a bar draws over what it drew before
    pieces = re.split(r"([\n\t])", text[len(back) :])
    return back + "".join(each if each in ("\n", "\t") else printable(each, encoding) for each in pieces)


@contextmanager
def _guarded_streams() -> Iterator[None]:
    """Guard standard output and standard error; within another command they are guarded already."""
    if isinstance(sys.stdout, _Stream):
        yield
        return
    _hold_closed_numbers()
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    shown = warnings.showwarning
    null: Any = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    own: tuple[Any, Any] = _Stream(before[0] or null, _output_lost), _Stream(before[1] or null)
    sys.stdout, sys.stderr = own
    warnings.showwarning = _warn
    try:
        yield
    finally:
        for stream in own:
            stream.flush()
        sys.stdout, sys.stderr = before
        warnings.showwarning = shown
        null.close()


def _output_lost(error: Exception) -> None:
    if isinstance(error, BrokenPipeError):  # `| head`: nobody reads on, which is meant
        return
    note(
        f"standard output takes no more ({getattr(error, 'strerror', None) or error}): nothing more is printed there"
    )


def _warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning in one line; which line of which module it came from helps no user."""
    say(f"warning: {message}")


def _hold_closed_numbers() -> None:
    """Where a standard stream came closed, take its number, which the next file to be opened would get.

    What a library prints by number would go into that file.
    """
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
