"""A tiny autoencoder for previews, distilled from the frozen one of a model (TAESD, madebyollin)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.checkpoints.folder import PREVIEW, write_component
from ldm.data.packages import PACKAGES_FOLDER
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_tiny import AutoencoderTiny, TinyConfig
from ldm.system import bundled_model
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import Batch
from ldm.training.data.kinds import Data
from ldm.training.distributed import BatchGenerator
from ldm.training.reconstruction import (
    Pixel,
    check_sides,
    perceptual_distance,
    psnr,
    reconstruction_loss,
    whole_pictures,
    write_pairs,
)
from ldm.training.start import BUNDLED, load_autoencoder


@dataclass(frozen=True)
class Config:
    """Loss weights and data.

    data: see `Config` of the first stage's objective, as of crop, packages, pixel, perceptual, validation_pictures.
    base: a folder that holds the `vae` to learn from, or "bundled".
    teaching: the precision in which that computes, while training; validation is in float32.
    model: the tiny network's settings.
    latent: weight of the encoder's squared error in the latents, which are of about unit variance.
    """

    data: Data
    base: str = BUNDLED
    teaching: Literal["float32", "bfloat16"] = "float32"
    model: TinyConfig = field(default_factory=TinyConfig)
    packages: str = str(PACKAGES_FOLDER)
    crop: int | None = 64
    pixel: Pixel = "l1"
    perceptual: float = 0.1
    latent: float = 1.0
    validation_pictures: int = 256

    def check(self) -> None:
        """Raises UserError for settings that contradict each other."""
        refuse_outside("preview", self, ("validation_pictures", "crop"), 1)
        refuse_outside("preview", self, ("perceptual", "latent"), 0)
        self.model.check("preview.model")
        self.data.check("preview.data")


class Objective:
    """The decoder learns the pictures that the frozen one makes of its latents, the encoder the latents."""

    watched = "loss"

    def __init__(self, config: Config):
        config.check()
        self.config = config
        self.examples = config.data.examples("preview.data", config.crop, config.validation_pictures)
        self.teacher = _teacher(config.base).to(getattr(torch, config.teaching))
        self.tiny = AutoencoderTiny(config.model)
        _check_fits(config.model, self.teacher)
        check_sides("preview", config.data, config.crop, self.examples.side, config.model.factor)
        self.model: nn.Module = self.tiny
        self.distance, self._without = perceptual_distance(config.packages, config.perceptual, "preview")

    def helpers(self) -> Mapping[str, nn.Module]:
        """Return the frozen networks beside `model`."""
        return {"vae": self.teacher} | ({"perceptual": self.distance} if self.distance else {})

    def prepare(self, device: torch.device, batch_size: int) -> None:
        for each in self.helpers().values():
            each.to(device)

    def batch(self, start: int, size: int, rows: slice) -> Batch:
        """Return crops of `crop` pixels a side."""
        return self.examples.cuts(start, size, rows)

    def loss(self, model: nn.Module, batch: Batch, rng: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batch.to(next(model.parameters()).device)
        latents, target = _taught(self.teacher, batch.pictures)
        decoded, encoded = model(batch.pictures, latents)
        how = (self.config.pixel, self.config.perceptual, self.distance)
        total, logs = reconstruction_loss(decoded.float(), target, *how)
        latent = (encoded.float() - latents).square().mean()
        return total + self.config.latent * latent, logs | {"latent": latent}

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Return PSNR (dB) to the frozen decoder's pictures and the encoder's error (rms); write both's decodings."""
        assert isinstance(model, AutoencoderTiny)
        ratios: list[float] = []
        errors: list[float] = []
        device = next(model.parameters()).device
        exact = _teacher(self.config.base).to(device)
        for batch in whole_pictures(self.examples, self.examples.held_out, device):
            latents, target = _taught(exact, batch.pictures)
            decoded, encoded = model(batch.pictures, latents)
            decoded, target = decoded.clamp(-1, 1), target.clamp(-1, 1)
            if not ratios:
                write_pairs(folder / f"decoded-{seen:08d}.png", target, decoded)
            ratios += psnr(decoded, target)
            errors += (encoded - latents).square().mean((1, 2, 3)).tolist()
        return {"psnr": sum(ratios) / len(ratios), "latent_error": (sum(errors) / len(errors)) ** 0.5}

    def notes(self) -> list[str]:
        return [*self.examples.notes(), *self._without]

    @torch.no_grad()
    def export(self, model: nn.Module, folder: Path, config: str = "") -> None:
        """Write the network in float16, by the name under which a model's folder holds one for its previews."""
        assert isinstance(model, AutoencoderTiny)
        tensors = {name: each.half() for name, each in model.state_dict().items()}
        write_component(folder, PREVIEW, model.config.to_diffusers(), tensors)


def _teacher(base: str) -> AutoencoderKL:
    if base != BUNDLED and not Path(base).is_dir():
        raise UserError(f"preview.base: there is no folder {base}: give one that holds the vae to learn from")
    teacher = load_autoencoder(bundled_model() if base == BUNDLED else Path(base))
    if teacher.config.num_class_embeds:
        raise UserError(
            f"preview.base: the vae of {base} is conditioned on labels, which a preview has none of"
        )
    return teacher


@torch.no_grad()
def _taught(teacher: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The latents (B, C, h, w) of pictures, as a U-Net sees them, and what the frozen decoder makes of them."""
    latents = teacher.encode(pictures.to(next(teacher.parameters()).dtype)).mean
    return teacher.scale(latents).float(), teacher.decode(latents).float()


def _check_fits(config: TinyConfig, teacher: AutoencoderKL) -> None:
    """Raise UserError where the tiny network is of other latents, or doesn't come to the pictures' size."""
    config.check_fits(teacher.config.latent_channels, teacher.config.factor, "preview.model")
    if config.in_channels != teacher.config.in_channels:
        raise UserError(
            f"preview.model.in_channels is {config.in_channels}, and the pictures have {teacher.config.in_channels}"
        )
    levels = len(config.num_encoder_blocks)
    if 2 ** (levels - 1) != teacher.config.factor:
        raise UserError(
            f"preview.model: {levels} num_encoder_blocks halve a picture {levels - 1} times, where the autoencoder's "
            f"factor is {teacher.config.factor}"
        )
    if (config.scaling_factor, config.shift_factor) != (1, 0):
        raise UserError(
            "preview.model: leave scaling_factor at 1 and shift_factor at 0: it learns latents as they are scaled"
        )
