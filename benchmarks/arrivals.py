"""Latency under load: unlike requests that arrive at random moments, drawn together step by step, or one by one.

The loads are shares of what the engine draws a second while it is always full. At each of them every way of serving
gets the same requests at the same moments, in real time, one way after the other.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import torch

from benchmarks.rows import Row, recipes_of, rows
from ldm.console import say
from ldm.errors import UserError
from ldm.figures import figure
from ldm.files import whole_file, workshop, writing
from pipelines import TextToImagePipeline
from pipelines.crowd import Crowd
from pipelines.loaded import Loaded
from pipelines.turns import Turns

LOADS = (0.5, 0.8, 1.0, 1.5)
_PLOTTED = (("mean", "-", np.mean), ("p99", "--", lambda some: np.percentile(some, 99)))


# Arriving and waiting


class Clock:
    """Seconds, and how they pass while there is nothing to do: the machine's own."""

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class Way(Protocol):
    """A way of serving. It knows requests by their places in the order of arrival."""

    @property
    def busy(self) -> bool:
        """Whether it has begun what is not done yet."""
        ...

    def work(self, waiting: deque[int]) -> Iterator[int]:
        """Take some out of those that wait, the first that came first; work a little; yield each that is done."""
        ...


def arrival_times(count: int, rate: float, seed: int = 0) -> list[float]:
    """When `count` requests come, in seconds: a Poisson process of which the last arrival is known to be at count/rate.

    So the load is what it is called whatever the seed, and other rates have the same gaps, stretched.
    """
    gaps = np.random.default_rng(seed).exponential(size=count)
    return (gaps.cumsum() * (count / rate / gaps.sum())).tolist()


def serve(arrivals: Sequence[float], way: Way, clock: Clock) -> list[float]:
    """Return when each request is done, in seconds of the clock since the beginning. arrivals: in ascending order.

    A request that arrives during some work waits until it has ended; while nothing is there, time is waited for.
    """
    begun, coming, waiting = clock.now(), 0, deque[int]()
    done = [0.0] * len(arrivals)
    while coming < len(arrivals) or waiting or way.busy:
        passed = clock.now() - begun
        while coming < len(arrivals) and arrivals[coming] <= passed:
            waiting.append(coming)
            coming += 1
        if waiting or way.busy:
            for place in way.work(waiting):
                done[place] = clock.now() - begun
        else:
            clock.wait(arrivals[coming] - passed)
    return done


class Joining:
    """Who waits joins those that are being drawn before the next tick, while these are fewer than `together`.

    begin: takes one in. tick: one step of some of them; yields those that are done.
    """

    def __init__(self, begin: Callable[[int], object], tick: Callable[[], Iterable[int]], together: int):
        self._begin, self._tick, self._together = begin, tick, together
        self._begun = 0

    @property
    def busy(self) -> bool:
        return self._begun > 0

    def work(self, waiting: deque[int]) -> Iterator[int]:
        while waiting and self._begun < self._together:
            self._begin(waiting.popleft())
            self._begun += 1
        for place in self._tick():
            self._begun -= 1
            yield place


class Batched:
    """The one that waits longest, and up to `together` of those that wait and are of its kind, are drawn whole."""

    busy = False  # between any two calls of `work`

    def __init__(
        self, draw: Callable[[list[int]], object], kind: Callable[[int], Hashable], together: int = 1
    ):
        self._draw, self._kind, self._together = draw, kind, together

    def work(self, waiting: deque[int]) -> Iterator[int]:
        first = self._kind(waiting[0])
        chosen = [place for place in waiting if self._kind(place) == first][: self._together]
        for place in chosen:
            waiting.remove(place)
        self._draw(chosen)
        yield from chosen


# Figures


@dataclass(frozen=True)
class Cell:
    """How one way served at one load, of which 1 is the capacity.

    throughput: pictures a second, from the first arrival to the last picture. latencies: in seconds, from a request's
    arrival to its picture. slowdowns: those by the seconds that the request takes alone.
    """

    load: float
    way: str
    throughput: float
    latencies: np.ndarray
    slowdowns: np.ndarray


def cell(
    load: float, way: str, arrivals: Sequence[float], done: Sequence[float], alone: Sequence[float]
) -> Cell:
    """Put the figures together; the sequences are by request."""
    latencies = np.asarray(done) - np.asarray(arrivals)
    throughput = len(done) / (max(done) - arrivals[0])
    return Cell(load, way, throughput, latencies, latencies / np.asarray(alone))


def full_rate(done: Iterable[float], count: int, together: int) -> float:
    """Pictures a second while `together` were drawn at all times, over `count` of at least count + 2 together."""
    ordered = sorted(done)
    return count / (ordered[together - 1 + count] - ordered[together - 1])


def quarters(works: Sequence[float]) -> dict[str, np.ndarray]:
    """The places of the quarter of requests of least work, and of that of most; of equal ones the earlier is less."""
    ordered = np.argsort(np.asarray(works), kind="stable")
    quarter = len(works) // 4
    return {"least work": ordered[:quarter], "most work": ordered[len(works) - quarter :]}


def latency_table(cells: Iterable[Cell]) -> str:
    """A table in Markdown: a row a load and way."""
    lines = [
        "| load | way | pictures a second | mean latency, s | p50 | p99 | greatest slowdown |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in cells:
        p50, p99 = np.percentile(each.latencies, (50, 99))
        lines.append(
            f"| {100 * each.load:.0f} % | {each.way} | {each.throughput:.3g} | {each.latencies.mean():.2f} | {p50:.2f} "
            f"| {p99:.2f} | {each.slowdowns.max():.1f} |"
        )
    return "\n".join(lines)


def fairness_table(cells: Iterable[Cell], works: Sequence[float]) -> str:
    """A table in Markdown: the slowdowns of the quarters of least and most work."""
    classes = quarters(works)
    names = " | ".join(f"{name}: mean | p99 | max" for name in classes)
    lines = [f"| load | way | {names} |", "|---|---|" + "---|" * 3 * len(classes)]
    for each in cells:
        figures = list[str]()
        for places in classes.values():
            some = each.slowdowns[places]
            figures += [f"{some.mean():.2f}", f"{np.percentile(some, 99):.2f}", f"{some.max():.2f}"]
        lines.append(f"| {100 * each.load:.0f} % | {each.way} | {' | '.join(figures)} |")
    return "\n".join(lines)


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Latency against load, a colour a way: the mean solid, p99 dashed. Raises UserError without matplotlib."""
    drawn = figure(7, 4.5)
    from matplotlib.ticker import LogLocator, NullLocator

    axes = drawn.subplots()
    for color, way in enumerate(dict.fromkeys(each.way for each in cells)):
        own = [each for each in cells if each.way == way]
        for what, style, statistic in _PLOTTED:
            line = axes.plot(
                [100 * each.load for each in own], [statistic(each.latencies) for each in own], style
            )
            line[0].set(color=f"C{color}", marker="o", markersize=4)
            if what == "mean":
                line[0].set_label(way)
    for what, style, _ in _PLOTTED:
        axes.plot([], [], style, color="grey", label=what)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sorted({100 * each.load for each in cells}))
    axes.set(xlabel="load, % of the full engine's pictures a second", ylabel="latency, seconds")
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        drawn.savefig(temporary, dpi=110, format="png")


# Measuring


class Server:
    """A pipeline with the requests that it is to serve, in three ways. together: the most pictures at a time."""

    def __init__(self, pipe: TextToImagePipeline, wanted: Sequence[Row], together: int):
        self.pipe, self.wanted, self.together = pipe, wanted, together
        self._loaded = Loaded(pipe.system, pipe.device, Turns())  # nothing
        self._recipes = recipes_of(wanted)
        self.ways: dict[str, Callable[[], Way]] = {
            "step by step, the engine": self.step_by_step,
            "equal ones that wait, in a batch": lambda: Batched(self.draw, wanted.__getitem__, together),
            "one after the other": lambda: Batched(self.draw, wanted.__getitem__),
        }

    def draw(self, places: Sequence[int]) -> None:
        """Draw requests of equal settings by a call of the pipeline."""
        self.pipe.draw([self._recipes[place] for place in places])

    def step_by_step(self) -> Way:
        """A crowd of its own. Places beyond the last request are the first ones again."""
        crowd = Crowd(self.pipe.system, self._loaded, self.pipe.device, self.together)

        def begin(place: int) -> None:
            crowd.admit(place, self.pipe.complete(self._recipes[place % len(self._recipes)]))

        def tick() -> Iterator[int]:
            for each in crowd.tick():
                if each.error is not None:
                    raise each.error
                yield each.place

        return Joining(begin, tick, self.together)

    def capacity(self, clock: Clock) -> float:
        """Pictures a second of an engine that is always full; the first ones warm it up."""
        count = len(self.wanted) + 2 * self.together
        done = serve([0.0] * count, self.step_by_step(), clock)
        return full_rate(done, len(self.wanted), self.together)

    def alone(self, clock: Clock, rounds: int = 3) -> list[float]:
        """Seconds of each request by itself: the median of those of equal work, after one round that doesn't count."""
        kinds = {work(row): place for place, row in enumerate(self.wanted)}
        seconds: dict[int, list[float]] = {kind: [] for kind in kinds}
        for turn in range(1 + rounds):
            for kind, place in kinds.items():
                begun = clock.now()
                self.draw([place])
                if turn:
                    seconds[kind].append(clock.now() - begun)
        return [median(seconds[work(row)]) for row in self.wanted]


def work(row: Row) -> int:
    """What the network has to do for a picture, in columns of pixels: every request is guided, and of one height."""
    return row.steps * row.width


def report(model: Path, count: int, precision: str, together: int, output: Path) -> str:
    """Measure, on a machine that does nothing else; returns the tables, and writes the plot. Raises UserError."""
    if count < 4:
        raise UserError(f"{count} requests have no quarters: give --rows 4 or more")
    figure(7, 4.5)  # both now, not after half an hour
    with writing(output), workshop(output):
        pass
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    pipe = TextToImagePipeline.from_pretrained(model, torch_dtype=dtype, low_memory=False)
    server, clock = Server(pipe, rows(count, mixed=True), together), Clock()
    alone, capacity = server.alone(clock), server.capacity(clock)
    said = (
        f"{count} requests a row of the table, up to {together} pictures together. The full engine draws "
        f"{capacity:.3g} pictures a second, which is the load of 100 %; one after the other they take "
        f"{min(alone):.2f} to {max(alone):.2f} s each, {1 / float(np.mean(alone)):.3g} pictures a second. Where a way "
        "is given more than it can draw its queue grows without end: the number of requests alone bounds its latency, "
        "there and at 150 % in all ways."
    )
    say(said)
    cells = list[Cell]()
    for turn, load in enumerate(LOADS):
        arrivals = arrival_times(count, load * capacity)
        found = dict[str, Cell]()
        for name in list(server.ways)[:: -1 if turn % 2 else 1]:
            found[name] = cell(load, name, arrivals, serve(arrivals, server.ways[name](), clock), alone)
            say(latency_table([found[name]]).splitlines()[-1])
        cells += [found[name] for name in server.ways]
    plot(cells, output)
    fairness = fairness_table(cells, [work(row) for row in server.wanted])
    return (
        f"{said}\n\n{latency_table(cells)}\n\nSlowdown, latency by the seconds that a request takes alone, of the "
        f"quarters of least and of most work:\n\n{fairness}"
    )
