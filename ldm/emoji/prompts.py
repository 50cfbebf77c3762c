"""What the model is asked for: each kind of picture that it was trained on, and each combination held out."""

from dataclasses import dataclass

import numpy as np

from ldm.emoji.captions import caption, phrase
from ldm.emoji.composition import Composition
from ldm.emoji.recipe import Recipe
from ldm.emoji.things import THINGS, choose
from ldm.errors import UserError

# Words that no caption of the recipe has (a test watches over it), by the thing that they mean.
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
    """A prompt, its seed, and the plan of what the picture should show.

    part: "seen", "held-out", "word" (a synonym never seen) or "name" (the same thing by its name). group: the kind, or
    "style" where a thing's style is what is held out.
    """

    prompt: str
    plan: Composition
    seed: int
    part: str
    group: str


def ask(recipe: Recipe, prompts: int, seed: int = 0) -> list[Asked]:
    """Half of `prompts` of what was trained on, each of the recipe's kinds in turn; half of what was held out.

    Both halves have the settings and the wording of training.
    Raises UserError where nothing held out can be drawn.
    """
    return [*_seen(recipe, prompts // 2, seed), *_held_out(recipe, prompts - prompts // 2, seed)]


def ask_words(recipe: Recipe, seeds: int = 2) -> list[Asked]:
    """Each of UNSEEN_WORDS, and beside it the name of the same thing, with as many seeds."""
    asked, known = [], {thing.name for thing in choose(recipe.config.things)}
    for word, thing in UNSEEN_WORDS.items():
        if thing not in known:
            continue
        plan = Composition("single", (thing,), recipe.config.styles[0], "white")
        name = phrase(THINGS[thing].number, THINGS[thing].name)
        for seed in range(seeds):
            asked.append(
                Asked(phrase("many" if word == "spectacles" else "one", word), plan, seed, "word", "word")
            )
            asked.append(Asked(name, plan, seed, "name", "name"))
    return asked


def _seen(recipe: Recipe, count: int, seed: int) -> list[Asked]:
    asked = []
    for number in range(count):
        rng = np.random.default_rng([seed, 0, number])
        kind = recipe.kinds[number % len(recipe.kinds)]
        plan = recipe.plan(kind, rng)
        asked.append(Asked(caption(plan, rng), plan, number, "seen", kind))
    return asked


def _held_out(recipe: Recipe, count: int, seed: int) -> list[Asked]:
    plans, asked = recipe.heldout_plans(), []
    if not plans:
        raise UserError(
            "none of the held-out combinations can be drawn of this recipe's things, sprites and styles"
        )
    order = np.random.default_rng([seed, 2]).permutation(
        len(plans)
    )  # fewer prompts than plans: some of each kind
    for number in range(count):
        rng = np.random.default_rng([seed, 1, number])
        plan = recipe.dressed(plans[order[number % len(plans)]], rng)
        asked.append(
            Asked(caption(plan, rng), plan, number, "held-out", "style" if plan.finish else plan.kind)
        )
    return asked
