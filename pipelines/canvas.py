"""What a picture is drawn on: another picture, brought to size, with the part that is to be drawn anew."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

ResizeMode = Literal["resize", "crop", "fill"]
MaskContent = Literal["original", "noise", "fill"]
Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Canvas:
    """A picture to draw on.

    picture: (H, W, 3) float32 in [0, 1], what stands where nothing is drawn. begin: (h, w, 3), what the drawing begins
    from, of the size that the network draws. mask: (h, w) bool, what it draws; None is all. share: (H, W) in [0, 1],
    how much of every pixel of the result is what was drawn. region: the part of `picture` that is drawn.
    """

    picture: np.ndarray
    begin: np.ndarray
    region: Box
    mask: np.ndarray | None = None
    share: np.ndarray | None = None

    def beside(self, picture: np.ndarray, resize_mode: ResizeMode) -> np.ndarray:
        """Bring another picture of the whole (H, W, 3) to the part (h, w, 3) that is drawn, as control pictures are."""
        left, top, right, bottom = self.region
        whole = resized(picture, self.picture.shape[:2], resize_mode)
        return resized(whole[top:bottom, left:right], self.begin.shape[:2], "resize")

    def finish(self, drawn: Tensor) -> Tensor:
        """Put a drawing (3, h, w) in [0, 1] on the picture: (3, H, W), to the bit as it was where `share` is 0."""
        if self.share is None:
            return drawn
        left, top, right, bottom = self.region
        if drawn.shape[1:] != (bottom - top, right - left):
            size = (bottom - top, right - left)
            drawn = F.interpolate(drawn[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        result = torch.from_numpy(self.picture).permute(2, 0, 1).clone()
        share = torch.from_numpy(self.share)[top:bottom, left:right]
        part = result[:, top:bottom, left:right]
        result[:, top:bottom, left:right] = torch.where(
            share > 0, part + share * (drawn.to(part) - part), part
        )
        return result


def canvas_of(
    image: np.ndarray,
    mask: np.ndarray | None,
    size: tuple[int, int],
    *,
    resize_mode: ResizeMode = "resize",
    mask_blur: int = 0,
    mask_content: MaskContent = "original",
    padding_mask_crop: int | None = None,
    outpaint: Box | None = None,
    outpaint_feathering: int = 0,
) -> Canvas:
    """Make the canvas of a picture and of what is to be drawn anew in it.

    image: (H, W, 3) float32 in [0, 1]. mask: (H, W) in [0, 1], drawn anew from 0.5 on; None is all of it. size:
    (height, width) that the network draws.
    resize_mode: how a picture of another shape comes to size: stretched, cropped in the middle, or whole with its edges
    spread. mask_blur: pixels over which the drawn part fades into the picture. mask_content: what the masked part
    begins as: the picture, or a blur of what is around it ("noise" is `ldm.sampling.editing`'s). padding_mask_crop:
    draw only the mask and so many pixels around it, at full size, then put it back (the picture keeps its size).
    outpaint: pixels added at the left, top, right and bottom; outpaint_feathering: pixels of the old picture next to
    them that are drawn anew too, fading. Raises UserError.
    """
    soft = None
    if mask is not None:
        if mask.shape != image.shape[:2]:
            sizes = " and ".join(f"{each.shape[1]} x {each.shape[0]}" for each in (mask, image))
            raise UserError(f"mask_image and image are of {sizes} pixels: they have to be of one size")
        soft = (mask >= 0.5).astype(np.float32)
        if not soft.any():
            raise UserError("mask_image has no white part: nothing would be drawn (white is drawn anew)")
    if outpaint is not None and any(outpaint):
        image, soft = _padded(image, soft, outpaint, outpaint_feathering)
    if soft is None or padding_mask_crop is None:
        image = resized(image, size, resize_mode)
        soft = None if soft is None else resized(soft, size, resize_mode)
        region = (0, 0, size[1], size[0])
    else:
        region = _region(soft, size, padding_mask_crop)
    if soft is None:
        return Canvas(image, image, region)
    if outpaint is None or not any(outpaint):
        soft = (soft >= 0.5).astype(np.float32)
    share = _blurred(soft, mask_blur) if mask_blur else soft
    drawn = share >= 0.5 if mask_blur else share > 0
    begin = _filled(image, drawn) if mask_content == "fill" else image
    if padding_mask_crop is not None:
        left, top, right, bottom = region
        begin = resized(begin[top:bottom, left:right], size, "resize")
        drawn = resized(drawn[top:bottom, left:right].astype(np.float32), size, "resize") >= 0.5
    return Canvas(image, begin, region, drawn, share)


def fitting(height: int, width: int, factor: int) -> tuple[int, int]:
    """The largest size of multiples of `factor` that is no larger, as diffusers takes a picture's own."""
    return max(height // factor, 1) * factor, max(width // factor, 1) * factor


def resized(picture: np.ndarray, size: tuple[int, ...], mode: ResizeMode) -> np.ndarray:
    """Bring a picture (H, W, 3), or a mask (H, W), in [0, 1] to (height, width) by PIL's Lanczos, in 8 bits."""
    from PIL import Image, ImageOps

    if picture.shape[:2] == size:
        return picture
    whole = Image.fromarray((picture * 255).round().astype(np.uint8))
    target = (size[1], size[0])
    if mode == "crop":
        whole = ImageOps.fit(whole, target, Image.Resampling.LANCZOS)
    elif mode == "fill":
        whole = ImageOps.contain(whole, target, Image.Resampling.LANCZOS)
    else:
        whole = whole.resize(target, Image.Resampling.LANCZOS)
    array = np.asarray(whole)
    if mode == "fill":
        rows, columns = size[0] - array.shape[0], size[1] - array.shape[1]
        sides = [(rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)]
        array = np.pad(array, [*sides, *[(0, 0)] * (array.ndim - 2)], "edge")
    return array.astype(np.float32) / 255


def _padded(
    image: np.ndarray, mask: np.ndarray | None, sides: Box, feathering: int
) -> tuple[np.ndarray, np.ndarray]:
    """A larger picture, its edges spread, and its mask: 1 in what is new, fading over `feathering` pixels."""
    left, top, right, bottom = sides
    around = [(top, bottom), (left, right)]
    height, width = image.shape[:2]
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    fade = np.zeros((height, width), np.float32)
    for pixels, distance in (
        (left, columns[None]),
        (top, rows[:, None]),
        (right, width - columns[None]),
        (bottom, height - rows[:, None]),
    ):
        if pixels and feathering:
            fade = np.maximum(fade, np.clip(1 - distance / feathering, 0, 1)).astype(np.float32)
    old = fade if mask is None else np.maximum(fade, mask)
    return np.pad(image, [*around, (0, 0)], "edge"), np.pad(old, around, constant_values=1.0)


def _region(mask: np.ndarray, size: tuple[int, int], padding: int) -> Box:
    """The box around the mask with `padding`, grown to the shape of `size` as far as the picture allows."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, height)
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, width)
    shape = size[1] / size[0]
    if (right - left) / (bottom - top) > shape:
        top, bottom = _grown(top, bottom, math.floor((right - left) / shape), height)
    else:
        left, right = _grown(left, right, math.floor((bottom - top) * shape), width)
    return left, top, right, bottom


def _grown(first: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """A stretch of `length`, at most `limit`, around one that is shorter, moved inside of 0 to `limit`."""
    length = min(length, limit)
    first = min(max(first - (length - (end - first)) // 2, 0), limit - length)
    return first, first + length


def _blurred(mask: np.ndarray, radius: float) -> np.ndarray:
    from PIL import Image, ImageFilter

    picture = Image.fromarray((mask * 255).round().astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))).astype(np.float32) / 255


def _filled(picture: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The picture with blurs of its surroundings where something is drawn, finer ones towards its edge."""
    known = (~drawn).astype(np.float32)
    if not known.any():
        return np.full_like(picture, 0.5)
    result = np.broadcast_to((picture * known[..., None]).sum((0, 1)) / known.sum(), picture.shape)
    radius = 2.0 ** math.ceil(math.log2(max(picture.shape[:2])))
    while radius >= 1:
        weight = _gaussian(known, radius)
        colours = _gaussian(picture * known[..., None], radius) / np.maximum(weight, 1e-6)[..., None]
        trust = np.clip(2 * weight, 0, 1)[..., None]
        result, radius = result + trust * (colours - result), radius / 2
    return np.where(drawn[..., None], np.clip(result, 0, 1), picture).astype(np.float32)


def _gaussian(values: np.ndarray, radius: float) -> np.ndarray:
    """(H, W) or (H, W, 3) blurred along both axes, in float32; beyond the edges nothing is known."""
    reach = max(1, math.ceil(2.5 * radius))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / radius) ** 2)
    kernel /= kernel.sum()
    planes = torch.from_numpy(np.atleast_3d(values)).permute(2, 0, 1)[:, None].float()
    line = torch.from_numpy(kernel).float()
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0)), line.view(1, 1, 1, -1))
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach)), line.view(1, 1, -1, 1))
    return planes[:, 0].permute(1, 2, 0).numpy().reshape(values.shape)


def pixels_of(picture: "Image | np.ndarray | Tensor", name: str) -> np.ndarray:
    """Bring one picture to (H, W, 3) float32 in [0, 1].

    picture: of PIL in any mode (turned as EXIF says, clear parts over white, 16 bits as 8); an array (H, W, 3), uint8
    or in [0, 1]; or a tensor (3, H, W) in [0, 1]. Raises UserError.
    """
    from PIL import Image, ImageOps

    from ldm.data.pictures import rgb

    if isinstance(picture, Image.Image):
        return rgb(ImageOps.exif_transpose(picture)).astype(np.float32) / 255
    array = picture
    if isinstance(picture, Tensor) and picture.ndim == 3 and len(picture) == 3:
        array = picture.detach().cpu().float().permute(1, 2, 0).numpy()
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"{name} is {_shown(picture)}: give a PIL picture, an array (H, W, 3) or a file's path"
        )
    return _unit(array, name)


def mask_of(picture: "Image | np.ndarray | Tensor", name: str) -> np.ndarray:
    """Bring one mask to (H, W) float32 in [0, 1]: of PIL in any mode, or an array or a tensor (H, W)."""
    from PIL import Image, ImageOps

    if isinstance(picture, Image.Image):
        flat = ImageOps.exif_transpose(picture)
        scale = 65535 if flat.mode.startswith("I") else 255
        grey = flat if flat.mode.startswith("I") else flat.convert("L")
        return (np.asarray(grey) / scale).astype(np.float32)
    array = picture.detach().cpu().float().numpy() if isinstance(picture, Tensor) else picture
    array = array[0] if isinstance(array, np.ndarray) and array.ndim == 3 and len(array) == 1 else array
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        raise UserError(f"{name} is {_shown(picture)}: give a PIL picture, an array (H, W) or a file's path")
    return _unit(array, name)


def _unit(array: np.ndarray, name: str) -> np.ndarray:
    values = array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise UserError(f"{name} has values outside of 0 to 1: give numbers in [0, 1], or uint8")
    return values


def _shown(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" {tuple(shape)}" if shape is not None else "")
