"""A polite end: SIGTERM, SIGHUP and Ctrl-C are noted, and the loop stops where its state is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_LOST = ("SIGTERM", "SIGHUP")  # what a launcher and a terminal that closes send; Windows has no SIGHUP


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Give a list to which each signal adds its name, in place of what it usually does.

    What was told to be ignored, as nohup tells of SIGHUP, stays so. Python hands signals to the main thread alone: in
    another one the list stays empty.
    """
    noted: list[str] = []
    with _handled(("SIGINT", *_LOST), lambda number, frame: noted.append(signal.Signals(number).name)):
        yield noted


@contextmanager
def raised_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does, by an exception: what it had begun is cleared away."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    with _handled(_LOST, end):
        yield


@contextmanager
def _handled(names: tuple[str, ...], handler: Any) -> Iterator[None]:
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
