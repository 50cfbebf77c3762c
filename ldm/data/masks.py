"""Random masks for inpainting: rectangles and strokes of a brush (after Suvorov et al. 2022, LaMa)."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

_EVERYTHING = (
    0.1  # share of masks that leave nothing to see, so that the network can also draw from the text alone
)


def random_mask(height: int, width: int, rng: Generator) -> NDArray[np.uint8]:
    """Return a mask (height, width), 1 where the picture is to be drawn anew, 0 where it stays."""
    from PIL import Image, ImageDraw

    if rng.random() < _EVERYTHING:
        return np.ones((height, width), np.uint8)
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 4)):
            sides = np.array([width, height]) * rng.uniform(0.15, 0.6, 2)
            corner = rng.uniform(0, 1, 2) * (np.array([width, height]) - sides)
            pen.rectangle([*corner, *(corner + sides)], fill=1)
    else:
        brush = max(1, int(min(width, height) * rng.uniform(0.08, 0.25)))
        for _ in range(rng.integers(1, 4)):
            points = rng.uniform(0, 1, (rng.integers(2, 6), 2)) * (width, height)
            pen.line([tuple(point) for point in points], fill=1, width=brush, joint="curve")
            for x, y in points:
                pen.ellipse([x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2], fill=1)
    return np.asarray(mask)
