"""Where things stand in a picture, as centre x, centre y and side, in shares of the frame."""

from collections.abc import Mapping

PORTRAIT = 1.32  # the side of an astronaut's sprite, of which the helmet is the upper two thirds
COUNTED: Mapping[int, list[tuple[float, float, float]]] = {
    2: [(0.26, 0.5, 0.5), (0.74, 0.5, 0.5)],
    3: [(0.27, 0.7, 0.46), (0.73, 0.7, 0.46), (0.5, 0.27, 0.46)],
}
_LEFT, _RIGHT, _TOP, _BOTTOM = (0.26, 0.5, 0.5), (0.74, 0.5, 0.5), (0.5, 0.26, 0.5), (0.5, 0.74, 0.5)
PAIRED: Mapping[str, list[tuple[float, float, float]]] = {
    "next to": [_LEFT, _RIGHT],  # as one reads; either way round would teach a blend of both
    "left of": [_LEFT, _RIGHT],
    "right of": [_RIGHT, _LEFT],
    "above": [_TOP, _BOTTOM],
    "below": [_BOTTOM, _TOP],
}
HOLDER = [(0.43, 0.46, 0.84), (0.76, 0.75, 0.46)]
