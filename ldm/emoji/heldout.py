"""Combinations that training never sees: drawing them is the honest test of whether the model composes.

Every part of each combination is trained, only never together: the raccoon wears hats, other animals are
astronauts. A combination is a set of names, held out in every style, wording, number, relation and setting.
"""

from collections.abc import Iterable

from ldm.emoji.things import THINGS

COSTUMES: tuple[tuple[str, str], ...] = (
    ("raccoon", "astronaut"),
    ("koala", "astronaut"),
    ("fox", "top hat"),
    ("panda", "crown"),
    ("cat face", "graduation cap"),
    ("bear", "sunglasses"),
    ("pig face", "cap"),
    ("penguin", "top hat"),
)
COLOURS: tuple[tuple[str, str], ...] = (
    ("blue", "apple"),
    ("purple", "car"),
    ("green", "heart"),
    ("pink", "dragon"),
    ("yellow", "umbrella"),
    ("orange", "fish"),
    ("black", "balloon"),
    ("red", "star"),
)
PAIRS: tuple[tuple[str, str], ...] = (
    ("fox", "apple"),
    ("robot", "tree"),
    ("panda", "rocket"),
    ("penguin", "car"),
    ("owl", "crescent moon"),
    ("cat", "umbrella"),
    ("dog", "house"),
    ("raccoon", "banana"),
)
FINISHED: tuple[tuple[str, str], ...] = (
    ("fox", "line drawing"),
    ("car", "line drawing"),
    ("penguin", "line drawing"),
    ("sunflower", "line drawing"),
    ("robot", "black and white"),
    ("apple", "black and white"),
    ("owl", "black and white"),
    ("rocket", "black and white"),
)
HELD_OUT: frozenset[frozenset[str]] = frozenset(
    frozenset(pair) for pair in (*COSTUMES, *COLOURS, *PAIRS, *FINISHED)
)


def _said(names: Iterable[str]) -> frozenset[str]:
    """As captions may say them: a cat's face is a cat."""
    return frozenset(THINGS[name].wearer or name if name in THINGS else name for name in names)


_SAID = frozenset(_said(combination) for combination in HELD_OUT)


def is_held_out(names: set[str]) -> bool:
    """Return whether a picture that combines these names (things, costume, colour) holds a held-out combination."""
    said = _said(names)
    return any(combination <= said for combination in _SAID)
