"""A polite end: SIGTERM and Ctrl-C are noted, and the loop stops where its state is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Give a list to which each signal adds its name, in place of what it usually does.

    Python hands signals to the main thread alone: in another one the list stays empty.
    """
    noted: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    note = lambda number, frame: noted.append(signal.Signals(number).name)  # noqa: E731
    before = {each: signal.signal(each, note) for each in _SIGNALS}
    try:
        yield noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
