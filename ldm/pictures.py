"""Pictures to tensors and back, and sheets of several."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) of one size to (B, 3, H, W) float32 in [-1, 1], as networks see them."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_unit_range(pictures: Tensor) -> Tensor:
    """What a decoder gave, about in [-1, 1], as float32 in [0, 1], clamped."""
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def to_numpy(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) float32."""
    return pictures.permute(0, 2, 3, 1).float().cpu().numpy()


def to_pil(pictures: Tensor) -> "list[Image]":
    """(B, 3, H, W) in [0, 1] to 8-bit PIL pictures."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in (to_numpy(pictures) * 255).round().astype(np.uint8)]


def png(picture: "Image", metadata: "PngInfo | None" = None) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=metadata)
    return buffer.getvalue()


def grid(pictures: "Sequence[Image]", columns: int) -> "Image":
    """Pictures of one size, row by row; a last row that is not full ends in white."""
    from PIL import Image

    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
