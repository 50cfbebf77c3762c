"""Words for a composition: several natural ways to ask for the same picture."""

from collections.abc import Sequence

from numpy.random import Generator

from ldm.emoji.colours import BACKGROUNDS
from ldm.emoji.composition import HOLDING, Composition
from ldm.emoji.costumes import ASTRONAUT, GLASSES
from ldm.emoji.things import THINGS, Thing

NUMBERS = {2: "two", 3: "three"}
COSTUME_WORDS = {"cap": ("cap", "baseball cap")}
# Synonyms that take no article although the thing's own name does.
# fmt: off
UNCOUNTED = frozenset((
    "grapes", "cherries", "bread", "pancakes", "cheese", "popcorn", "salad", "milk", "coffee",
    "flowers", "saturn", "french fries", "fries", "corn on the cob",
))
# fmt: on
SCENE_WORDS: dict[str, tuple[str, ...]] = {
    "night": ("at night", "under the stars", "in the night sky"),
    "space": ("in space", "in outer space"),
    "meadow": ("in a meadow", "on the grass", "in a green field"),
    "beach": ("at the beach", "on the beach"),
    "snow": ("in the snow", "in winter"),
    "sunset": ("at sunset",),
    "underwater": ("underwater", "under the sea"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "next to": ("next to", "beside", "and", "by the side of"),
    "left of": ("to the left of", "on the left of"),
    "right of": ("to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    HOLDING: ("holding", "holding", "with", "carrying"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "small", "tiny", "little")}
# Said now and then of animals and characters, with no change of the picture: people write such words.
MOODS = ("cute", "happy", "sleepy", "funny", "friendly", "adorable")
# Around the whole when no style is named.
FRAMES = ("a picture of {}", "an image of {}", "an icon of {}", "draw {}", "{} please")
# {} stands for the whole phrase ("a red car on the grass"); [3d] goes between article and noun ("a 3d red car").
STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "3d": ("[3d]", "[3d]", "{} in 3d", "a 3d picture of {}", "a 3d render of {}", "{}, 3d style"),
    "flat": (
        "{} in flat style",
        "a flat picture of {}",
        "a flat drawing of {}",
        "a flat illustration of {}",
        "[flat]",
    ),
    "cartoon": ("[cartoon]", "a cartoon of {}", "{} in cartoon style", "a cartoon drawing of {}"),
    "line drawing": (
        "a line drawing of {}",
        "a line drawing of {}",
        "{} as a line drawing",
        "an outline of {}",
        "a colouring page of {}",
        "a coloring page of {}",
    ),
    "black and white": (
        "{} in black and white",
        "a black and white picture of {}",
        "a black and white image of {}",
        "{}, black and white",
        "{} in shades of grey",
    ),
}


def article(words: str) -> str:
    """Return "a" or "an", by the sound the words begin with."""
    return "a" if words[0] not in "aeiou" or words.startswith(("uni", "ufo", "eu", "ew", "one")) else "an"


def pick(rng: Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def caption(composition: Composition, rng: Generator) -> str:
    """Return one of the composition's captions: it names the style and the setting when the composition says so."""
    number, words = _subject(composition, rng)
    bare = rng.random() < 0.12
    setting = _setting(composition.setting, rng) if composition.setting_named else ""
    if not composition.style_named and not composition.finish:
        framed = pick(rng, FRAMES) if rng.random() < 0.1 else "{}"
        return framed.format(phrase(number, words, bare and framed == "{}") + setting)
    form = pick(rng, STYLE_WORDS[composition.finish or composition.style])
    if form.startswith("["):
        return phrase(number, _with_style(composition, form.strip("[]"), words), bare) + setting
    return form.format(phrase(number, words, bare and form.startswith("{}")) + setting)


def phrase(number: str, words: str, bare: bool = False) -> str:
    """Put the right article before the words; `bare` leaves it out, as people do in a search box."""
    if bare or number in ("mass", "many"):
        return words
    return f"the {words}" if number == "the" else f"{article(words)} {words}"


def _subject(composition: Composition, rng: Generator) -> tuple[str, str]:
    """Return the number ("one", "mass", "many", "the") and the words of what the picture shows."""
    thing = THINGS[composition.things[0]]
    if composition.costume:
        return "one", _costumed(thing, composition.costume, rng)
    if composition.relation:
        other = THINGS[composition.things[1]]
        name, other_name = _name(thing, rng), _name(other, rng)
        if composition.relation == HOLDING:
            name = thing.wearer or name
        second = phrase(_number(other, other_name), _joined(composition.second_colour, other_name))
        first = _joined(composition.colour, name)
        return _number(thing, name), f"{first} {pick(rng, RELATION_WORDS[composition.relation])} {second}"
    colour = f"{composition.colour} " if composition.colour else ""
    size = f"{pick(rng, SIZE_WORDS[composition.size])} " if composition.size else ""
    if composition.count > 1:
        return "many", f"{NUMBERS[composition.count]} {colour}{thing.plural}"
    if composition.own_colour_named:
        return thing.number, f"{size}{thing.colour} {thing.name}"
    name = thing.name if colour else _name(thing, rng)
    return _number(thing, name), f"{size}{_mood(thing, rng)}{colour}{name}"


def _joined(colour: str, name: str) -> str:
    return f"{colour} {name}" if colour else name


def _mood(thing: Thing, rng: Generator) -> str:
    return f"{pick(rng, MOODS)} " if thing.category in ("animal", "person") and rng.random() < 0.08 else ""


def _name(thing: Thing, rng: Generator) -> str:
    return pick(rng, thing.synonyms) if thing.synonyms and rng.random() < 0.25 else thing.name


def _number(thing: Thing, name: str) -> str:
    if name == thing.name or thing.number != "one":
        return thing.number
    return "many" if name in UNCOUNTED else "one"


def _costumed(thing: Thing, costume: str, rng: Generator) -> str:
    mood, wearer = _mood(thing, rng), thing.wearer
    if costume == ASTRONAUT:
        ways = (f"{wearer} astronaut",) * 3 + (
            f"{wearer} in a space suit",
            f"{wearer} dressed as an astronaut",
            f"astronaut {wearer}",
        )
        return mood + pick(rng, ways)
    hat = pick(rng, COSTUME_WORDS.get(costume, (costume,)))
    worn = hat if costume in GLASSES else f"{article(hat)} {hat}"
    return f"{mood}{wearer} {pick(rng, ('wearing', 'wearing', 'in', 'with'))} {worn}"


def _with_style(composition: Composition, style: str, words: str) -> str:
    if composition.count > 1:
        number, rest = words.split(" ", 1)
        return f"{number} {style} {rest}"
    return f"{style} {words}"


def _setting(setting: str, rng: Generator) -> str:
    if setting in BACKGROUNDS:
        if "grey" in setting and rng.random() < 0.5:
            setting = setting.replace("grey", "gray")
        words = f"{article(setting)} {setting} background"
        return pick(
            rng,
            (
                f" on {words}",
                f" on {words}",
                f" with {words}",
                f" against {words}",
                f", {setting} background",
            ),
        )
    return f" {pick(rng, SCENE_WORDS[setting])}"
