"""Tensors to pictures, pictures to grids."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_numpy(pictures: Tensor) -> "np.ndarray":
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) float32."""
    return pictures.permute(0, 2, 3, 1).float().cpu().numpy()


def to_pil(pictures: Tensor) -> "list[Image]":
    """(B, 3, H, W) in [0, 1] to 8-bit PIL pictures."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in (to_numpy(pictures) * 255).round().astype(np.uint8)]


def grid(pictures: "list[Image]", columns: int) -> "Image":
    """Pictures of one size, row by row; a last row that is not full ends in white."""
    from PIL import Image

    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
