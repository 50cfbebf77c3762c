"""Pictures made larger by a network of the ESRGAN family: PIL pictures and tensors, tile by tile."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import file_in, load_strict
from ldm.checkpoints.upscalers import read_upscaler
from ldm.data.pictures import eight_bits
from ldm.errors import UserError
from ldm.models.esrgan import UpscalingNetwork, build_upscaler, in_tiles
from ldm.pictures import LARGEST_SHEET
from ldm.system import bundled
from pipelines.placement import choose_device
from pipelines.uses import BUNDLED

if TYPE_CHECKING:
    from PIL.Image import Image

TILE = 256  # pixels of the source along a tile's side
_SMALLEST_TILE = 16
_FILE = "model.safetensors"
_FARTHEST = (
    48  # pixels of a halo; networks that see no farther are computed exactly, others nearly (see the docs)
)
_BLEED = 4.0  # pixels of the source over which the colour of what is seen spreads under what is clear
_LARGEST_FACTOR = 64


class Upscaler:
    """Enlarges pictures. Memory beyond the two pictures' own doesn't grow with them.

        upscaler = Upscaler.from_pretrained()
        upscaler(picture).save("large.png")

    tile: pixels of the source along a tile's side; 0 computes each picture at once.
    """

    def __init__(self, network: UpscalingNetwork, tile: int = TILE):
        if not isinstance(tile, int) or isinstance(tile, bool) or not (tile == 0 or tile >= _SMALLEST_TILE):
            raise UserError(
                f"tile is {tile!r}: give {_SMALLEST_TILE} pixels or more, or 0 for whole pictures"
            )
        self.network = network.eval().requires_grad_(False)
        self.tile = tile

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        tile: int = TILE,
    ) -> "Upscaler":
        """Load a network.

        path: a `.pth` or `.safetensors` of ESRGAN, Real-ESRGAN or its compact network, or a folder with a
        model.safetensors; None or "bundled" is the network that ships with this package. Raises UserError.
        """
        place = upscaler_file(path)
        file = read_upscaler(place)
        with torch.device("meta"):
            network = build_upscaler(file.kind, file.config)
        load_strict(network, file.tensors, place)
        return cls(network.to(choose_device(device), torch_dtype), tile)

    @property
    def scale(self) -> int:
        """How many times larger the network itself makes a picture."""
        return self.network.scale

    @overload
    def __call__(self, pictures: "Image", outscale: float | None = None) -> "Image": ...

    @overload
    def __call__(self, pictures: Tensor, outscale: float | None = None) -> Tensor: ...

    @overload
    def __call__(self, pictures: "Sequence[Image]", outscale: float | None = None) -> "list[Image]": ...

    def __call__(self, pictures: Any, outscale: float | None = None) -> Any:
        """Return the pictures enlarged, in the form in which they came.

        pictures: a PIL picture or several, of any mode, or a tensor (B, 3, H, W) in [0, 1]. Grey stays grey; what is
        clear stays clear, alpha being enlarged on its own; 16 bits become 8, CMYK becomes RGB, EXIF turns are done.
        outscale: how many times larger; None is the network's own `scale`, for others its picture is resized.
        Returns a tensor as float32, clamped, on the device where it was. Raises UserError.
        """
        factor = float(self.scale if outscale is None else outscale)
        if not (math.isfinite(factor) and 0 < factor <= _LARGEST_FACTOR):
            raise UserError(f"the scale is {outscale}: give more than 0, and {_LARGEST_FACTOR} at the most")
        with torch.inference_mode():
            if isinstance(pictures, Tensor):
                return self._tensor(pictures, factor)
            if isinstance(pictures, Sequence):
                return [self._picture(each, factor) for each in pictures]
            return self._picture(pictures, factor)

    def check(self, size: Sequence[int], factor: float) -> None:
        """Raise UserError for a picture of (height, width) that would get too many pixels, here or on the way."""
        height, width = size
        largest = max(factor, self.scale) ** 2 * width * height
        if not 0 < largest <= LARGEST_SHEET:
            raise UserError(
                f"a picture of {width:,} x {height:,} pixels would get {largest:,.0f}, where {LARGEST_SHEET:,} are the "
                "most: take a smaller one, or a smaller scale"
            )

    def _tensor(self, pictures: Tensor, factor: float) -> Tensor:
        if (
            pictures.ndim != 4
            or pictures.shape[1] != 3
            or not pictures.is_floating_point()
            or not pictures.numel()
        ):
            raise UserError(
                f"a tensor of {tuple(pictures.shape)}, {pictures.dtype}, can't be enlarged: give (B, 3, H, W) in [0, 1]"
            )
        self.check(pictures.shape[-2:], factor)
        size = _larger(pictures.shape[-2:], factor)
        if factor == self.scale:
            return torch.cat([self._grown(each[None]) for each in pictures])
        resized = [
            F.interpolate(self._grown(each[None]), size, mode="bicubic", antialias=True).clamp(0, 1)
            for each in pictures
        ]
        return torch.cat(resized)

    def _picture(self, picture: "Image", factor: float) -> "Image":
        from PIL import Image

        if not isinstance(picture, Image.Image):
            raise UserError(
                f"a {type(picture).__name__} can't be enlarged: give PIL pictures, or a tensor (B, 3, H, W)"
            )
        self.check((picture.height, picture.width), factor)
        try:
            plain = eight_bits(picture)
        except (ValueError, OSError) as error:
            raise UserError(f"the picture can't be enlarged: {error}") from error
        grey, clear = plain.mode.startswith("L"), plain.mode.endswith("A")
        colours = _spread(plain).convert("RGB")
        grown = self._pixels(colours).convert("L" if grey else "RGB")
        if clear:
            grown.putalpha(self._pixels(plain.getchannel("A").convert("RGB")).convert("L"))
        tall, wide = _larger((plain.height, plain.width), factor)
        return grown if factor == self.scale else grown.resize((wide, tall), Image.Resampling.LANCZOS)

    def _pixels(self, picture: "Image") -> "Image":
        from PIL import Image

        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
        return Image.fromarray(self._grown(pixels)[0].permute(1, 2, 0).contiguous().numpy())

    def _grown(self, picture: Tensor) -> Tensor:
        """(1, 3, H, W) to (1, 3, scale*H, scale*W), where the source lies: uint8 for uint8, else float32 in [0, 1]."""
        height, width = picture.shape[-2:]
        wide = torch.uint8 if picture.dtype == torch.uint8 else torch.float32
        grown = torch.empty(1, 3, height * self.scale, width * self.scale, dtype=wide, device=picture.device)
        halo = min(self.network.radius, _FARTHEST)
        for top, left, part in in_tiles(self.network, picture, self.tile or max(height, width), halo):
            if not bool(part.isfinite().all()):
                raise UserError(
                    "the enlarged picture came out as NaN: take float32 or bfloat16, or another network"
                )
            part = part.float().clamp(0, 1)
            part = (part * 255).round() if wide == torch.uint8 else part
            grown[..., top : top + part.shape[-2], left : left + part.shape[-1]] = part
        return grown


def upscaler_file(path: str | Path | None) -> Path:
    """The file of a network that `Upscaler.from_pretrained` takes. Raises UserError."""
    place = bundled(f"realesr-*/{_FILE}") if path in (None, BUNDLED) else file_in(path, _FILE)
    if place is None:
        raise UserError("the bundled upscaler is not there: name a file of ESRGAN or Real-ESRGAN")
    return place


def _larger(size: Sequence[int], factor: float) -> tuple[int, int]:
    """(height, width), each 1 pixel at the least."""
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def _spread(picture: "Image") -> "Image":
    """Give the pixels that are clear the colour of near ones that are not.

    What a program left there (black, mostly) would get into the edges.
    """
    from PIL import ImageFilter

    if not picture.mode.endswith("A"):
        return picture
    picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    near = picture.convert("RGBa").filter(ImageFilter.GaussianBlur(_BLEED)).convert("RGBA")
    near.paste(picture, mask=alpha.point([0] + [255] * 255))
    return near
