"""Pictures of a model in training: what validation shows, and the class pictures of DreamBooth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.conditioning.text import concatenate, encode_pair
from ldm.diffusion.driver import Noise
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.plan import plan
from ldm.pictures import to_pil, to_unit_range
from ldm.system import System

if TYPE_CHECKING:
    from PIL.Image import Image

_PIXELS = 2**19  # drawn at once: 32 pictures of 128 px, 2 of 512 px


@torch.no_grad()
def draw(
    system: System,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: tuple[int, int] | None = None,
    known: Tensor | None = None,
) -> "list[Image]":
    """One picture for each prompt with its seed, as the system's own scheduler samples them, where its U-Net is.

    size: (height, width) in pixels; None is the model's own. known: for an inpainting U-Net, (B, 1 + C, h, w): masks
    and the latents of what is to be seen.
    """
    pictures: list[Image] = []
    height, width = size or (system.default_size, system.default_size)
    at_once = max(1, _PIXELS // (height * width))
    for start in range(0, len(prompts), at_once):
        some = slice(start, start + at_once)
        some_known = None if known is None else known[some]
        latents = _sample(system, prompts[some], seeds[some], steps, guidance, (height, width), some_known)
        weight = system.autoencoder.decoder.conv_in.weight
        decoded = system.autoencoder.decode(system.autoencoder.unscale(latents).to(weight.dtype))
        pictures += to_pil(to_unit_range(decoded))
    return pictures


def _sample(
    system: System,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: tuple[int, int],
    known: Tensor | None,
) -> Tensor:
    weight, (height, width) = system.unet.conv_in.weight, size
    positive, negative, _ = encode_pair(system.text, prompts)
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=weight.device)
    condition = concatenate([negative, positive]).to(weight.device, weight.dtype)
    bound = system.bind(condition, time_ids.expand(len(condition.hidden), -1))

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        seen = [] if known is None else [torch.cat([known, known])[-len(x) :]]
        return bound(torch.cat([x, *seen], dim=1), timestep)

    how = plan(system.scheduler, steps, is_xl=system.is_xl)
    config = system.autoencoder.config
    shape = (config.latent_channels, height // config.factor, width // config.factor)
    denoise = classifier_free(how.denoiser(network), guidance)
    return how.sample(denoise, Noise(list(seeds), shape, weight.device))
