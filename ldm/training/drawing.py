"""Pictures of a model in training: what validation shows, and the class pictures of DreamBooth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.plan import plan
from ldm.pictures import to_pil
from ldm.sampling import Guidance, decode, prepare, sample
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
    channels: Tensor | None = None,
) -> "list[Image]":
    """Draw one picture for each prompt with its seed, as the system's own scheduler samples, where its network is.

    size: (height, width) in pixels; None is the model's own. channels: for an inpainting network, (B, 1 + C, h, w):
    masks and the latents of what is to be seen.
    """
    how = plan(system.scheduler, steps, is_xl=system.is_xl)
    height, width = size or (system.default_size, system.default_size)
    at_once = max(1, _PIXELS // (height * width))
    pictures: list[Image] = []
    for start in range(0, len(prompts), at_once):
        some = slice(start, start + at_once)
        request = prepare(
            system,
            how,
            prompts[some],
            seeds[some],
            guidance=Guidance(guidance),
            size=(height, width),
            channels=None if channels is None else channels[some],
        )
        pictures += to_pil(decode(system.autoencoder, sample(system, request)))
    return pictures
