"""Speeds: the median over the rounds, in turns, without the warm-up."""

import time

import pytest

from ldm.evaluation import timing


def test_contenders_take_turns_and_warm_up_first() -> None:
    order: list[str] = []

    def work(name: str) -> int:
        order.append(name)
        return 1

    timing.compare({name: lambda name=name: work(name) for name in "ab"}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_speed_is_units_over_seconds_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    seconds = iter([100.0, 2.0, 4.0, 8.0])

    def work() -> int:
        clock["now"] += next(seconds)
        return 8

    speed = timing.compare({"it": work}, rounds=3)["it"]
    assert (speed.median, speed.least, speed.most) == (2.0, 1.0, 4.0)


def test_ratios_are_to_the_baseline() -> None:
    speeds = {"theirs": timing.Speed(2.0, 1.0, 3.0), "ours": timing.Speed(5.0, 4.0, 6.0)}
    assert timing.table(speeds, "theirs", "pictures").splitlines()[2:] == [
        "| theirs | 2 (1 to 3) | 1.00 |",
        "| ours | 5 (4 to 6) | 2.50 |",
    ]


def test_no_rounds_measure_nothing() -> None:
    with pytest.raises(ValueError, match="0 rounds"):
        timing.compare({"it": lambda: 1}, rounds=0)
