"""Training: the loop's exact resume, the objectives, the latent pool, on sprites and networks made here."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from tiny import tiny_bert_folder

from ldm.checkpoints.folder import write_component
from ldm.data.sprites import SpriteSet
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.critics import EfficientNetLite0, PerceptualDistance
from ldm.training import autoencoder as first_stage
from ldm.training.autoencoder import AutoencoderObjective, AutoencoderObjectiveConfig, normalise
from ldm.training.ema import EMA
from ldm.training.loop import LoopConfig, Trainer, learning_rate
from ldm.training.run import RunConfig, build_objective, train
from ldm.training.text_to_image import TextToImageObjective
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
        from ldm.config import load_yaml

        objective = load_yaml(path, RunConfig).text_to_image
        assert objective
        super().__init__(objective)

    def batch(self, start: int, size: int):  # type: ignore[no-untyped-def]
        batch = super().batch(start, size)
        if start >= 24:
            batch.latents.fill_(float("nan"))
        return batch


def test_the_first_stage_learns(tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_stage, "load_critic", lambda packages: EfficientNetLite0())
    settings = AutoencoderObjectiveConfig(
        model=AutoencoderConfig.from_diffusers(TINY_VAE), sprites=sprites, crop=16, validation_pictures=32
    )
    settings.recipe.things[:] = ["tree", "star", "rocket"]
    settings.recipe.styles[:] = ["3d"]
    torch.manual_seed(0)
    trainer = Trainer(
        AutoencoderObjective(settings),
        LoopConfig(
            pictures=960, batch_size=16, learning_rate=3e-3, warmup=64, ema_half_life=64, precision="no"
        ),
        tmp_path,
    )
    first = trainer.step()["l1"]
    assert trainer.run()
    assert trainer.step()["l1"] < 0.5 * first
    assert (tmp_path / "export" / "vae" / "config.json").exists()


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
