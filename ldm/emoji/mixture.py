"""A mixture of compositions: pictures and captions made on the fly from sprites, a pure function of (seed, index).

A composition says what a picture shows; drawing and wording read nothing else, so caption and picture cannot disagree.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ldm.emoji import heldout
from ldm.emoji.captions import caption
from ldm.emoji.colours import BACKGROUNDS, PAINTS, repaint
from ldm.emoji.composition import HOLDING, RELATIONS, Composition
from ldm.emoji.costumes import ASTRONAUT, FACES, costumes_of, wear
from ldm.emoji.costumes import STYLES as COSTUME_STYLES
from ldm.emoji.finishes import FINISHES
from ldm.emoji.places import COUNTED, HOLDER, PAIRED, PORTRAIT
from ldm.emoji.poses import Pose
from ldm.emoji.scenes import SCENES, draw_setting
from ldm.emoji.sprites import SpriteSet, resize
from ldm.emoji.things import THINGS, choose
from ldm.errors import UserError, nearest

KINDS: dict[str, float] = {
    "single": 0.28,
    "colour": 0.08,
    "hat": 0.12,
    "astronaut": 0.11,
    "pair": 0.22,
    "holding": 0.06,
    "count": 0.06,
    "scene": 0.07,
}
# What can lie at a pixel: what stands behind the things, or a thing of one of their categories.
REGIONS = ("setting", *dict.fromkeys(thing.category for thing in THINGS.values()))
# What a holder can hold: light things, each known by its outline.
# fmt: off
HELD = (
    "apple", "banana", "carrot", "slice of pizza", "ice cream cone", "donut", "cupcake", "cup of coffee",
    "strawberry", "rose", "sunflower", "star", "heart", "balloon", "umbrella", "gift", "teddy bear", "soccer ball",
    "trophy", "guitar", "camera", "light bulb", "book", "clock", "key",
)
# fmt: on


@dataclass
class MixtureConfig:
    """The pictures of a mixture. `things`: names, categories, "core" or "all". `weights`: kinds, need not sum to 1.

    `jitter` is how much smaller than the frame a thing may be drawn and how far off the centre it may stand.
    `posed` is the share of pictures whose things are mirrored, turned and smaller at random: what a ControlNet has to
    see, or it learns that things stand as they always stand. `finished` is the share of pictures in a style that any
    picture can take on (FINISHES), `sized` that of single things that are small, and said to be, `painted` that of
    things in pairs that have another colour than their own.
    """

    things: list[str] = field(default_factory=lambda: ["core"])
    styles: list[str] = field(default_factory=lambda: ["3d", "flat"])
    weights: dict[str, float] = field(default_factory=lambda: dict(KINDS))
    size: int = 128
    seed: int = 0
    style_named: float = 0.5
    setting_named: float = 0.5
    white: float = 0.7
    jitter: float = 0.1
    finished: float = 0.1
    sized: float = 0.15
    painted: float = 0.25
    posed: float = 0.0


@dataclass(frozen=True)
class Example:
    """One training pair: `picture` (size, size, 3) uint8; `parts` is the composition as a plain dict.

    regions: (size, size) uint8, what lies at each pixel: the number, in REGIONS, of the topmost thing's category.
    """

    picture: NDArray[np.uint8]
    caption: str
    kind: str
    parts: dict[str, Any]
    regions: NDArray[np.uint8]


class Mixture:
    """Composes examples. Stateless but for a cache of repainted and costumed sprites: safe in worker processes.

    everything: also what is held out from training, for those who judge pictures.
    """

    def __init__(
        self, sprites: SpriteSet, config: MixtureConfig | None = None, everything: bool = False
    ) -> None:
        self.config = config or MixtureConfig()
        self.sprites, self.everything = sprites, everything
        self._check()
        self._made: dict[tuple[str, ...], NDArray[np.uint8]] = {}
        self._pools = {style: self._pool(style) for style in self.config.styles}
        self.kinds = [
            kind for kind, weight in self.config.weights.items() if weight > 0 and self._styles_of(kind)
        ]
        if not self.kinds:
            raise UserError(
                "the mixture's weights, things and styles leave no kind of picture that can be drawn"
            )
        weights = np.array([self.config.weights[kind] for kind in self.kinds])
        self._cumulative = np.cumsum(weights / weights.sum())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides what is composed, but for this code: the configuration and the sprites."""
        # The order of the configuration's lists and weights counts too: no sorting of keys.
        told = asdict(self.config)
        if not self.config.posed:  # what was composed before there were poses is the same still
            del told["posed"]
        digest = hashlib.sha256(json.dumps([told, self.everything]).encode())
        for (thing, style), pixels in sorted(self.sprites.pixels.items()):
            digest.update(f"{thing}/{style} {pixels.shape}".encode() + pixels.tobytes())
        return digest.hexdigest()[:16]

    def _check(self) -> None:
        for name in (
            "style_named",
            "setting_named",
            "white",
            "jitter",
            "finished",
            "sized",
            "painted",
            "posed",
        ):
            share = getattr(self.config, name)
            if not 0 <= share <= 1:
                raise UserError(f"the mixture's {name} is {share}: a share is 0 to 1")
        for kind in self.config.weights:
            if kind not in KINDS:
                raise UserError(f"no kind of picture is called {kind!r}{nearest(kind, KINDS)}")
        for style in self.config.styles:
            if style not in self.sprites.styles:
                raise UserError(f"the sprites hold no style {style!r}{nearest(style, self.sprites.styles)}")
        if not self.config.styles:
            raise UserError("the mixture needs at least one style")

    def _pool(self, style: str) -> dict[str, list[Any]]:
        """What each kind may show in a style, leaving out what is held out."""
        have = [
            thing.name for thing in choose(self.config.things) if (thing.name, style) in self.sprites.pixels
        ]
        painted = [name for name in have if THINGS[name].recolourable]
        worn = [
            (face, costume)
            for face in FACES
            if style in COSTUME_STYLES and (face, style) in self.sprites.pixels
            for costume in costumes_of(face)
            if (costume, style) in self.sprites.pixels and self._allowed({face, costume})
        ]
        return {
            "single": have,
            "scene": have,
            "pair": have if len(have) > 1 else [],
            "count": [name for name in have if THINGS[name].number == "one"],
            "colour": [(n, c) for n in painted for c in PAINTS if self._allowed({n, c})],
            "hat": [pair for pair in worn if pair[1] != ASTRONAUT],
            "astronaut": [pair for pair in worn if pair[1] == ASTRONAUT],
            "holding": [
                (holder, held)
                for holder in have
                for held in HELD
                if held in have and (THINGS[holder].wearer or THINGS[holder].category == "person")
            ],
        }

    def _allowed(self, names: set[str]) -> bool:
        return self.everything or not heldout.is_held_out(names)

    def _styles_of(self, kind: str) -> list[str]:
        return [style for style, pool in self._pools.items() if pool[kind]]

    def sample(self, index: int) -> Example:
        """Return training example `index`; the same for the same seed, sprites and configuration."""
        rng = np.random.default_rng([self.config.seed, 0, index])
        kind = self.kinds[int(np.searchsorted(self._cumulative, rng.random()).clip(0, len(self.kinds) - 1))]
        return self._example(self.composition(kind, rng), rng)

    def heldout(self, index: int) -> Example:
        """Return held-out example `index`: every combination in every style in turn, never seen in training."""
        rng = np.random.default_rng([self.config.seed, 1, index])
        compositions = self.heldout_compositions()
        if not compositions:
            raise UserError("none of the held-out combinations can be drawn from these sprites and styles")
        return self._example(compositions[index % len(compositions)], rng)

    def heldout_compositions(self) -> list[Composition]:
        """Return a composition on white, style named, for each held-out combination that the sprites can draw.

        `dressed` gives it another setting and wording.
        """
        compositions, have = [], {thing.name for thing in choose(self.config.things)}
        for style in self.config.styles:
            common: dict[str, Any] = {"style": style, "setting": "white", "style_named": True}
            if style in COSTUME_STYLES:
                compositions += [
                    Composition("astronaut" if worn == ASTRONAUT else "hat", (face,), costume=worn, **common)
                    for face, worn in heldout.COSTUMES
                ]
            compositions += [
                Composition("colour", (thing,), colour=colour, **common) for colour, thing in heldout.COLOURS
            ]
            compositions += [
                Composition("pair", pair, relation=RELATIONS[number % len(RELATIONS)], **common)
                for number, pair in enumerate(heldout.PAIRS)
            ]
            compositions += [
                Composition("single", (thing,), finish=finish, **common) for thing, finish in heldout.FINISHED
            ]
        return [
            composition
            for composition in compositions
            if self._drawable(composition) and (composition.costume or have.issuperset(composition.things))
        ]

    def _drawable(self, composition: Composition) -> bool:
        needed = [*composition.things, *([composition.costume] if composition.costume else [])]
        return all((name, composition.style) in self.sprites.pixels for name in needed)

    def draw(self, composition: Composition, seed: int = 0) -> Example:
        """Return the example of a composition of one's own."""
        return self._example(composition, np.random.default_rng([self.config.seed, 2, seed]))

    def composition(self, kind: str, rng: Generator) -> Composition:
        """Return a composition of one of `kinds`, never a held-out one. Raises UserError where there is no other."""
        for _ in range(1000):
            composition = self._composition(kind, rng)
            if self._allowed(composition.names):
                return composition
        raise UserError(
            f"all that the mixture's things can show as {kind!r} is held out: give it more things"
        )

    def dressed(self, composition: Composition, rng: Generator) -> Composition:
        """Return it in a setting and with a wording as its kind has them in training; a finish stays on white."""
        return (
            composition if composition.finish else replace(composition, **self._dress(composition.kind, rng))
        )

    def _dress(self, kind: str, rng: Generator) -> dict[str, Any]:
        named = rng.random() < self.config.setting_named
        return {
            "style_named": rng.random() < self.config.style_named,
            "setting_named": named or kind == "scene",
            "setting": self._setting(kind, named, rng),
        }

    def _composition(self, kind: str, rng: Generator) -> Composition:
        styles = self._styles_of(kind)
        style = styles[int(rng.integers(len(styles)))]
        pool = self._pools[style][kind]
        pick = pool[int(rng.integers(len(pool)))]
        common: dict[str, Any] = {"kind": kind, "style": style, **self._dress(kind, rng)}
        painted = self.config.painted
        if kind not in ("scene", "colour") and rng.random() < self.config.finished:
            finish = tuple(FINISHES)[int(rng.integers(len(FINISHES)))]
            common |= {"finish": finish, "setting": "white", "setting_named": False}
            painted = 0.0  # no colour can be told in it
        if kind in ("hat", "astronaut"):
            return Composition(things=(pick[0],), costume=pick[1], **common)
        if kind == "colour":
            return Composition(things=(pick[0],), colour=pick[1], **common)
        if kind == "pair":
            other = pick
            while other == pick:
                other = pool[int(rng.integers(len(pool)))]
            common |= {
                "colour": self._paint(pick, painted, rng),
                "second_colour": self._paint(other, painted, rng),
            }
            return Composition(
                things=(pick, other), relation=RELATIONS[int(rng.integers(len(RELATIONS)))], **common
            )
        if kind == "holding":
            return Composition(
                things=pick, relation=HOLDING, second_colour=self._paint(pick[1], painted, rng), **common
            )
        if kind == "count":
            colour = ""
            if THINGS[pick].recolourable and painted and rng.random() < 0.5:
                colour = tuple(PAINTS)[int(rng.integers(len(PAINTS)))]
            return Composition(things=(pick,), count=int(rng.integers(2, 4)), colour=colour, **common)
        own = bool(THINGS[pick].colour and painted) and kind == "single" and rng.random() < 0.3
        size = "small" if rng.random() < self.config.sized else ""
        return Composition(things=(pick,), own_colour_named=own, size=size, **common)

    def _paint(self, thing: str, share: float, rng: Generator) -> str:
        """A colour for a thing of a pair, or "" for its own."""
        if not THINGS[thing].recolourable or rng.random() >= share:
            return ""
        return tuple(PAINTS)[int(rng.integers(len(PAINTS)))]

    def _setting(self, kind: str, named: bool, rng: Generator) -> str:
        """Scenes where they are the subject, and now and then elsewhere; else plain, unnamed mostly white."""
        share = {"scene": 1.0, "hat": 0.1, "astronaut": 0.1, "pair": 0.25, "holding": 0.1}.get(kind, 0.0)
        if share == 1 or (named and rng.random() < share):
            return tuple(SCENES)[int(rng.integers(len(SCENES)))]
        if not named and rng.random() < self.config.white:
            return "white"
        return tuple(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]

    def _example(self, composition: Composition, rng: Generator) -> Example:
        words = caption(composition, rng)
        picture, regions = self._picture(composition, rng)
        return Example(picture, words, composition.kind, asdict(composition), regions)

    def _sprite(self, composition: Composition, thing: str, colour: str) -> NDArray[np.uint8]:
        if not colour and not composition.costume:
            return self.sprites.pixels[thing, composition.style]
        key = (thing, composition.style, colour, composition.costume)
        if key not in self._made:
            made = self.sprites.pixels[thing, composition.style]
            if composition.costume:
                made = wear(self.sprites, thing, composition.costume, composition.style)
            self._made[key] = repaint(made, colour) if colour else made
        return self._made[key]

    def _picture(
        self, composition: Composition, rng: Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The picture, and what lies where in it."""
        size = self.config.size
        regions = np.zeros((size, size), np.uint8)
        canvas = draw_setting(composition.setting, size, rng)
        colours = (
            (composition.colour, composition.second_colour)
            if composition.relation
            else (composition.colour,) * composition.count
        )
        shown = zip(
            self._places(composition, rng), composition.things * composition.count, colours, strict=True
        )
        posed = self.config.posed > 0 and rng.random() < self.config.posed
        for (x, y, share), thing, colour in shown:
            sprite = self._sprite(composition, thing, colour)
            if posed:
                pose = Pose.draw(rng, share, bust=composition.costume == ASTRONAUT)
                sprite, share, x, y = pose.of(sprite), share * pose.scale, x + pose.right, y + pose.down
            rows, columns, alpha = _paste(canvas, sprite, x * size, y * size, round(share * size))
            regions[rows, columns][alpha > 0.5] = REGIONS.index(THINGS[thing].category)
        picture = np.round(canvas).clip(0, 255).astype(np.uint8)
        return (FINISHES[composition.finish](picture) if composition.finish else picture), regions

    def _places(self, composition: Composition, rng: Generator) -> list[tuple[float, float, float]]:
        """Centre x, y and side of each thing, as shares of the frame.

        Nothing crosses the frame's edge but an animal's space suit: a portrait, for the face to be seen.
        """
        jitter = self.config.jitter
        share = float(1 - jitter * rng.random())
        shift = rng.uniform(-0.5, 0.5, 2) * min(jitter, 0.1) * 0.8
        if composition.costume == ASTRONAUT:
            share *= PORTRAIT
            return [(0.5 + 0.5 * shift[0], share / 2 + 0.02 + 0.2 * shift[1], share)]
        if composition.relation == HOLDING:
            places = HOLDER
        elif composition.relation:
            places = PAIRED[composition.relation]
        elif composition.count > 1:
            places = COUNTED[composition.count]
        else:
            share *= 0.5 if composition.size == "small" else 1.0
            return [(0.5 + shift[0], 0.5 + shift[1], share)]
        return [(x + 0.5 * shift[0], y + 0.5 * shift[1], side * share) for x, y, side in places]


def _paste(
    canvas: NDArray[np.float32], sprite: NDArray[np.uint8], x: float, y: float, side: int
) -> tuple[slice, slice, NDArray[np.float32]]:
    """Lay the sprite, `side` px wide, over the canvas with its centre at (x, y) px; what crosses the edge is cut.

    Returned are the rows and the columns that it covers, and by which share it does so, (rows, columns) in [0, 1].
    """
    from PIL import Image

    picture: Image.Image = Image.fromarray(sprite)
    if side != picture.width:
        picture = resize(picture, side, side)
    left, top = round(x - side / 2), round(y - side / 2)
    bottom, right = min(top + side, len(canvas)), min(left + side, len(canvas))
    pixels = np.asarray(picture)[max(0, -top) : bottom - top, max(0, -left) : right - left].astype(np.float32)
    rows, columns = slice(max(0, top), bottom), slice(max(0, left), right)
    canvas[rows, columns] += pixels[..., 3:] / 255 * (pixels[..., :3] - canvas[rows, columns])
    return rows, columns, pixels[..., 3] / np.float32(255)
