"""Runs of several rounds: which are trained and which passed over, what ends them, exact resume."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from killed import BATCHES, same_bits_after_kills
from test_distillation import plain_teacher
from test_training_progressive import COSINE, progressive_setup, same, weights
from training_runs import TOY, Toy, side_by_side

from ldm.checkpoints.files import read_tensors
from ldm.errors import UserError
from ldm.system.plain import PlainSystem
from ldm.training import state
from ldm.training.folders import held
from ldm.training.loop import Trainer
from ldm.training.rounds import Round, walk

# The walk through rounds, with a regression in each


def toys(folder: Path, pictures: int = 64, meddle: Callable[[int], None] = lambda seen: None) -> list[Round]:
    """Three rounds of a regression."""

    def round_in(place: Path) -> Round:
        def trained(seconds: float | None) -> bool:
            loop = replace(TOY, pictures=pictures, max_seconds=seconds, diverged=0)
            return Trainer(Toy(meddle=meddle), loop, place).run()

        return Round(place, pictures, trained)

    return [round_in(folder / f"round-{name}") for name in "abc"]


def test_rounds_follow_each_other_and_those_that_are_finished_are_not_built(tmp_path: Path) -> None:
    assert walk(tmp_path, toys(tmp_path), None, "all: of it")
    assert (tmp_path / "config.yaml").read_text() == "all: of it"
    assert (tmp_path / "export").is_dir()

    def unwanted(seconds: float | None) -> bool:
        raise AssertionError

    finished = [replace(each, train=unwanted) for each in toys(tmp_path)]
    assert walk(tmp_path, finished, 0.0, "")
    (tmp_path / "round-c" / "export").rmdir()
    assert [each.finished for each in finished] == [True, True, False]


def test_max_seconds_is_of_all_rounds_together_and_each_call_goes_on(tmp_path: Path) -> None:
    def slowly(seen: int) -> None:
        time.sleep(0.01)

    seen = list[list[int | None]]()
    while not walk(tmp_path, toys(tmp_path, meddle=slowly), 0.0, ""):  # a step a call
        seen.append([each.seen for each in toys(tmp_path)])
    assert len(seen) == 3 * 9 - 1  # 8 steps each, and an export
    assert seen[0] == [8, None, None] and seen[8] == [64, None, None] and seen[9] == [64, 8, None]
    other = tmp_path / "other"
    assert walk(other, toys(other), 3600.0, "")
    for name in ("round-a", "round-c"):
        ends = [state.newest(folder / name) for folder in (tmp_path, other)]
        assert ends[0] and ends[1] and same(read_tensors(ends[0]), read_tensors(ends[1]))


def test_seconds_are_over_between_rounds_too(tmp_path: Path) -> None:
    first, second, third = toys(tmp_path)

    def late(seconds: float | None) -> bool:
        assert seconds == pytest.approx(0.05, abs=0.05)
        done = first.train(None)
        time.sleep(0.06)
        return done

    assert not walk(tmp_path, [replace(first, train=late), second, third], 0.05, "")
    assert first.finished and second.seen is None


def test_an_earlier_round_does_not_train_on_under_later_ones(tmp_path: Path) -> None:
    assert walk(tmp_path, toys(tmp_path), None, "")
    with pytest.raises(
        UserError, match=r"round-a has 64 of 128 pictures.*delete .*round-b, .*round-c to"
    ) as caught:
        walk(tmp_path, toys(tmp_path, pictures=128), None, "")
    assert "\n" not in str(caught.value)
    for each in (tmp_path / "round-a").glob("state-*"):
        each.unlink()
    with pytest.raises(UserError, match="round-a has no state"):
        walk(tmp_path, toys(tmp_path), None, "")


def test_the_last_round_may_train_on_and_its_old_export_does_not_pass_for_the_new(tmp_path: Path) -> None:
    last = tmp_path / "round-c"

    def dies(seen: int) -> None:
        assert not (last / "export").exists()
        raise MemoryError

    def only(pictures: int, meddle: Callable[[int], None] = lambda seen: None) -> list[Round]:
        return toys(tmp_path, pictures, meddle)[2:]

    assert walk(tmp_path, only(64), None, "")
    with pytest.raises(UserError, match="out of memory"):
        walk(tmp_path, only(128, dies), None, "")
    assert (tmp_path / "export").is_dir()  # what was drawn with goes on being there
    assert walk(tmp_path, only(128), None, "") and only(128)[0].finished


def test_the_whole_output_is_held(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError, match="another training writes to"):
        walk(tmp_path, toys(tmp_path), None, "")


# Rounds of a student


def test_killed_within_rounds_and_between_them_the_bits_are_the_same(tmp_path: Path) -> None:
    """A kill in the first round, one between its export and the second round, and one in the second."""
    loop = {"pictures": 8 * BATCHES, "save_every": 8, "validate_every": 1000}
    teacher = plain_teacher(tmp_path, process=COSINE)
    paths = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        paths.append(progressive_setup(tmp_path / name, teacher, 2, 1, loop=loop))
    same_bits_after_kills(*paths, kills=1, first=[("step", 3, 0.5), ("round", 1)], last_round="round-1")
    one, other = (weights(path.parent / "run" / "export") for path in paths)
    assert same(one, other)


def test_two_processes_walk_through_the_rounds_together(tmp_path: Path) -> None:
    teacher = plain_teacher(tmp_path, process=COSINE)
    path = progressive_setup(tmp_path, teacher, 2, 1)
    script = f"""
        from contextlib import nullcontext
        from pathlib import Path
        from ldm.errors import UserError
        from ldm.training.distributed import processes
        from ldm.training.folders import held
        from ldm.training.run import train

        assert processes().num_processes == 2
        assert train({str(path)!r})
        with held(Path({str(tmp_path / "run")!r})) if processes().is_main_process else nullcontext():
            try:
                train({str(path)!r})
            except UserError as error:
                print(error)
        """
    first, second = side_by_side(script)
    assert "round 2 of 2" in first and "round 2" not in second
    assert all("another training writes to" in said for said in (first, second))
    assert PlainSystem.load(tmp_path / "run" / "export").options["num_inference_steps"] == 1
