"""The training loop on a toy: its schedule, its ends, its average, its processes."""

import importlib.util
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers
from training_runs import TOY, Toy, state

from ldm import processor
from ldm.checkpoints.files import read_metadata
from ldm.errors import UserError
from ldm.models.attention import attend
from ldm.models.layers import ResnetBlock, recompute_activations
from ldm.training.distributed import BatchGenerator, rows_of
from ldm.training.ema import EMA
from ldm.training.layout import memory_format
from ldm.training.loop import Trainer
from ldm.training.loop_config import LoopConfig, accelerator_for, precision_notes
from ldm.training.optimization import OptimizerConfig, Schedule, learning_rate
from ldm.training.run import read_run
from ldm.training.state import newest


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=100, decay=0.3), 1000)
    assert [rate(seen) for seen in (0, 50, 100, 500, 700)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert (rate(850), rate(1000)) == (pytest.approx(0.5), 0.0)
    short = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=10_000, decay=0.3), 1000)
    assert short(700) == 1.0 and short(850) == pytest.approx(0.5)  # the warm-up ends where the decay begins


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_a_warm_up_ends_or_is_refused(schedule: Schedule) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup=10_000, schedule=schedule)
    if schedule not in ("constant", "warmup_stable_decay"):
        with pytest.raises(UserError, match=r"warmup is 10000 pictures.*run of 4000.*set it to 400"):
            LoopConfig(pictures=4000, optimizer=config)
    else:
        rate = learning_rate(LoopConfig(pictures=4000, optimizer=config).optimizer, 4000)
        assert max(rate(seen) for seen in range(0, 4000, 100)) == 1.0


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_learning_rates_are_those_of_a_library_step_by_step(schedule: Schedule) -> None:
    """Stateless here, by the pictures seen, against a scheduler object that is stepped."""
    config = OptimizerConfig(learning_rate=0.5, warmup=80, schedule=schedule, decay=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    specific = {"num_decay_steps": 40, "decay_type": "linear"} if schedule == "warmup_stable_decay" else None
    stepped = transformers.get_scheduler(schedule, optimizer, 8, 80, specific)
    ours = learning_rate(config, 800)
    for step in range(80):
        expected = optimizer.param_groups[0]["lr"]
        assert ours(10 * step) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        stepped.step()


def test_the_average_forgets_by_half_in_its_half_life() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    ema = EMA(model, half_life=100)
    ema.start(model)
    torch.nn.init.zeros_(model.weight)
    for step in range(10):
        ema.update(model, 10, 10_000 + 10 * step)
    assert ema.model(model).weight.item() == pytest.approx(0.5)  # type: ignore[operator]


def test_the_average_ramps_up_as_edm_does() -> None:
    """EDM's training loop: half-life min(half-life, 0.05 * pictures before the step); beta 0.5^(batch / half-life)."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, half_life=100)
    ema.start(model)
    average = float("nan")
    for step in range(400):
        torch.nn.init.constant_(model.weight, float(step % 7))
        beta = 0.5 ** (8 / max(min(100, 0.05 * 8 * step), 1e-8))
        average = float(step % 7) if step == 0 else beta * average + (1 - beta) * float(step % 7)
        ema.update(model, 8, 8 * (step + 1))
        assert ema.model(model).weight.item() == pytest.approx(average, rel=1e-4, abs=1e-6)  # type: ignore[operator]


def test_the_average_copies_what_is_trained_and_shares_the_rest() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = EMA(model, half_life=100)
    ema.start(model)
    model(torch.randn(8, 2))
    averaged = ema.model(model)
    assert isinstance(averaged, torch.nn.Sequential) and not averaged.training
    assert averaged[0].weight is model[0].weight
    assert averaged[2].weight is not model[2].weight and torch.equal(averaged[2].weight, model[2].weight)
    assert torch.equal(averaged[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in averaged.parameters())


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ("", r"exactly one objective \(autoencoder, .*text_to_image\); this has none"),
        ("autoencoder: {}\ntext_to_image: {}", "exactly one objective"),
        ("text_to_imag: {}", "unknown key 'text_to_imag', did you mean text_to_image"),
    ],
)
def test_a_run_needs_exactly_one_objective(tmp_path: Path, sections: str, complaint: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output: x\nloop: {{pictures: 1}}\n{sections}\n")
    with pytest.raises(UserError, match=complaint):
        read_run(path)


# The loop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_and_the_rest_has_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Dropout's masks among them: they too follow from the seed and the pictures seen."""
    before = signal.getsignal(number)
    assert Trainer(Toy(), TOY, tmp_path / "whole").run()
    torch.manual_seed(99)  # what else was drawn must not matter
    toy = Toy(meddle=lambda seen: os.kill(os.getpid(), number) if seen == 24 else None)
    assert not Trainer(toy, TOY, tmp_path / "ended").run()
    assert f"stopped by {number.name} at 32 pictures, saved" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert read_metadata(tmp_path / "ended" / "state-000000000032.safetensors")["seen"] == "32"
    assert Trainer(Toy(), TOY, tmp_path / "ended").run()
    whole, ended = state(tmp_path / "whole"), state(tmp_path / "ended")
    assert whole.keys() == ended.keys() and all(torch.equal(whole[key], ended[key]) for key in whole)


def test_a_gradient_that_is_no_number_reaches_no_weight(tmp_path: Path) -> None:
    class Rooted(Toy):
        def loss(self, model, batch, rng):  # type: ignore[no-untyped-def]
            value, logs = super().loss(model, batch, rng)
            return value + sum((p * 0).square().sum().sqrt() for p in model.parameters()), logs

    trainer = Trainer(Rooted(), TOY, tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(UserError, match="the gradient's norm became nan after 0 pictures"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert newest(tmp_path) is None


def test_a_changed_model_is_refused_and_the_old_run_left_alone(tmp_path: Path) -> None:
    assert Trainer(Toy(), TOY, tmp_path, "the: first").run()
    with pytest.raises(UserError, match=r"other weights.*model.0.weight.*give another output"):
        Trainer(Toy(width=5), TOY, tmp_path, "the: second").run()
    partial = Toy()
    partial.model[0].requires_grad_(False)  # type: ignore[index]
    with pytest.raises(UserError, match="other frozen weights"):
        Trainer(partial, TOY, tmp_path, "the: third").run()
    assert (tmp_path / "config.yaml").read_text() == "the: first"
    assert read_metadata(tmp_path / "state-000000000064.safetensors")["config"] == "the: first"


def test_the_log_has_the_learning_rate_that_was_used(tmp_path: Path) -> None:
    assert Trainer(Toy(), TOY, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rate = learning_rate(TOY.optimizer, TOY.pictures)
    assert [line["lr"] for line in lines] == [rate(line["seen"] - 8) for line in lines]
    assert lines[0].keys() == {"seen", "loss", "grad_norm", "error", "lr", "pictures_per_second"}


def test_parts_of_a_batch_add_up_to_the_whole(tmp_path: Path) -> None:
    """Gradient accumulation: the same losses, gradients and weights, but for rounding. Without dropout, whose masks
    are drawn by call."""
    for name, parts in (("whole", 1), ("parts", 4)):
        toy = Toy()
        toy.model[1].p = 0.0  # type: ignore[index]
        assert Trainer(toy, replace(TOY, gradient_accumulation_steps=parts), tmp_path / name).run()
    ends = [state(tmp_path / name) for name in ("whole", "parts")]
    assert all(torch.allclose(ends[0][key], ends[1][key], atol=1e-6) for key in ends[0])
    logs = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").open()] for n in ("whole", "parts")]
    for one, other in zip(*logs, strict=True):
        assert all(
            one[key] == pytest.approx(other[key], rel=1e-4) for key in ("loss", "error", "grad_norm", "lr")
        )


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    assert Trainer(Toy(), replace(TOY, save_every=8, keep=3), tmp_path).run()
    kept = sorted(path.name for path in tmp_path.glob("state-*"))
    assert kept == [f"state-{seen:012d}.safetensors" for seen in (48, 56, 64)]


def test_a_loss_that_runs_away_stops_the_run(tmp_path: Path) -> None:
    class Runaway(Toy):
        def loss(self, model, batch, rng):  # type: ignore[no-untyped-def]
            value, logs = super().loss(model, batch, rng)
            return value * (100 if batch.max() > 3 else 1), logs

    config = replace(TOY, save_every=8, diverged=10.0)
    with pytest.raises(UserError, match=r"the loss rose to .* after 32 pictures.*lower the learning rate"):
        Trainer(Runaway(), config, tmp_path).run()
    assert read_metadata(tmp_path / "state-000000000024.safetensors")["seen"] == "24"


class Blocks(torch.nn.ModuleList):
    """A network that says which blocks it is made of."""

    block_types = (ResnetBlock,)


def test_recomputed_activations_change_nothing() -> None:
    block = ResnetBlock(8, 8, time_channels=4, groups=2)
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    block(x, time).square().sum().backward()
    expected = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        saved: list[torch.Tensor] = []
        block(x, time)
        plainly = len(saved)
        recompute_activations(Blocks([block]))
        saved.clear()
        block(x, time).square().sum().backward()
    assert len(saved) < plainly
    found = [p.grad for p in block.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_figures_reach_the_trackers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert Trainer(Toy(), replace(TOY, trackers=("tensorboard",)), tmp_path / "run").run()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("tracker", ["tensorbord", "comet_ml"])
def test_a_tracker_that_is_unknown_or_not_installed_is_refused(tmp_path: Path, tracker: str) -> None:
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(UserError, match="trackers"):
        Trainer(Toy(), replace(TOY, trackers=(tracker,)), tmp_path)


def test_a_state_between_batches_is_refused_and_left_alone(tmp_path: Path) -> None:
    assert Trainer(Toy(), replace(TOY, pictures=24), tmp_path).run()
    trainer = Trainer(Toy(), replace(TOY, batch_size=16), tmp_path)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(UserError, match="24 pictures, no multiple of"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


# Several processes


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert [rows_of(8, process, 4) for process in range(4)] == [[slice(i, i + 2)] for i in (0, 2, 4, 6)]
    assert rows_of(8, 1, 2, 2) == [slice(4, 6), slice(6, 8)]
    with pytest.raises(UserError, match="batch of 10 pictures can't be shared by 4 processes"):
        rows_of(10, 0, 4)
    with pytest.raises(UserError, match=r"in 3 parts each.*a multiple of 6"):
        rows_of(8, 0, 2, 3)


def test_shared_draws_are_those_of_the_whole_batch() -> None:
    whole, parts = (
        BatchGenerator(5, 8, slice(None)),
        [BatchGenerator(5, 8, *rows_of(8, i, 2)) for i in range(2)],
    )
    for draw in (lambda d: d.uniform(), lambda d: d.normal(3, 2), lambda d: d.integers(1000)):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))


def test_a_processor_without_instructions_for_bfloat16_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has", lambda _: False)
    cpu, config = torch.device("cpu"), replace(TOY, precision="bf16")
    assert "loop.precision=no" in precision_notes(config, cpu)[0]
    assert memory_format(cpu) == torch.contiguous_format
    assert not precision_notes(replace(TOY, precision="no"), cpu)
    assert not precision_notes(config, torch.device("cuda"))
    assert memory_format("cuda") == torch.channels_last
    monkeypatch.setattr(processor, "has", {"amx_bf16"}.__contains__)
    assert not precision_notes(config, cpu) and memory_format(cpu) == torch.channels_last


def test_runs_of_one_process_may_have_different_precisions(tmp_path: Path) -> None:
    """accelerate keeps a process's first precision; a notebook trains more than once."""
    for precision in ("bf16", "no", "bf16"):
        config = replace(TOY, precision=precision)
        trainer = Trainer(Toy(), config, tmp_path / f"{precision}{len(list(tmp_path.iterdir()))}")
        assert trainer.accelerator.mixed_precision == precision


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [16, 24, 64, 77])
def test_gradients_of_attention_are_numbers_where_all_logits_are_low(tmp_path: Path, keys: int) -> None:
    """cuDNN's attention gives NaN there on Hopper, in 16 bits, for some lengths: training does without."""
    accelerator_for(LoopConfig(pictures=8), tmp_path)
    width = 32
    query, key, value = (
        torch.randn(4, length, width, device="cuda", dtype=torch.bfloat16) * 0.1
        for length in (64, keys, keys)
    )
    query[..., 0], key[..., 0] = 1.0, -120 * width**0.5
    for each in (query, key, value):
        each.requires_grad_()
    attend(query, key, value, heads=1).float().square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in (query, key, value))
