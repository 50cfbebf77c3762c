"""Masks for inpainting in training, and the channels that tell a network of them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.masks import random_mask
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.data.latents import encode
from ldm.training.distributed import BatchGenerator


def draw_masks(pictures: Tensor, rng: BatchGenerator) -> Tensor:
    """Draw random masks for pictures (B, 3, H, W): (B, 1, H, W) on the CPU, 1 where something is to be drawn."""
    seeds = (rng.uniform() * 2**24).long().tolist()
    height, width = pictures.shape[-2:]
    masks = np.stack([random_mask(height, width, np.random.default_rng(seed)) for seed in seeds])
    return torch.from_numpy(masks)[:, None].float()


def middle_masks(pictures: Tensor) -> Tensor:
    """Return masks (B, 1, H, W) of the middle of pictures (B, 3, H, W), half as high and as wide."""
    masks = torch.zeros_like(pictures[:, :1])
    height, width = masks.shape[-2:]
    masks[:, :, height // 4 : -(height // 4), width // 4 : -(width // 4)] = 1
    return masks


@torch.no_grad()
def inpainting_channels(
    autoencoder: AutoencoderKL, pictures: Tensor, masks: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return masks and the latents of what lies outside of them, (B, 1 + C, h, w), where the autoencoder is.

    As in diffusers' inpainting pipeline: what is to be drawn is grey, masks shrink to the nearest pixels.
    pictures: (B, 3, H, W) in [-1, 1]. dtype: what the encoder computes in, under autocast.
    """
    device = next(autoencoder.parameters()).device
    pictures, masks = pictures.to(device), masks.to(device)
    latents = encode(autoencoder, pictures * (masks < 0.5), dtype).mean
    return torch.cat([F.interpolate(masks, size=latents.shape[-2:]), latents], dim=1)
