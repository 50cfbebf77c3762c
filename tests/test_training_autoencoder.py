"""The first stage and its perceptual distance, on sprites and networks made here."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_runs import TINY_VAE, first_stage_config

from ldm.checkpoints.files import read_tensors
from ldm.checkpoints.folder import read_component, write_component
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.perceptual import EfficientNetLite0, PerceptualDistance
from ldm.training import reconstruction
from ldm.training.first_stage import normalise
from ldm.training.loop import LoopConfig, Trainer
from ldm.training.objectives import autoencoder
from ldm.training.optimization import OptimizerConfig
from ldm.training.start import load_autoencoder


def test_the_first_stage_learns(tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())
    monkeypatch.setattr(autoencoder, "_STATISTICS", 256)
    scaled = replace(AutoencoderConfig.from_diffusers(TINY_VAE), scaling_factor=0.5, shift_factor=0.1)
    trainer = Trainer(
        autoencoder.Objective(first_stage_config(sprites, model=scaled, validation_pictures=37)),
        LoopConfig(
            pictures=960,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup=64),
            ema_half_life=64,
            precision="no",
        ),
        tmp_path,
    )
    first = trainer.step()["l1"]
    assert trainer.run()
    assert trainer.step()["l1"] < 0.5 * first
    exported = load_autoencoder(tmp_path / "export")
    assert (exported.config.scaling_factor, exported.config.shift_factor) == (1.0, None)
    objective = trainer.objective
    assert isinstance(objective, autoencoder.Objective)
    means = torch.cat([exported.encode(x.pictures).mean for x in objective._whole(exported, 256)])
    torch.testing.assert_close(means.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(means.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pictures", [1, 5, 8, 37])
def test_any_number_of_validation_pictures(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch, pictures: int
) -> None:
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())
    model = AutoencoderConfig.from_diffusers(TINY_VAE)
    objective = autoencoder.Objective(first_stage_config(sprites, model=model, validation_pictures=pictures))
    assert objective.validate(objective.model.eval(), tmp_path, 7).keys() == {"psnr", "perceptual_distance"}
    assert (tmp_path / "decoded-00000007.png").exists()


def test_a_decoder_learns_and_its_encoder_keeps_its_bits(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from a half-precision file, whose latents have a scale of their own, which stays too."""
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())
    start = AutoencoderKL(replace(AutoencoderConfig.from_diffusers(TINY_VAE), scaling_factor=0.7))
    stored = {name: each.half() for name, each in start.state_dict().items()}
    write_component(tmp_path, "vae", start.config.to_diffusers(), stored)
    settings = first_stage_config(sprites, init=str(tmp_path), train="decoder", validation_pictures=8)
    loop = LoopConfig(
        pictures=480,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=64),
        ema_half_life=64,
        precision="no",
    )
    trainer = Trainer(autoencoder.Objective(settings), loop, tmp_path / "run")
    first = trainer.step()
    assert trainer.run()
    last = trainer.step()
    assert last["loss"] < 0.85 * first["loss"] and "kl" not in last
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
        ({"validation_pictures": 0}, "make it 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            autoencoder.Objective(first_stage_config(sprites, **changes))


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
    model = EfficientNetLite0.from_tensors(package)
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
