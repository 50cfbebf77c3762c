"""A preview that costs no decode: a linear map from latents to colours."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import to_pil, to_unit_range

if TYPE_CHECKING:
    from PIL.Image import Image

_CELLS, _PICTURES = 8, 16


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
