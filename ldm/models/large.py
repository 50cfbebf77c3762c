"""The autoencoder on pictures of any size: at once where memory is enough, else one by one, else in strips of rows.

`tile` in all that follows: None decides by the memory that is free; 0 always computes all at once; a number of pixels
always computes in strips of about a square of that side (see `ldm.models.tiling`: the same up to rounding, slower,
without a gradient).
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian, FirstStageConfig
from ldm.models.tiling import decode_in_strips, encode_in_strips

TILE = 384  # where nobody says
SMALLEST_TILE = 64
_MARGIN = 1.1  # of an estimate of memory
_CGROUPS = (  # limit, use, and the name of that part of it that the system can take back; version 2, then 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def decode(autoencoder: AutoencoderKL, latent: Tensor, tile: int | None = None) -> Tensor:
    """Return what `autoencoder.decode` does. Raises UserError for a tile that can't be."""
    pixels = latent.shape[-2] * latent.shape[-1] * autoencoder.config.factor**2
    needed = decoding_memory(autoencoder.config, pixels, latent.element_size())
    parts = [
        decode_in_strips(autoencoder, part, strip) if strip else autoencoder.decode(part)
        for part, strip in _parts(autoencoder, latent, tile, needed)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def encode(autoencoder: AutoencoderKL, picture: Tensor, tile: int | None = None) -> DiagonalGaussian:
    """Return what `autoencoder.encode` does. Raises UserError for a size or a tile that can't be."""
    (height, width), factor = picture.shape[-2:], autoencoder.config.factor
    if height % factor or width % factor or not picture.numel():
        raise UserError(
            f"a picture of {width} x {height} pixels can't be encoded: sizes are multiples of {factor}"
        )
    needed = encoding_memory(autoencoder.config, height * width, picture.element_size())
    parts = [
        encode_in_strips(autoencoder, part, strip) if strip else autoencoder.encode(part)
        for part, strip in _parts(autoencoder, picture, tile, needed)
    ]
    if len(parts) == 1:
        return parts[0]
    return DiagonalGaussian(
        torch.cat([each.mean for each in parts]), torch.cat([each.logvar for each in parts])
    )


def _parts(
    autoencoder: AutoencoderKL, rows: Tensor, tile: int | None, needed: float
) -> Iterator[tuple[Tensor, int]]:
    """The rows that are computed together, and the side of a strip's square, 0 for none. needed: bytes for one row."""
    if tile is None:
        tile = _tile_needed(autoencoder, rows, needed)
    elif tile and tile < SMALLEST_TILE:
        raise UserError(f"tile is {tile}: give {SMALLEST_TILE} pixels or more, 0 for none, or leave it out")
    elif not tile:
        tile = None
    yield from [(rows, 0)] if tile is None else ((row[None], tile) for row in rows)


def _tile_needed(autoencoder: AutoencoderKL, rows: Tensor, needed: float) -> int | None:
    """None where all rows fit into memory at once, or must for their gradient; 0 where each alone fits."""
    if torch.is_grad_enabled() and (
        rows.requires_grad or any(p.requires_grad for p in autoencoder.parameters())
    ):
        return None
    free = free_memory(rows.device)
    if free is None or needed * len(rows) <= free:
        return None
    return TILE if needed > free else 0


def decoding_memory(config: FirstStageConfig, pixels: int, itemsize: int) -> float:
    """Return the bytes that decoding to so many pixels (of all pictures together) at once takes, beyond the weights."""
    widths = config.block_out_channels
    # A stage begins with what the one before has enlarged.
    return _peak(list(zip((*widths[1:], widths[-1]), widths, strict=True))) * pixels * itemsize


def encoding_memory(config: FirstStageConfig, pixels: int, itemsize: int) -> float:
    """Return the bytes that encoding so many pixels at once takes, beyond the weights."""
    widths = config.block_out_channels
    return _peak(list(pairwise((widths[0], *widths)))) * pixels * itemsize


def _peak(stages: list[tuple[int, int]]) -> float:
    """Numbers a pixel at the peak. stages: channels before and within, from the largest maps on, each half as large.

    A residual block holds its input, what its norm made of it, and what its convolution makes of that; these two once
    more, in the order that convolutions want; and the input of its stage. Measured in docs/large-pictures.md.
    """
    return _MARGIN * max(
        max(3 * before + 2 * within, before + 5 * within) / 4**i for i, (before, within) in enumerate(stages)
    )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can be had on a device; None where nothing says so."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    import psutil

    allowed = _allowed(Path("/sys/fs/cgroup"))
    free = int(psutil.virtual_memory().available)
    return free if allowed is None else min(free, allowed)


def _allowed(root: Path) -> int | None:
    """Bytes that a container's limit leaves; None where there is no limit."""
    for limit, use, stat, back in _CGROUPS:
        try:
            lines = (line.split() for line in (root / stat).read_text().splitlines())
            reclaimable = next(int(value) for name, value in lines if name == back)
            return max(int((root / limit).read_text()) - int((root / use).read_text()) + reclaimable, 0)
        except (OSError, ValueError, StopIteration):  # no such file, or "max"
            continue
    return None
