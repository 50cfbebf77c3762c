"""Speeds compared within one run: contenders take turns, so that a machine that slows down slows all of them."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Does a round's work and returns how many units of it (pictures, say) that was.
Work = Callable[[], int]


@dataclass(frozen=True)
class Speed:
    """Units a second over the rounds: the median, the slowest and the fastest."""

    median: float
    least: float
    most: float


def compare(contenders: Mapping[str, Work], rounds: int, warm_up: int = 1) -> dict[str, Speed]:
    """Run every contender `rounds` times, in turns, after `warm_up` rounds that don't count.

    Every other round goes backwards, so that none always follows the same one. Raises ValueError for no rounds.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds measure nothing")
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        names = list(contenders)
        for name in names if turn % 2 == 0 else names[::-1]:
            _wait()
            started = time.perf_counter()
            units = contenders[name]()
            _wait()
            if turn >= warm_up:
                speeds[name].append(units / (time.perf_counter() - started))
    return {name: Speed(statistics.median(each), min(each), max(each)) for name, each in speeds.items()}


def table(speeds: Mapping[str, Speed], baseline: str, unit: str) -> str:
    """Return a table in Markdown: a row a contender, with the ratio of its median to the baseline's."""
    head = f"| | {unit} a second (least to most) | ratio |\n|---|---|---|"
    rows = [
        f"| {name} | {speed.median:.3g} ({speed.least:.3g} to {speed.most:.3g}) "
        f"| {speed.median / speeds[baseline].median:.2f} |"
        for name, speed in speeds.items()
    ]
    return "\n".join([head, *rows])


def machine() -> str:
    """Return what a figure was measured on, in a line."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None and device.type == "cuda":
        where = torch.cuda.get_device_name()
    elif device is not None:
        where = f"{device.type}"
    else:
        where = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _wait() -> None:
    """What was asked of an accelerator is done before the clock is read."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
