"""Contenders' work that goes wrong, for processes that begin without torch."""

import os
import signal
from collections.abc import Callable
from typing import Any


def behaving(how: str) -> tuple[Callable[[int], tuple[float, Any]], dict[str, Any]]:
    """As `benchmarks.workers.Build`."""

    def work(turn: int) -> tuple[float, Any]:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "leaves" and turn == 1:
            os._exit(3)
        return 1.0, how

    if how == "raises":
        raise ValueError("no such\nshape")
    return work, {"dtype": how}
