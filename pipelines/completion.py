"""What a recipe leaves open, filled in from the model: defaults, sizes, the plan of sampling."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm import __version__
from ldm.diffusion.plan import Plan, plan
from ldm.errors import UserError
from ldm.system import System
from pipelines.given import Given
from pipelines.recipe import Recipe, check

_MOST_TOKENS = 8192  # of a prompt: the U-Net attends to each of them in every step


@dataclass(frozen=True)
class Drawing:
    """A picture that can be drawn: its complete recipe, how it is sampled, and what it is given beside the recipe.

    batch: equal for those whose conditions are the same together as alone; such may share a batch.
    """

    recipe: Recipe
    plan: Plan
    given: Given = field(default_factory=Given)
    batch: tuple[object, ...] = ()


def completed(
    system: System, recipe: Recipe, given: Given, stated: Mapping[str, Any], like: Drawing | None = None
) -> Drawing:
    """Fill in the model's defaults in place of every None. Raises UserError for impossible values.

    stated: of Recipe, what is so whatever was asked for: how the model was loaded, the adapters in use. like: a drawing
    of this system, whose plan serves for this one too where it is the same.
    """
    if lacking := [name for name in recipe.beside if getattr(given, name, None) is None]:
        raise UserError(
            f"the picture was drawn from {' and '.join(lacking)} beside its recipe, which no file holds: it can't be "
            "drawn again without"
        )
    complete = _filled(system, recipe, given, stated)
    check(complete, system.autoencoder.config.factor, system.is_xl)
    _check_given(system, complete, given)
    how = like.plan if like and _sampling(like.recipe) == _sampling(complete) else _plan_of(system, complete)
    return Drawing(complete, how, given, _batch_of(system, complete, given))


def _filled(system: System, recipe: Recipe, given: Given, stated: Mapping[str, Any]) -> Recipe:
    height = system.default_size if recipe.height is None else recipe.height
    width = system.default_size if recipe.width is None else recipe.width
    defaults = {
        "num_inference_steps": 50,
        "guidance_scale": 5.0 if system.is_xl else 7.5,
        **system.options,
    }
    sizes = {"original_size": (height, width), "target_size": (height, width)} if system.is_xl else {}
    seed = given.seed if given.generator is not None else recipe.seed
    return replace(
        recipe,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        beside=given.names,
        sampler=system.scheduler.sampler if recipe.sampler is None else recipe.sampler,
        height=height,
        width=width,
        **{
            name: defaults[name] if getattr(recipe, name) is None else getattr(recipe, name)
            for name in ("num_inference_steps", "guidance_scale")
        },
        **{name: getattr(recipe, name) or value for name, value in sizes.items()},
        **stated,
        version=__version__,
    )


def _check_given(system: System, recipe: Recipe, given: Given) -> None:
    """Raise UserError for what does not fit the model, or the recipe."""
    assert recipe.height and recipe.width
    if given.latents is not None:
        config = system.autoencoder.config
        shape = (config.latent_channels, recipe.height // config.factor, recipe.width // config.factor)
        if given.latents.shape != shape:
            raise UserError(
                f"latents are {tuple(given.latents.shape)} an image, where a picture of {recipe.width} x "
                f"{recipe.height} pixels has {shape}"
            )
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if (embeds := getattr(given, name)) is None:
            continue
        for part, features in system.wants.items():
            if part in ("hidden", "pooled"):
                found = embeds.parts().get(part)
                if found is None or found.shape[-1] != features:
                    has = "none" if found is None else found.shape[-1]
                    raise UserError(
                        f"{name}: the model wants {features} features of {part} text, there are {has}"
                    )


def _sampling(recipe: Recipe) -> tuple[Any, ...]:
    """All that a plan depends on."""
    return recipe.num_inference_steps, recipe.sampler, recipe.schedule, recipe.eta


def _plan_of(system: System, recipe: Recipe) -> Plan:
    """How a complete recipe is sampled. Raises UserError for unknown samplers and schedules."""
    steps, sampler, schedule, eta = _sampling(recipe)
    return plan(system.scheduler, steps, sampler, schedule, eta, is_xl=system.is_xl)


def _batch_of(system: System, recipe: Recipe, given: Given) -> tuple[object, ...]:
    """See `Drawing.batch`. Raises UserError for a prompt that is too long, or layers that are not there."""
    text = system.text
    own = [] if given.prompt_embeds else [recipe.prompt]
    own += [] if given.negative_prompt_embeds else [recipe.negative_prompt or ""]
    tokens = text.length(own) if own else 0
    if tokens > _MOST_TOKENS:
        raise UserError(
            f"the prompt {recipe.prompt[:24].strip()!r}... takes {tokens:,} tokens, where {_MOST_TOKENS:,} are the "
            "most: shorten it"
        )
    if recipe.clip_skip:
        text.encode([""], clip_skip=recipe.clip_skip)  # it alone knows how many layers there are
    if given.prompt_embeds:
        tokens = given.prompt_embeds.text.shape[1]
    without = recipe.negative_prompt is None and given.negative_prompt_embeds is None
    return (
        tokens,
        text.zeros_without_negative and without,
        *(each for each in given.names if each != "generator"),
    )


def batches_of(drawings: Sequence[Drawing]) -> list[list[int]]:
    """The places of drawings whose conditions are the same together as alone."""
    batches: dict[tuple[object, ...], list[int]] = {}
    for place, drawing in enumerate(drawings):
        batches.setdefault(drawing.batch, []).append(place)
    return list(batches.values())
