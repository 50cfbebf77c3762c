"""Styles that any picture can take on, whatever its sprites are drawn like: the whole of it is redrawn."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ldm.emoji.colours import oklab

Picture = NDArray[np.uint8]  # (size, size, 3)

_EDGE = (0.012, 0.045)  # of OKLab a pixel: where ink begins, and where it is full
_INK = 0.88


def line_drawing(picture: Picture) -> Picture:
    """Draw dark outlines on white, as in a colouring book: the gradient of OKLab, its colours counting double."""
    lab = oklab(picture.astype(np.float32) / 255) * np.array([1, 2, 2], np.float32)
    smooth = _blurred(_blurred(lab, 0), 1)
    down, right = np.gradient(smooth, axis=(0, 1))
    slope = np.sqrt((down**2 + right**2).sum(-1))
    ink = np.clip((slope - _EDGE[0]) / (_EDGE[1] - _EDGE[0]), 0, 1)
    return _grey(255 * (1 - _INK * ink))


def black_and_white(picture: Picture) -> Picture:
    """Return luma (ITU-R BT.601)."""
    return _grey(picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32))


FINISHES: dict[str, Callable[[Picture], Picture]] = {
    "line drawing": line_drawing,
    "black and white": black_and_white,
}


def _blurred(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Smoothed along an axis by the binomial kernel 1 4 6 4 1."""
    width = [(2, 2) if each == axis else (0, 0) for each in range(values.ndim)]
    padded, length = np.pad(values, width, mode="edge"), values.shape[axis]
    total = np.zeros_like(values)
    for k, weight in enumerate((1, 4, 6, 4, 1)):
        total += weight / 16 * padded.take(range(k, k + length), axis)
    return total


def _grey(values: NDArray[np.float32]) -> Picture:
    return np.repeat(np.round(values).clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
