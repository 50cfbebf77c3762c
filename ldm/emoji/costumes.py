"""Animals in hats, sunglasses and an astronaut's helmet: where the pieces sit, measured on the sprites of 128 px.

Both Fluent styles share one geometry; styles whose faces are drawn otherwise have no costumes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.emoji.sprites import SpriteSet, cut, fit, resize

STYLES = ("3d", "flat")
FRAME = 128  # the coordinates below are pixels of a sprite of this size
ASTRONAUT = "astronaut"
VISOR = (63.5, 43.0, 31.5)  # centre x, y and radius of the helmet's opening
VISOR_COLOUR = {"3d": (74, 68, 92), "flat": (58, 58, 66)}
FACE_IN_VISOR = 54  # px, the long side of the face


@dataclass(frozen=True)
class Fit:
    """A face: the height a hat sits at and its width, the height of the eyes and the width of glasses.

    A `width` of 0: no hat or glasses (seen from the side). `head` cuts the head out where the sprite is a body.
    """

    seat: float = 0
    width: float = 0
    eyes: float = 0
    glasses: float = 0
    head: tuple[int, int, int, int] | None = None


FACES: dict[str, Fit] = {
    "raccoon": Fit(20, 62, 68, 70),
    "fox": Fit(36, 60, 73, 62),
    "cat face": Fit(36, 64, 68, 64),
    "dog face": Fit(18, 60, 49, 58),
    "wolf": Fit(34, 56, 61, 66),
    "bear": Fit(21, 62, 60, 66),
    "polar bear": Fit(22, 62, 61, 66),
    "panda": Fit(20, 62, 59, 72),
    "koala": Fit(24, 62, 68, 82),
    "lion": Fit(22, 62, 58, 62),
    "tiger face": Fit(17, 60, 60, 64),
    "monkey face": Fit(22, 62, 54, 58),
    "cow face": Fit(30, 58, 58, 66),
    "pig face": Fit(18, 62, 58, 66),
    "mouse face": Fit(46, 48, 81, 62),
    "hamster": Fit(42, 52, 74, 66),
    "rabbit face": Fit(46, 58, 74, 66),
    "frog": Fit(38, 36, 33, 88),
    "penguin": Fit(12, 46, 29, 38, head=(28, 0, 100, 62)),
    "horse face": Fit(),
    "unicorn": Fit(),
    "chicken": Fit(),
}


@dataclass(frozen=True)
class Hat:
    """The way a hat is worn: its width as a share of the head's, and the share of its height that reaches the seat."""

    width: float
    reach: float


HATS: dict[str, Hat] = {
    "top hat": Hat(1.15, 0.93),
    "crown": Hat(0.95, 0.97),
    "cap": Hat(1.1, 0.82),
    "graduation cap": Hat(1.4, 0.66),
}
GLASSES = ("sunglasses", "glasses")
COSTUMES = (ASTRONAUT, *HATS, *GLASSES)


def costumes_of(face: str) -> tuple[str, ...]:
    """Return the costumes the face can wear."""
    if face not in FACES:
        return ()
    return COSTUMES if FACES[face].width else (ASTRONAUT,)


def wear(sprites: SpriteSet, face: str, costume: str, style: str) -> NDArray[np.uint8]:
    """Return the sprite (size, size, 4) of the face in the costume, both of the same style."""
    if costume == ASTRONAUT:
        return _helmet(sprites, face, style)
    return (
        _glasses(sprites, face, costume, style) if costume in GLASSES else _hat(sprites, face, costume, style)
    )


def _helmet(sprites: SpriteSet, face: str, style: str) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    scale = sprites.size / FRAME
    suit = Image.fromarray(sprites.pixels[ASTRONAUT, style])
    x, y, radius = (each * scale for each in VISOR)
    # Drawn four times as large for a smooth rim; it hides the astronaut's own face and hair.
    mask = Image.new("L", (4 * sprites.size, 4 * sprites.size))
    ImageDraw.Draw(mask).ellipse(
        [4 * each for each in (x - radius, y - radius, x + radius, y + radius)], fill=255
    )
    mask = mask.resize(suit.size, Image.Resampling.BOX)
    visor = Image.new("RGBA", suit.size, (*VISOR_COLOUR[style], 255))
    head = sprites.pixels[face, style]
    if box := FACES[face].head:
        left, top, right, bottom = (round(each * scale) for each in box)
        head = head[top:bottom, left:right]
    picture = cut(Image.fromarray(head))
    factor = FACE_IN_VISOR * scale / max(picture.size)
    picture = resize(picture, *(max(1, round(side * factor)) for side in picture.size))
    visor.alpha_composite(picture, (round(x - picture.width / 2), round(y - picture.height / 2)))
    suit.paste(visor, (0, 0), mask)
    return np.asarray(suit).copy()


def _hat(sprites: SpriteSet, face: str, costume: str, style: str) -> NDArray[np.uint8]:
    from PIL import Image

    scale, hat, place = sprites.size / FRAME, HATS[costume], FACES[face]
    piece = cut(Image.fromarray(sprites.pixels[costume, style]))
    width = hat.width * place.width * scale
    piece = resize(piece, round(width), round(width * piece.height / piece.width))
    canvas = Image.new("RGBA", (2 * sprites.size, 2 * sprites.size))
    canvas.paste(Image.fromarray(sprites.pixels[face, style]), (sprites.size // 2, sprites.size))
    x = sprites.size - piece.width / 2
    y = sprites.size + place.seat * scale - hat.reach * piece.height
    canvas.alpha_composite(piece, (round(x), round(y)))
    return fit(canvas, sprites.size)


def _glasses(sprites: SpriteSet, face: str, costume: str, style: str) -> NDArray[np.uint8]:
    from PIL import Image

    scale, place = sprites.size / FRAME, FACES[face]
    piece = cut(Image.fromarray(sprites.pixels[costume, style]))
    width = place.glasses * scale
    piece = resize(piece, round(width), round(width * piece.height / piece.width))
    canvas = Image.fromarray(sprites.pixels[face, style])
    canvas.alpha_composite(
        piece, (round((sprites.size - width) / 2), round(place.eyes * scale - piece.height / 2))
    )
    return np.asarray(canvas).copy()
