"""Poses: a thing mirrored, turned, smaller, and elsewhere."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

_TURN = 25.0  # degrees, either way
_LEAST = 0.6  # of its size


@dataclass(frozen=True)
class Pose:
    """scale: of a thing's side. right, down: shares of the frame. turn: degrees, counterclockwise."""

    mirrored: bool
    turn: float
    scale: float
    right: float
    down: float

    @classmethod
    def draw(cls, rng: Generator, share: float, bust: bool) -> "Pose":
        """Draw one for a thing whose side is a `share` of the frame; it moves within the room that it leaves.

        bust: it is cut off at the frame's lower edge, and stays there, upright.
        """
        mirrored = bool(rng.random() < 0.5)
        turn, scale = rng.uniform(-_TURN, _TURN), rng.uniform(_LEAST, 1.0)
        right, down = rng.uniform(-0.5, 0.5, 2) * share * (1 - scale)
        if bust:
            return cls(mirrored, 0.0, 1.0, float(right), 0.0)
        return cls(mirrored, float(turn), float(scale), float(right), float(down))

    def of(self, sprite: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Mirror and turn a sprite (side, side, 4); its corners may be cut."""
        from PIL import Image

        if self.mirrored:
            sprite = sprite[:, ::-1]
        if not self.turn:
            return np.ascontiguousarray(sprite)
        # Colours under no alpha must not bleed in: "RGBa" is premultiplied.
        turned = Image.fromarray(np.ascontiguousarray(sprite)).convert("RGBa")
        return np.asarray(turned.rotate(self.turn, Image.Resampling.BILINEAR).convert("RGBA"))
