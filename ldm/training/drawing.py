"""Pictures of a model in training: what validation shows, and the class pictures of DreamBooth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.conditioning.control import Control
from ldm.diffusion.plan import plan
from ldm.errors import UserError
from ldm.pictures import grid, to_pil
from ldm.sampling import Guidance, controlled, decode, prepare, sample
from ldm.system import System

if TYPE_CHECKING:
    from PIL.Image import Image

_PIXELS = 2**19  # drawn at once: 32 pictures of 128 px, 2 of 512 px


@dataclass(frozen=True)
class ValidationConfig:
    """The pictures that are drawn at every validation: a column a prompt, a row a seed."""

    prompts: tuple[str, ...] = ()
    seeds: int = 2
    steps: int = 20
    guidance: float = 3.5

    @property
    def count(self) -> int:
        """How many pictures that is."""
        return len(self.prompts) * self.seeds

    def draw(
        self,
        system: System,
        resolution: int | None,
        channels: Tensor | None = None,
        controls: Sequence[Control] = (),
    ) -> "Image":
        """Draw the grid.

        resolution: of squares, in pixels; None is the model's own. channels: for an inpainting network,
        (count, 1 + C, h, w): masks and the latents of what is to be seen, which then decide the size. controls: with
        (count, 3, H, W) pictures, which then do.
        """
        prompts = list(self.prompts) * self.seeds
        seeds = [seed for seed in range(self.seeds) for _ in self.prompts]
        side = resolution or system.default_size
        size = (side, side)
        if channels is not None:
            factor = system.autoencoder.config.factor
            size = (channels.shape[2] * factor, channels.shape[3] * factor)
        if controls:
            size = (controls[0].image.shape[2], controls[0].image.shape[3])
        drawn = draw(system, prompts, seeds, self.steps, self.guidance, size, channels, controls)
        return grid(drawn, len(self.prompts))


def check_steps(where: str, system: System, steps: int) -> None:
    """Raise UserError where the system's scheduler can't draw in so many steps. where: the key."""
    try:
        plan(system.scheduler, steps)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@torch.no_grad()
def draw(
    system: System,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: tuple[int, int] | None = None,
    channels: Tensor | None = None,
    controls: Sequence[Control] = (),
) -> "list[Image]":
    """Draw one picture for each prompt with its seed, as the system's own scheduler samples, where its network is.

    size: (height, width) in pixels; None is the model's own. channels: for an inpainting network, (B, 1 + C, h, w):
    masks and the latents of what is to be seen. controls: with B pictures.
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
        steering = [replace(each, image=each.image[some]) for each in controls]
        request = controlled(system, request, steering)
        pictures += to_pil(decode(system.autoencoder, sample(system, request)))
    return pictures
