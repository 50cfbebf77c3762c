"""Previews, which cost little: by a tiny decoder, or where there is none by a linear map from latents to colours."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component
from ldm.checkpoints.hub import resolve
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.autoencoder_tiny import AutoencoderTiny, TinyConfig
from ldm.models.diffusers_config import check_layers
from ldm.pictures import to_pil, to_unit_range
from ldm.system import System
from pipelines.turns import Turns

if TYPE_CHECKING:
    from PIL.Image import Image

_CELLS, _PICTURES = 8, 16


class Preview(Protocol):
    """What makes pictures of latents (B, C, h, w) as the U-Net has them."""

    def __call__(self, latents: Tensor) -> "list[Image]": ...


class Previews:
    """The previews of one pipeline: by the tiny autoencoder of its system, read at the first one, else linear."""

    def __init__(self, system: System, device: torch.device, turns: Turns):
        self.system, self.device, self._turns = system, device, turns
        self._preview: Preview | None = None

    def load(self, name: str | Path) -> None:
        """Preview by another tiny autoencoder from now on, which is then saved with the system.

        name: a folder of diffusers' AutoencoderTiny, or a hub id. Raises UserError, also for one of other latents.
        """
        folder = resolve(name).resolve()
        with self._turns.turn(self.device):
            self._preview = self._tiny(folder)
            self.system.preview = folder

    def to(self, device: torch.device) -> None:
        """Follow the system to a device and into its precision."""
        self.device = device
        if isinstance(self._preview, TinyPreview):
            self._preview.network.to(device, self.system.network.dtype)

    def __call__(self, latents: Tensor) -> "list[Image]":
        """latents: (B, C, h, w) as the U-Net has them. Raises UserError for a tiny autoencoder that can't be read."""
        if self._preview is None:
            folder, autoencoder = self.system.preview, self.system.autoencoder
            self._preview = LatentPreview(autoencoder) if folder is None else self._tiny(folder)
        return self._preview(latents)

    def _tiny(self, folder: Path) -> "TinyPreview":
        network = load_tiny(folder, self.system.autoencoder.config)
        return TinyPreview(network.to(self.device, self.system.network.dtype))


class TinyPreview:
    """Decodes by a tiny autoencoder: pictures of their full size."""

    def __init__(self, network: AutoencoderTiny):
        self.network = network

    def __call__(self, latents: Tensor) -> "list[Image]":
        """latents: (B, C, h, w) as the U-Net has them. They are decoded one by one, in little memory."""
        weight = next(self.network.decoder.parameters())
        unscaled = self.network.unscale(latents).to(weight)
        return to_pil(to_unit_range(torch.cat([self.network.decode(each) for each in unscaled.split(1)])))


def load_tiny(folder: Path, config: AutoencoderConfig) -> AutoencoderTiny:
    """Load the tiny autoencoder in a folder, for the latents of a model whose autoencoder has this config.

    Raises UserError, also for one of other latents.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give that of a tiny autoencoder, with its config.json")
    found, tensors = read_component(folder.parent, folder.name)
    tiny = TinyConfig.from_diffusers(found, f"{folder}/config.json")
    tiny.check_fits(config.latent_channels, config.factor, f"{folder}")
    check_layers(tiny.layers, f"{folder}", len(tensors))
    with torch.device("meta"):
        network = AutoencoderTiny(tiny)
    load_strict(network, tensors, folder)
    return network.eval().requires_grad_(False)


class LatentPreview:
    """Fits, once, the best linear map from an autoencoder's latents to the mean colour of the pixels they cover.

    It learns from the encodings of random colour fields, so it needs no table of published factors and works for any
    autoencoder.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        parameter = next(autoencoder.parameters())
        self.autoencoder = autoencoder
        rng = torch.Generator().manual_seed(0)
        coarse = torch.rand(_PICTURES, 3, _CELLS // 2, _CELLS // 2, generator=rng) * 2 - 1
        cells = F.interpolate(coarse, size=(_CELLS, _CELLS), mode="bilinear")  # (N, 3, h, w): smooth fields
        pictures = F.interpolate(cells, scale_factor=float(autoencoder.config.factor)).to(parameter)
        latents = autoencoder.scale(autoencoder.encode(pictures).mean).float().cpu()
        features = _with_one(latents).permute(0, 2, 3, 1).flatten(0, 2)  # (N*h*w, C + 1)
        self.map = torch.linalg.lstsq(
            features, cells.permute(0, 2, 3, 1).flatten(0, 2)
        ).solution  # (C + 1, 3)

    def __call__(self, latents: Tensor) -> "list[Image]":
        """latents: (B, C, h, w) as the U-Net has them. Returns pictures of w x h pixels."""
        colours = torch.einsum("bchw,cd->bdhw", _with_one(latents.float().cpu()), self.map)
        return to_pil(to_unit_range(colours))


def _with_one(latents: Tensor) -> Tensor:
    return torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
