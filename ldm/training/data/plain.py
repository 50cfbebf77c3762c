"""What a model without text learns from: what is denoised, what the network is told of it, and what is held out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.process import Drawing
from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import grid, scatter, to_pil, to_unit_range
from ldm.sampling import Guidance
from ldm.sampling.plain import draw, prepare
from ldm.system.plain import PlainSystem
from ldm.training.data.examples import Batch, Examples
from ldm.training.data.latents import encode
from ldm.training.data.told import Nothing
from ldm.training.distributed import BatchGenerator

if TYPE_CHECKING:
    from PIL.Image import Image

_AT_ONCE = 64
_SEEN = 64  # pixels along the side of a picture that is seen


@dataclass(frozen=True)
class PlainSource:
    """Pictures, or points, under what a network is told of them.

    autoencoder: of a model of its latents. crop: training sees squares of so many pixels; None for whole pictures.
    """

    examples: Examples
    condition: Nothing
    autoencoder: AutoencoderKL | None = None
    crop: int | None = None

    def clean(self, batch: Batch) -> Tensor:
        """Return what is denoised: the pictures (B, C, h, w), or their latents."""
        if self.autoencoder is None:
            return batch.pictures
        return encode(self.autoencoder, batch.pictures, torch.float32).mean

    def told(self, batch: Batch, side: int, dropped: Tensor | None = None) -> Condition:
        """Return what the network is told. side: of what is denoised. dropped: (B,), where that is nothing."""
        if dropped is None:
            dropped = torch.zeros(len(batch.pictures), dtype=torch.bool)
        return self.condition.condition(batch, dropped, self.examples, side)

    def held_out(self) -> Iterator[tuple[Batch, BatchGenerator]]:
        """Yield all that is held out, each batch with the random numbers that are its own at every validation."""
        for start in range(0, self.examples.held_out, _AT_ONCE):
            size = min(_AT_ONCE, self.examples.held_out - start)
            yield self.centre(start, size), BatchGenerator(start, size, slice(None))

    def centre(self, start: int, size: int) -> Batch:
        """Return whole pictures, those that are held out first, or where training crops, a square of their middles."""
        batch, side = self.examples.whole(start, size), self.crop
        if side is None:
            return batch
        top, left = ((each - side) // 2 for each in batch.pictures.shape[2:])
        cut = slice(top, top + side), slice(left, left + side)
        maps = None if batch.maps is None else batch.maps[:, *cut]
        return replace(batch, pictures=batch.pictures[:, :, *cut], maps=maps)

    def drawn(self, system: PlainSystem, drawing: Drawing, count: int, guidance: float) -> "Image":
        """Draw a sheet of so many pictures, with seeds 0, 1, ..., of each class in turn, told as what is held out."""
        batch = self.centre(0, count)
        if batch.labels is not None and system.labels:
            batch = replace(batch, labels=torch.arange(count) % len(system.labels))
        told = self.told(batch, system.shape[-1])
        return sheet(draw(system, prepare(system, drawing, told, range(count), Guidance(guidance))))


def sheet(drawn: Tensor) -> "Image":
    """Make a sheet of pictures, those that are small enlarged so that they can be seen; of points where they lie."""
    side = drawn.shape[-1]
    if side == 1:
        return scatter(drawn)
    larger = to_unit_range(drawn).repeat_interleave(max(1, _SEEN // side), 2)
    return grid(to_pil(larger.repeat_interleave(max(1, _SEEN // side), 3)), min(10, len(drawn)))
