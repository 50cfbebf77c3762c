"""Requests that arrive, against queues whose numbers are known in closed form; the clock and the work are not real."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.arrivals import (
    Batched,
    Cell,
    Clock,
    Joining,
    arrival_times,
    cell,
    fairness_table,
    full_rate,
    latency_table,
    plot,
    quarters,
    serve,
)


class Fake(Clock):
    """A clock that goes on only where something waits or works."""

    def __init__(self) -> None:
        self.time = 64.0  # it need not begin at 0
        self.waited = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds
        self.waited += seconds


class Ticks:
    """Requests of so many ticks, each of one second for all that are there."""

    def __init__(self, clock: Fake, ticks: list[int]):
        self.clock, self.ticks, self.left = clock, ticks, dict[int, int]()
        self.most = 0

    def begin(self, place: int) -> None:
        self.left[place] = self.ticks[place]

    def tick(self) -> Iterator[int]:
        self.clock.time += 1
        self.most = max(self.most, len(self.left))
        self.left = {place: left - 1 for place, left in self.left.items()}
        for place in [place for place, left in self.left.items() if left == 0]:
            del self.left[place]
            yield place


def served(clock: Fake, arrivals: list[float], together: int, service: float, kinds: int = 1) -> list[float]:
    """The latencies where every batch takes `service` seconds."""

    def draw(places: list[int]) -> None:
        clock.time += service

    done = serve(arrivals, Batched(draw, lambda place: place % kinds, together), clock)
    return [end - begin for end, begin in zip(done, arrivals, strict=True)]


def test_a_queue_that_gets_more_than_it_serves_grows_by_the_difference() -> None:
    arrivals = [1.5 * k for k in range(20)]  # D/D/1
    assert served(Fake(), arrivals, 1, 2.0) == [2.0 + 0.5 * k for k in range(20)]


def test_a_queue_that_gets_less_waits_and_its_latency_is_the_service() -> None:
    clock = Fake()
    assert served(clock, [3.0 * k for k in range(10)], 1, 2.0) == [2.0] * 10
    assert clock.waited == 9 * (3.0 - 2.0)


def test_those_of_a_kind_that_wait_are_drawn_in_one_batch() -> None:
    # The first alone from 0 to 4; then 1 to 4, that came meanwhile, until 8; then 5 to 8, until 12.
    assert served(Fake(), [float(k) for k in range(9)], 4, 4.0) == [4, 7, 6, 5, 4, 7, 6, 5, 4]
    # All there at once, of two kinds in turns, three at most: 0 2 4, 1 3 5, 6 8, 7.
    assert served(Fake(), [0.0] * 9, 3, 1.0, kinds=2) == [1, 2, 1, 2, 1, 2, 3, 4, 3]


def test_one_joins_at_the_next_tick_and_none_is_slowed_down_by_others() -> None:
    clock, ticks = Fake(), [5, 2, 9, 1]
    fake = Ticks(clock, ticks)
    done = serve([0.0, 0.25, 2.0, 3.5], Joining(fake.begin, fake.tick, 4), clock)
    assert done == [5, 1 + 2, 2 + 9, 4 + 1] and fake.most == 3


def test_where_there_is_no_room_who_came_first_joins_first() -> None:
    clock = Fake()
    fake = Ticks(clock, [4] * 8)
    done = serve([0.0] * 8, Joining(fake.begin, fake.tick, 2), clock)  # D/D/2
    assert done == [4, 4, 8, 8, 12, 12, 16, 16] and fake.most == 2


def test_the_rate_of_a_full_engine_leaves_its_begin_and_end_out() -> None:
    clock = Fake()
    fake = Ticks(clock, [3 + k % 3 for k in range(30)])  # 4 ticks each on average
    done = serve([0.0] * 30, Joining(fake.begin, fake.tick, 3), clock)
    assert full_rate(done, 24, 3) == pytest.approx(3 / 4, rel=0.05)
    assert 30 / max(done) < full_rate(done, 24, 3)


def test_arrivals_are_seeded_poisson_at_exactly_the_rate() -> None:
    times = arrival_times(4000, 2.0)
    gaps = np.diff(times, prepend=0.0)
    assert times == arrival_times(4000, 2.0) != arrival_times(4000, 2.0, seed=1)
    assert times[-1] == pytest.approx(2000) and (gaps > 0).all()
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of no other process without memory
    assert (gaps > 0.5).mean() == pytest.approx(np.exp(-1), abs=0.03)
    np.testing.assert_allclose(arrival_times(4000, 4.0), np.asarray(times) / 2)


def made(load: float, way: str) -> Cell:
    return cell(load, way, [0.0, 1.0, 2.0, 3.0], [2.0, 4.0, 4.0, 10.0], [1.0, 3.0, 1.0, 3.5])


def test_the_tables_hold_what_was_measured() -> None:
    found = made(0.8, "it")
    assert found.throughput == 4 / 10
    assert found.latencies.tolist() == [2, 3, 2, 7] and found.slowdowns.tolist() == [2, 1, 2, 2]
    assert latency_table([found]).splitlines()[2] == "| 80 % | it | 0.4 | 3.50 | 2.50 | 6.88 | 2.0 |"
    fairness = fairness_table([found], [1, 3, 2, 3])
    assert fairness.splitlines()[2] == "| 80 % | it | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 |"
    assert {line.count("|") for line in fairness.splitlines()} == {9}


def test_quarters_are_of_least_and_most_work() -> None:
    found = quarters([8, 1, 7, 2, 6, 3, 5, 4])
    assert {name: sorted(places.tolist()) for name, places in found.items()} == {
        "least work": [1, 3],
        "most work": [0, 2],
    }
    assert quarters([5] * 4)["most work"].tolist() == [3]


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot([made(load, way) for load in (0.5, 1.0) for way in ("one", "other")], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
