"""The distillation of a tiny autoencoder: what each half learns, exact resume, and what the export is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from killed import BATCHES, same_bits_after_kills
from training_runs import LOOP, TINY_VAE, write_config

from ldm.checkpoints.folder import PREVIEW, write_component
from ldm.emoji.mixture import MixtureConfig
from ldm.emoji.pools import CompositionsConfig
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.autoencoder_tiny import TinyConfig
from ldm.models.perceptual import EfficientNetLite0
from ldm.training import reconstruction
from ldm.training.distributed import BatchGenerator
from ldm.training.objectives import preview
from ldm.training.run import train

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (0, 1),
    "num_decoder_blocks": (1, 0),
}
MIXTURE: dict[str, Any] = {"size": 32, "things": ["tree", "star", "rocket"], "styles": ["3d"]}


@pytest.fixture(autouse=True)
def perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())


def first_stage(folder: Path, **changes: Any) -> AutoencoderKL:
    """A random one, in a folder of its own, whose latents a U-Net sees scaled."""
    torch.manual_seed(1)
    vae = AutoencoderKL(AutoencoderConfig.from_diffusers({**TINY_VAE, "scaling_factor": 2.5, **changes}))
    write_component(folder, "vae", vae.config.to_diffusers(), vae.state_dict())
    return vae.eval().requires_grad_(False)


def settings(folder: Path, sprites: str, **changes: Any) -> preview.Config:
    data = CompositionsConfig(MixtureConfig(**MIXTURE), sprites)
    shared = {"base": str(folder), "crop": 16, "perceptual": 0.0, "validation_pictures": 4}
    return preview.Config(**{"data": data, "model": TinyConfig(**TINY), **shared, **changes})


def test_the_decoder_learns_the_first_stages_pictures_and_the_encoder_its_latents(
    tmp_path: Path, sprites: str
) -> None:
    vae = first_stage(tmp_path)
    torch.manual_seed(0)
    made = preview.Objective(settings(tmp_path, sprites, latent=0.5, pixel="l2", perceptual=0.1))
    batch = made.batch(8, 4, slice(None))
    total, logs = made.loss(made.model, batch, BatchGenerator(0, 4, slice(None)))
    latents = 2.5 * vae.encode(batch.pictures).mean
    target = vae.decode(latents / 2.5)
    decoded, encoded = made.tiny.decode(latents), made.tiny.encode(batch.pictures)
    assert made.distance is not None
    terms = {
        "l2": (decoded - target).square().mean(),
        "perceptual": made.distance(decoded, target).mean(),
        "latent": (encoded - latents).square().mean(),
    }
    torch.testing.assert_close(logs, terms)
    torch.testing.assert_close(total, terms["l2"] + 0.1 * terms["perceptual"] + 0.5 * terms["latent"])
    total.backward()
    assert all(each.grad is not None and each.grad.any() for each in made.tiny.parameters())
    assert all(each.grad is None for network in made.helpers().values() for each in network.parameters())


def test_validation_is_against_the_first_stages_decodings(tmp_path: Path, sprites: str) -> None:
    vae = first_stage(tmp_path)
    made = preview.Objective(settings(tmp_path, sprites))
    figures = made.validate(made.tiny.eval(), tmp_path, 0)
    pictures = made.examples.whole(0, 4).pictures
    with torch.no_grad():
        latents = vae.scale(vae.encode(pictures).mean)
        target, decoded = (
            vae.decode(vae.unscale(latents)).clamp(-1, 1),
            made.tiny.decode(latents).clamp(-1, 1),
        )
        error = (made.tiny.encode(pictures) - latents).square().mean().sqrt()
    # of a range of 2, so that the peak's square is 4
    ratios = [10 * torch.log10(4 / each.square().mean()) for each in decoded - target]
    assert figures["psnr"] == pytest.approx(sum(ratios).item() / 4, rel=1e-5)
    assert figures["latent_error"] == pytest.approx(error.item(), rel=1e-5)
    assert (tmp_path / "decoded-00000000.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": TinyConfig(**{**TINY, "latent_channels": 3})}, "preview.model has 3 latent channels"),
        ({"model": TinyConfig(**{**TINY, "num_decoder_blocks": (1,) * 3, "decoder_block_out_channels": (8,) * 3})},
         "preview.model has 4 pixels a side"),
        ({"model": TinyConfig(**{**TINY, "num_encoder_blocks": (1,), "encoder_block_out_channels": (8,)})},
         "1 num_encoder_blocks halve a picture 0 times"),
        ({"model": TinyConfig(**{**TINY, "scaling_factor": 0.5})}, "leave scaling_factor at 1"),
        ({"model": TinyConfig(**{**TINY, "in_channels": 1})}, "preview.model.in_channels is 1"),
        ({"base": "nowhere"}, "preview.base: there is no folder nowhere"),
        ({"crop": 15}, "preview.crop is 15: make it a multiple of 2"),
        ({"latent": -1.0}, "preview.latent"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, sprites: str, changes: dict[str, Any], message: str
) -> None:
    first_stage(tmp_path)
    with pytest.raises(UserError, match=message):
        preview.Objective(settings(tmp_path, sprites, **changes))


def run_file(folder: Path, sprites: str, **loop: Any) -> Path:
    folder.mkdir()
    first_stage(folder)
    objective = {
        "base": str(folder),
        "model": {name: list(each) if isinstance(each, tuple) else each for name, each in TINY.items()},
        "data": {"kind": "compositions", "sprites": sprites, "mixture": MIXTURE},
        "crop": 16,
        "perceptual": 0.0,
        "validation_pictures": 4,
    }
    return write_config(folder, {"loop": {**LOOP, **loop}, "preview": objective})


HEAD = """
    import torch
    torch.set_num_threads(1)
    import ldm.emoji.pools
    from ldm.models.perceptual import EfficientNetLite0
    from ldm.training import reconstruction, run
    reconstruction.load_efficientnet = lambda packages: EfficientNetLite0()
"""


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, sprites: str) -> None:
    loop = {"pictures": 8 * BATCHES, "save_every": 8}
    same_bits_after_kills(
        *(run_file(tmp_path / name, sprites, **loop) for name in ("whole", "killed")), 1, HEAD
    )


def test_the_export_is_diffusers_own(tmp_path: Path, sprites: str) -> None:
    from diffusers import AutoencoderTiny as Theirs

    path = run_file(tmp_path / "made", sprites, pictures=16)
    assert train(path)
    theirs = Theirs.from_pretrained(tmp_path / "made" / "run" / "export" / PREVIEW, torch_dtype=torch.float16)
    assert theirs.dtype is torch.float16 and theirs.config.latent_channels == 4
    assert theirs.float().decode(torch.zeros(1, 4, 2, 2)).sample.shape == (1, 3, 4, 4)
