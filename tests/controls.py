"""Tiny ControlNets with random weights, made and saved by diffusers, and pictures to show them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import Family, randomize, tiny_unet
from torch import nn


def tiny_controlnet(family: Family, seed: int = 7, **settings: Any) -> Any:
    """diffusers' ControlNetModel for `tiny_unet(family)`; pictures have twice the latents' sides. No layer is zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    own = {"conditioning_embedding_out_channels": (8, 16)} | settings
    pooled = own.pop("global_pool_conditions", False)
    network = ControlNetModel.from_unet(tiny_unet(family), **own)
    network.register_to_config(global_pool_conditions=pooled)
    return louder(network, seed)


def louder(network: nn.Module, seed: int = 7) -> nn.Module:
    """Weights in place of zeros, large enough to move a picture."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in network.named_parameters():
            if each.ndim == 4 and name.startswith("controlnet_"):
                each.copy_(torch.randn(each.shape, generator=generator) * each[0].numel() ** -0.5)
    return randomize(network, seed)


def saved_controlnet(folder: Path, family: Family, seed: int = 7, **settings: Any) -> Path:
    tiny_controlnet(family, seed, **settings).save_pretrained(folder)
    return folder


def control_picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Rectangles in random colours, (width, height) `size`."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for _ in range(6):
        y, x = rng.integers(0, size[1] // 2), rng.integers(0, size[0] // 2)
        pixels[y : y + size[1] // 2, x : x + size[0] // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)
