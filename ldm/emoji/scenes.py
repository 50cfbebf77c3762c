"""What stands behind the things: plain colours and simple scenes, drawn by a few lines each."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ldm.emoji.colours import BACKGROUNDS

Backdrop = NDArray[np.float32]  # (size, size, 3), 0 ... 255
Colour = tuple[float, ...] | NDArray[np.float32]


def _gradient(size: int, top: Colour, bottom: Colour) -> Backdrop:
    share = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    column = (1 - share) * np.array(top, np.float32) + share * np.array(bottom, np.float32)
    return np.broadcast_to(column, (size, size, 3)).astype(np.float32)


def _disc(canvas: Backdrop, x: float, y: float, radius: float, colour: Colour) -> None:
    """Paint a disc with a soft rim; x, y and the radius are shares of the side."""
    size = len(canvas)
    rows, columns = np.ogrid[:size, :size]
    distance = np.hypot(columns - x * size, rows - y * size)
    cover = np.clip(radius * size - distance + 0.5, 0, 1)[..., None].astype(np.float32)
    canvas += cover * (np.array(colour, np.float32) - canvas)


def _dots(canvas: Backdrop, rng: Generator, count: int, colour: Colour, below: float = 1.0) -> None:
    """Paint stars or flakes of one and four pixels in the upper share `below` of the canvas."""
    size = len(canvas)
    rows = rng.integers(0, int(below * (size - 1)), count)
    columns = rng.integers(0, size - 1, count)
    large = rng.random(count) < 0.3
    canvas[rows, columns] = colour
    for down, right in ((0, 1), (1, 0), (1, 1)):
        canvas[rows[large] + down, columns[large] + right] = colour


def _ground(canvas: Backdrop, height: float, top: Colour, bottom: Colour) -> None:
    rows = round(len(canvas) * height)
    canvas[-rows:] = _gradient(len(canvas), top, bottom)[-rows:]


def night(size: int, rng: Generator) -> Backdrop:
    canvas = _gradient(size, (12, 18, 56), (52, 60, 122))
    _dots(canvas, rng, 40, (244, 240, 214))
    return canvas


def space(size: int, rng: Generator) -> Backdrop:
    canvas = _gradient(size, (6, 6, 16), (24, 16, 44))
    _dots(canvas, rng, 70, (255, 255, 255))
    return canvas


def meadow(size: int, rng: Generator) -> Backdrop:
    canvas = _gradient(size, (126, 194, 246), (214, 238, 252))
    _ground(canvas, rng.uniform(0.28, 0.36), (122, 196, 84), (72, 150, 60))
    return canvas


def beach(size: int, rng: Generator) -> Backdrop:
    canvas = _gradient(size, (126, 204, 250), (206, 238, 252))
    _ground(canvas, 0.5, (40, 150, 206), (60, 178, 218))
    _ground(canvas, rng.uniform(0.26, 0.32), (246, 224, 166), (232, 200, 132))
    return canvas


def snow(size: int, rng: Generator) -> Backdrop:
    canvas = _gradient(size, (158, 190, 222), (206, 222, 238))
    _ground(canvas, rng.uniform(0.28, 0.34), (244, 248, 255), (226, 234, 246))
    _dots(canvas, rng, 50, (255, 255, 255), below=0.75)
    return canvas


def sunset(size: int, rng: Generator) -> Backdrop:
    canvas = _gradient(size, (108, 62, 138), (255, 174, 96))
    _disc(canvas, rng.uniform(0.2, 0.8), 0.7, 0.16, (255, 226, 130))
    _ground(canvas, 0.26, (74, 48, 84), (52, 34, 66))
    return canvas


def underwater(size: int, rng: Generator) -> Backdrop:
    canvas = _gradient(size, (84, 196, 224), (10, 64, 130))
    for _ in range(6):
        _disc(canvas, rng.random(), rng.random(), rng.uniform(0.012, 0.03), (190, 234, 246))
    return canvas


SCENES: dict[str, Callable[[int, Generator], Backdrop]] = {
    "night": night,
    "space": space,
    "meadow": meadow,
    "beach": beach,
    "snow": snow,
    "sunset": sunset,
    "underwater": underwater,
}


def draw_setting(name: str, size: int, rng: Generator) -> Backdrop:
    """Draw a plain background (a key of BACKGROUNDS) or a scene (a key of SCENES).

    Plain backgrounds but white are a light gradient half of the time.
    """
    if name in SCENES:
        return SCENES[name](size, rng)
    colour = np.array(BACKGROUNDS[name], np.float32)
    slope = rng.uniform(4, 16) * rng.choice([-1, 1]) if name != "white" and rng.random() < 0.5 else 0.0
    return np.clip(_gradient(size, colour + slope, colour - slope), 0, 255)
