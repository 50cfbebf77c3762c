"""What a run refuses, survives and says: settings that can't be, broken states, kills, launchers, the dry run."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import LOOP, TOY, Toy, state, write_config

from ldm.errors import UserError
from ldm.training import cli
from ldm.training.loop import LoopConfig, Trainer
from ldm.training.loop_config import accelerator_for
from ldm.training.optimization import OptimizerConfig
from ldm.training.run import Run, read_run
from ldm.training.state import newest

ROOT = Path(__file__).parent.parent


def states(folder: Path) -> list[int]:
    """The pictures seen of each that was saved."""
    return sorted(int(path.stem.removeprefix("state-")) for path in folder.glob("state-*.safetensors"))


class Poisoned(Toy):
    """Its loss is NaN after so many pictures."""

    poison = 24

    def loss(self, model, batch, rng):  # type: ignore[no-untyped-def]
        value, logs = super().loss(model, batch, rng)
        return value * (float("nan") if batch.min() * 30 >= self.poison else 1), logs


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pictures", -1),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("keep", 1),
        ("log_every", -3),
        ("save_every", -1),
        ("validate_every", -1),
        ("ema_half_life", -1),
        ("seed", -1),
        ("diverged", 0.5),
        ("max_seconds", -1.0),
        ("optimizer.learning_rate", -1.0),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.beta1", 2.0),
        ("optimizer.beta2", 1.0),
        ("optimizer.decay", 2.0),
        ("optimizer.warmup", -5),
        ("optimizer.eps", -1.0),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.clip_norm", -1.0),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, value: float) -> None:
    owner, _, leaf = name.rpartition(".")
    with pytest.raises(UserError, match=rf"loop\.{name} is {value}: make it .* or more"):
        if owner:
            LoopConfig(pictures=64, optimizer=OptimizerConfig(**{leaf: value}))
        else:
            LoopConfig(**{"pictures": 64, leaf: value})


def test_the_shipped_configs_are_valid() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        read_run(path)


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    class Unprepared(Toy):
        def prepare(self, device: torch.device, batch_size: int) -> None:
            raise AssertionError

    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x")):
        with pytest.raises(UserError, match=f"can't write {place}"):
            Trainer(Unprepared(), TOY, place)


def test_a_launchers_precision_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("no", TOY.precision):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given)
        accelerator_for(TOY, tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"mixed_precision bf16 .* loop.precision no"):
        accelerator_for(TOY, tmp_path)


def test_all_trackers_are_those_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(UserError, match="all, and none is installed: pip install tensorboard"):
        accelerator_for(replace(TOY, trackers=("all",)), tmp_path)
    from accelerate.utils import LoggerType

    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    accelerator = accelerator_for(replace(TOY, trackers=("all",)), tmp_path)
    assert list(map(str, accelerator.log_with)) == ["tensorboard"]


# States


def test_weights_that_are_not_finite_never_take_the_place_of_good_ones(tmp_path: Path) -> None:
    trainer = Trainer(Toy(), replace(TOY, save_every=8), tmp_path)
    update = trainer.ema.update

    def poisoned(model: torch.nn.Module, size: int, seen: int) -> None:
        update(model, size, seen)
        if seen == 24:  # after its loss, and before it is saved
            next(model.parameters()).data[0, 0] = float("inf")

    trainer.ema.update = poisoned  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"NaN or infinity in 1 of .*model.0.weight.* after 24 pictures"):
        trainer.run()
    assert states(tmp_path) == [8, 16]
    assert Trainer(Toy(), replace(TOY, save_every=8), tmp_path).run()


def test_a_state_that_nothing_came_of_is_named_and_the_one_before_is_there(tmp_path: Path) -> None:
    """Its weights are finite, and their first loss isn't: at once and where the same command is run again."""
    config = replace(TOY, save_every=8)
    for _ in range(2):
        with pytest.raises(UserError, match=r"loss became nan after 24 pictures.*0024.safetensors: delete"):
            Trainer(Poisoned(), config, tmp_path).run()
        assert states(tmp_path) == [16, 24]
    bad = newest(tmp_path)
    assert bad
    bad.unlink()
    assert Trainer(Toy(), config, tmp_path).run()
    assert Trainer(Toy(), config, tmp_path / "whole").run()
    healed, whole = state(tmp_path), state(tmp_path / "whole")
    assert all(torch.equal(healed[key], whole[key]) for key in whole)


def test_a_state_before_the_last_step_is_not_blamed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"after 24 pictures; the last saved state in .* is whole: lower"):
        Trainer(Poisoned(), replace(TOY, save_every=16), tmp_path).run()
    with pytest.raises(UserError, match="after 24 pictures: lower the learning rate"):
        Trainer(Poisoned(), TOY, tmp_path / "nothing saved").run()


def test_what_a_kill_left_is_swept_and_the_log_has_each_line_once(tmp_path: Path) -> None:
    """A kill in the middle of a save, after lines that are trained anew, and in the middle of a line."""

    def fail(seen: int) -> None:
        if seen == 56:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(Toy(meddle=fail), replace(TOY, save_every=32), tmp_path).run()
    left = tmp_path / ".state-000000000064.safetensors.0123abcd.tmp"
    left.write_bytes(b"half")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"seen": 3')
    assert Trainer(Toy(), TOY, tmp_path).run()
    assert not left.exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["seen"] for line in lines] == list(range(8, 72, 8))


# What is said


@pytest.mark.parametrize("toy", [Toy, Poisoned])
def test_notes_come_at_the_start_and_once_and_trackers_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], toy: type[Toy]
) -> None:
    """However the run ends."""
    notes = ["3 pictures have no caption"]

    class Noting(toy):  # type: ignore[misc, valid-type]
        def notes(self) -> list[str]:
            return notes

    class Tracker:
        name, ended = "none", 0

        def log(self, values: dict[str, float], step: int) -> None: ...

        def finish(self) -> None:
            self.ended += 1

    trainer, tracker = Trainer(Noting(), TOY, tmp_path), Tracker()
    assert capsys.readouterr().out.splitlines() == notes
    trainer.accelerator.trackers = [tracker]
    notes.append("skipped broken.png")
    if toy is Poisoned:
        with pytest.raises(UserError, match="the loss became nan"):
            trainer.run()
    else:
        assert trainer.run()
    out = capsys.readouterr().out.splitlines()
    assert "skipped broken.png" in out and notes[0] not in out and tracker.ended == 1


def test_a_launcher_that_starts_one_process_for_several_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of `accelerate launch --cpu --num_processes 2`, of one process, and of torchrun's one."""
    for name in ("MASTER_ADDR", "WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value, told in (
        ("ACCELERATE_DYNAMO_BACKEND", "NO", False),
        ("MASTER_ADDR", "127.0.0.1", True),
        ("WORLD_SIZE", "1", False),
    ):
        monkeypatch.setenv(name, value)
        Trainer(Toy(), TOY, tmp_path)
        assert ("asked for several processes and started one" in capsys.readouterr().out) == told


# The dry run


def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Callable[[], Toy], *changes: str) -> int:
    monkeypatch.setattr(Run, "objective", lambda self: toy())
    data = {"kind": "pictures", "path": "pictures", "resolution": 32}
    path = write_config(tmp_path, {"loop": LOOP, "autoencoder": {"data": data}})
    return cli.main(["--config", str(path), "--dry-run", "--set", "loop.pictures=80", *changes])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("loop.gradient_accumulation_steps=3", "can't be shared by 1 processes in 3 parts"),
        ("loop.precision=fp16", "fp16 is for GPUs"),
        ("loop.trackers=[tensorbord]", "loop.trackers"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    complaint: str,
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert dry_run(tmp_path, monkeypatch, Toy, change) == 2
    said = capsys.readouterr()
    assert complaint in said.err and "pictures: 80" in said.out  # the config comes before anything can fail


def test_a_dry_run_counts_what_is_frozen_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Helped(Toy):
        def helpers(self) -> dict[str, torch.nn.Module]:
            vae = torch.nn.Linear(2**14, 2**13, bias=False, device="meta", dtype=torch.float16)
            return {
                "unet": self.model,
                "vae": vae,
                "perceptual": torch.nn.ModuleList([vae, torch.nn.Linear(1, 1)]),
            }

    assert dry_run(tmp_path, monkeypatch, Helped) == 0
    out = capsys.readouterr().out
    assert "21 trained, 0 frozen in the same model" in out and "0.25 GiB for what is frozen" in out
    assert "beside it    vae 134,217,728, perceptual 2, frozen" in out
    assert "10 to come, of 8 pictures" in out and not (tmp_path / "run").exists()


# Several processes


def test_processes_exchange_gradients_with_the_last_part_only(tmp_path: Path) -> None:
    trainer, apart, parts = (
        Trainer(Toy(), replace(TOY, gradient_accumulation_steps=4), tmp_path),
        [False],
        list[bool](),
    )

    @contextmanager
    def no_sync(model: torch.nn.Module):  # type: ignore[no-untyped-def]
        apart[0] = True
        yield
        apart[0] = False

    backward = trainer.accelerator.backward

    def noted(loss: torch.Tensor) -> None:
        parts.append(apart[0])
        backward(loss)

    trainer.accelerator.no_sync, trainer.accelerator.backward = no_sync, noted  # type: ignore[method-assign]
    trainer.step()
    assert parts == [True, True, True, False]


def test_two_processes_of_a_real_launcher_do_what_one_does(tmp_path: Path) -> None:
    """Each with its share in two parts, stopped in between by the clock. No process may go before the main one has
    written the state, or the export. Last they all refuse a state that the main process alone sees to be broken."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time, torch
            from dataclasses import replace
            from pathlib import Path
            from training_runs import TOY, Toy
            from ldm.errors import UserError
            from ldm.training import state
            from ldm.training.loop import Trainer

            def made(name, **changes):
                toy = Toy()
                toy.model[1].p = 0.0  # dropout's masks are each process's own
                config = replace(TOY, gradient_accumulation_steps=2, **changes)
                return Trainer(toy, config, Path({str(tmp_path)!r}) / name)

            write = state.write
            state.write = lambda *args: (time.sleep(0.5), write(*args))
            Toy.export = lambda self, model, folder, config: (time.sleep(0.5), folder.mkdir())
            trainer = made("two", max_seconds=0.0)
            assert trainer.accelerator.num_processes == 2
            assert not trainer.run() and made("two").run() and (trainer.folder / "export").exists()
            saved = made("saved")
            saved.save()
            assert state.newest(saved.folder)
            broken = made("broken")
            broken.plain[0].weight.data.fill_(float("nan"))
            try:
                broken.save()
            except UserError as error:
                assert "NaN or infinity" in str(error)
                open(broken.folder / f"refused-{{broken.accelerator.process_index}}", "x")
            """
        )
    )
    environment: dict[str, Any] = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["refused-0", "refused-1"]
    toy = Toy()
    toy.model[1].p = 0.0  # type: ignore[index]
    assert Trainer(toy, TOY, tmp_path / "one").run()
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
