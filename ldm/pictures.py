"""Picture files opened, pictures to tensors and back, and sheets of several."""

import io
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile
    from PIL.PngImagePlugin import PngInfo

# Raster formats by Pillow's names. Left to choose, Pillow also hands PostScript to Ghostscript, which runs it.
RASTERS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
LARGEST_SHEET = 178_956_970  # pixels: of more, Pillow refuses to open a file (twice its MAX_IMAGE_PIXELS)


def open_raster(content: bytes, formats: Sequence[str] = RASTERS) -> "ImageFile":
    """Open a picture file's bytes as one of `formats`, whatever its name ends in; of an animation, the first frame.

    It is the one place that opens pictures. Raises what Pillow raises, UnidentifiedImageError for another format.
    """
    from PIL import Image

    return Image.open(io.BytesIO(content), formats=[each for each in formats if each in _decoders()])


@cache
def _decoders() -> frozenset[str]:
    """The formats that this Pillow was built to read; it may lack WebP and AVIF."""
    from PIL import Image, features

    Image.init()
    lacking = {each for each in ("WEBP", "AVIF") if each in Image.OPEN and not features.check(each.lower())}
    return frozenset(Image.OPEN) - lacking


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """Convert uint8 pictures (H, W, 3) of one size to (B, 3, H, W) float32 in [-1, 1], as networks see them."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_unit_range(pictures: Tensor) -> Tensor:
    """Return what a decoder gave, about in [-1, 1], as float32 in [0, 1], clamped."""
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def to_numpy(pictures: Tensor) -> np.ndarray:
    """Convert (B, 3, H, W) in [0, 1] to (B, H, W, 3) float32."""
    return pictures.permute(0, 2, 3, 1).float().cpu().numpy()


def to_pil(pictures: Tensor) -> "list[Image]":
    """Convert (B, 3, H, W) in [0, 1], or (B, 1, H, W) of grey, to 8-bit PIL pictures in RGB."""
    from PIL import Image

    pictures = pictures.expand(-1, 3, -1, -1)
    return [Image.fromarray(picture) for picture in (to_numpy(pictures) * 255).round().astype(np.uint8)]


def png(picture: "Image", metadata: "PngInfo | None" = None, profile: bytes | None = None) -> bytes:
    """Return the bytes of a PNG file. profile: the ICC profile of its colours, where it has one."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=metadata, icc_profile=profile)
    return buffer.getvalue()


def grid_size(count: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) of a `grid` of `count` pictures.

    Raises UserError for one that no program would open.
    """
    size = columns * width, -(-count // columns) * height
    if max(size) >= 2**31 or size[0] * size[1] > LARGEST_SHEET:
        raise UserError(
            f"a grid of {count:,} pictures in {columns:,} columns would have {size[0]:,} x {size[1]:,} pixels, where "
            f"{LARGEST_SHEET:,} in all are the most: draw fewer on one, or in fewer columns"
        )
    return size


def grid(pictures: "Sequence[Image]", columns: int) -> "Image":
    """Lay out pictures of one size, row by row; a last row that is not full ends in white.

    Raises UserError, as `grid_size`.
    """
    from PIL import Image

    width, height = pictures[0].size
    sheet = Image.new("RGB", grid_size(len(pictures), columns, width, height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def scatter(points: Tensor, reach: float = 3.0, side: int = 320) -> "Image":
    """Draw points (B, 2, 1, 1) as dots: a square of `side` pixels that shows [-reach, reach] both ways."""
    from PIL import Image

    x, y = points.flatten(1).double().cpu().numpy().T
    counts, _, _ = np.histogram2d(-y, x, bins=side, range=[[-reach, reach]] * 2)
    return Image.fromarray((255 * 0.4**counts).astype(np.uint8)).convert("RGB")
