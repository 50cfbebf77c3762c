"""What the model is asked for: each kind of picture that it was trained on, and each combination held out."""

from dataclasses import dataclass

import numpy as np

from ldm.emoji.captions import caption, phrase
from ldm.emoji.composition import Composition
from ldm.emoji.mixture import Mixture
from ldm.emoji.things import THINGS, choose
from ldm.errors import UserError

# Words that no caption of the mixture has (a test watches over it), by the thing that they mean.
# fmt: off
UNSEEN_WORDS = {
    "kitty": "cat", "puppy": "dog", "automobile": "car", "motorcar": "car", "spaceman": "astronaut",
    "cosmonaut": "astronaut", "android": "robot", "sorcerer": "wizard", "phantom": "ghost", "martian": "alien",
    "aeroplane": "airplane", "jetliner": "airplane", "yacht": "sailboat", "blaze": "fire", "parcel": "gift",
    "football": "soccer ball", "fortress": "castle", "cottage": "house", "timepiece": "clock", "parasol": "umbrella",
    "novel": "book", "swine": "pig", "pony": "horse", "spectacles": "sunglasses",
}
# fmt: on


@dataclass(frozen=True)
class Asked:
    """A prompt, its seed, and the composition of what the picture should show.

    part: "seen", "held-out", "word" (a synonym never seen) or "name" (the same thing by its name). group: the kind, or
    "style" where a thing's style is what is held out.
    """

    prompt: str
    composition: Composition
    seed: int
    part: str
    group: str


def ask(mixture: Mixture, prompts: int, seed: int = 0) -> list[Asked]:
    """Return half of `prompts` of what was trained on, each of the mixture's kinds in turn; half of what was held out.

    Both halves have the settings and the wording of training.
    Raises UserError where nothing held out can be drawn.
    """
    return [*_seen(mixture, prompts // 2, seed), *_held_out(mixture, prompts - prompts // 2, seed)]


def ask_words(mixture: Mixture, seeds: int = 2) -> list[Asked]:
    """Return each of UNSEEN_WORDS, and beside it the name of the same thing, with as many seeds."""
    asked, known = [], {thing.name for thing in choose(mixture.config.things)}
    for word, thing in UNSEEN_WORDS.items():
        if thing not in known:
            continue
        composition = Composition("single", (thing,), mixture.config.styles[0], "white")
        name = phrase(THINGS[thing].number, THINGS[thing].name)
        for seed in range(seeds):
            asked.append(
                Asked(
                    phrase("many" if word == "spectacles" else "one", word), composition, seed, "word", "word"
                )
            )
            asked.append(Asked(name, composition, seed, "name", "name"))
    return asked


def _seen(mixture: Mixture, count: int, seed: int) -> list[Asked]:
    asked = []
    for number in range(count):
        rng = np.random.default_rng([seed, 0, number])
        kind = mixture.kinds[number % len(mixture.kinds)]
        composition = mixture.composition(kind, rng)
        asked.append(Asked(caption(composition, rng), composition, number, "seen", kind))
    return asked


def _held_out(mixture: Mixture, count: int, seed: int) -> list[Asked]:
    compositions, asked = mixture.heldout_compositions(), []
    if not compositions:
        raise UserError(
            "none of the held-out combinations can be drawn of this mixture's things, sprites and styles"
        )
    order = np.random.default_rng([seed, 2]).permutation(
        len(compositions)
    )  # fewer prompts than compositions: some of each kind
    for number in range(count):
        rng = np.random.default_rng([seed, 1, number])
        composition = mixture.dressed(compositions[order[number % len(compositions)]], rng)
        asked.append(
            Asked(
                caption(composition, rng),
                composition,
                number,
                "held-out",
                "style" if composition.finish else composition.kind,
            )
        )
    return asked
