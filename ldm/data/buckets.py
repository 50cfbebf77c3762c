"""Pictures of any shape in batches of one: aspect-ratio buckets, and how a picture is cut to fit its bucket."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ldm.errors import UserError

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # height, width in pixels
Crop = Literal["center", "random"]


def buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> list[Size]:
    """Return the sizes (h, w) that pictures are cut to, wide to tall.

    Every area is at most resolution^2 and, for its longer side, the largest possible; sides are multiples of `step`
    (a network needs its autoencoder's factor times two for each of its downsamplings), and the longer one is at most
    `max_ratio` times the shorter (Podell et al. 2023, sec. 2.3). A `max_ratio` of 1 leaves the square alone.

    Raises:
        UserError: a resolution that is no multiple of `step`, or a ratio below 1.
    """
    if resolution < 1 or step < 1 or resolution % step:
        raise UserError(f"resolution is {resolution}: make it a multiple of {step}")
    if max_ratio < 1:
        raise UserError(f"max_ratio is {max_ratio}: it is the longer side over the shorter, at least 1")
    side = resolution // step
    found = {(resolution, resolution)}
    for long in range(side + 1, side * side + 1):
        short = side * side // long
        if long > max_ratio * short:
            break
        found |= {(short * step, long * step), (long * step, short * step)}
    return sorted(found)


def nearest_bucket(height: int, width: int, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose shape is nearest, as a ratio; of equal ones the larger."""
    aspect = math.log(height / width)
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))


def assign(originals: Sequence[Size], buckets: Sequence[Size], least: int) -> list[Size]:
    """Return a bucket for each picture of a size: the nearest of those that get at least `least` pictures.

    So a few odd shapes join others and are cut a little more, where a batch of their own would show each of them many
    times over. Fewer than `least` pictures in all share one bucket.
    """
    held: dict[Size, list[int]] = {}
    for index, original in enumerate(originals):
        held.setdefault(nearest_bucket(*original, buckets), []).append(index)
    while len(held) > 1:
        smallest = min(held, key=lambda size: (len(held[size]), size))
        if len(held[smallest]) >= least:
            break
        for index in held.pop(smallest):
            held[nearest_bucket(*originals[index], list(held))].append(index)
    targets = {index: size for size, indices in held.items() for index in indices}
    return [targets[index] for index in range(len(originals))]


@dataclass(frozen=True)
class Framing:
    """The cut of a picture: SDXL's size conditions (Podell et al. 2023, sec. 2.2), in pixels.

    original: (h, w) of the whole picture; crop: (top, left) of the cut in the picture that is already resized and,
    where `flipped`, mirrored, as diffusers' SDXL training records it; target: (h, w) of the cut.
    """

    original: Size
    crop: tuple[int, int]
    target: Size
    flipped: bool

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Original height and width, crop top and left, target height and width: the U-Net's extra conditions."""
        return (*self.original, *self.crop, *self.target)


def plan_framing(
    original: Size, target: Size, *, crop: Crop = "center", flip: bool = False, rng: Generator | None = None
) -> Framing:
    """Decide how a picture of a size is cut, without the picture.

    flip: mirror it half of the time. rng: draws the flip and a random cut; not asked without either.
    """
    height, width = covering(original, target)
    spare = height - target[0], width - target[1]
    if rng is None and (flip or crop == "random"):
        raise ValueError("a random flip or cut needs an rng")
    flipped = bool(flip and rng is not None and rng.random() < 0.5)
    if crop == "random" and rng is not None:
        place = int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1))
    else:
        place = round(spare[0] / 2), round(spare[1] / 2)
    return Framing(original, place, target, flipped)


def covering(original: Size, target: Size) -> Size:
    """Return the smallest size of the original's shape that covers the target; the longer side is rounded down."""
    (height, width), (h, w) = original, target
    return (h, h * width // height) if h * width >= w * height else (w * height // width, w)


def cut(picture: Pixels, framing: Framing) -> Pixels:
    """Resize with a Lanczos filter, mirror, cut: uint8 (H, W, 3) to uint8 (*framing.target, 3)."""
    from PIL import Image

    height, width = covering(framing.original, framing.target)
    (top, left), (h, w) = framing.crop, framing.target
    if picture.shape[:2] != (height, width):
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
    if framing.flipped:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture[top : top + h, left : left + w])


def frame(
    picture: Pixels, target: Size, *, crop: Crop = "center", flip: bool = False, rng: Generator | None = None
) -> tuple[Pixels, Framing]:
    """Resize a picture (H, W, 3) to cover the target, mirror it or not, and cut: what is left, and how it was cut."""
    framing = plan_framing((len(picture), picture.shape[1]), target, crop=crop, flip=flip, rng=rng)
    return cut(picture, framing), framing
