"""Named colours, and exchanging a sprite's main colour in OKLCh (Ottosson 2020, "A perceptual color space").

In OKLCh a hue can be turned while lightness and shading stay as they look, which HSV does not give.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (160, 164, 170),
    "black": (18, 18, 22),
    "red": (214, 48, 49),
    "orange": (243, 146, 55),
    "yellow": (250, 214, 80),
    "green": (86, 176, 92),
    "blue": (52, 101, 208),
    "light blue": (158, 210, 245),
    "purple": (128, 74, 184),
    "pink": (247, 166, 196),
    "brown": (134, 92, 62),
}

# Lightness, chroma and hue (degrees) that the named colours of things stand for in OKLCh.
PAINTS: dict[str, tuple[float, float, float]] = {
    "red": (0.60, 0.22, 25.0),
    "orange": (0.74, 0.17, 60.0),
    "yellow": (0.86, 0.17, 95.0),
    "green": (0.66, 0.18, 145.0),
    "blue": (0.58, 0.17, 255.0),
    "purple": (0.53, 0.19, 305.0),
    "pink": (0.78, 0.13, 355.0),
    "black": (0.30, 0.01, 280.0),
    "white": (0.94, 0.005, 280.0),
}

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=np.float32,
)


def oklab(rgb: Floats) -> Floats:
    """Convert sRGB in [0, 1], (..., 3), to OKLab."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return (np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T).astype(np.float32)


def srgb(lab: Floats) -> Floats:
    """Convert OKLab, (..., 3), to sRGB, clipped to [0, 1]."""
    linear = (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055).astype(
        np.float32
    )


def repaint(pixels: NDArray[np.uint8], colour: str) -> NDArray[np.uint8]:
    """Return the sprite (H, W, 4) with its main colour exchanged for `colour` (a key of PAINTS).

    Only pixels near the main hue change, so a red apple keeps its green leaf; shading is kept as the distance from
    the main colour's lightness.
    """
    lab = oklab(pixels[..., :3].astype(np.float32) / 255)
    lightness, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    hue = np.arctan2(lab[..., 2], lab[..., 1])
    weight = chroma * (pixels[..., 3] > 128) * (chroma > 0.05)
    if not weight.any():
        return pixels.copy()
    main = _main_hue(hue, weight)
    away = np.abs((hue - main + np.pi) % (2 * np.pi) - np.pi)
    share = np.clip((np.radians(70) - away) / np.radians(25), 0, 1) * np.clip((chroma - 0.02) / 0.04, 0, 1)
    weight = weight * share
    mean_lightness = np.average(lightness, weights=weight)
    mean_chroma = np.average(chroma, weights=weight)
    to_lightness, to_chroma, to_hue = PAINTS[colour]
    turned = np.radians(to_hue) + 0.5 * ((hue - main + np.pi) % (2 * np.pi) - np.pi)
    ratio = chroma / mean_chroma * to_chroma
    painted = np.stack(
        [
            np.clip(to_lightness + 0.8 * (lightness - mean_lightness), 0, 1),
            ratio * np.cos(turned),
            ratio * np.sin(turned),
        ],
        axis=-1,
    ).astype(np.float32)
    mixed = lab + share[..., None].astype(np.float32) * (painted - lab)
    result = pixels.copy()
    result[..., :3] = np.round(srgb(mixed) * 255).astype(np.uint8)
    return result


def _main_hue(hue: Floats, weight: Floats) -> float:
    """The hue (radians) that most colour stands near: the peak of a histogram smoothed around the circle."""
    counts, _ = np.histogram(hue, bins=72, range=(-np.pi, np.pi), weights=weight)
    smooth = sum(np.roll(counts, shift) for shift in range(-3, 4))
    return float((np.argmax(smooth) + 0.5) * 2 * np.pi / 72 - np.pi)
