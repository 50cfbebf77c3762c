"""What a recipe leaves open, filled in from the model: defaults, sizes, the plan of sampling."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ldm import __version__
from ldm.conditioning.text import TextEncoder
from ldm.diffusion.plan import Plan, plan
from ldm.errors import UserError
from ldm.system import System
from pipelines.recipe import Recipe, check

_MOST_TOKENS = 8192  # of a prompt: the U-Net attends to each of them in every step


def completed(system: System, recipe: Recipe, stated: Mapping[str, Any]) -> Recipe:
    """The recipe with the model's defaults in place of every None. Raises UserError for impossible values.

    stated: of Recipe, what is so whatever was asked for: how the model was loaded, the adapters in use.
    """
    height = system.default_size if recipe.height is None else recipe.height
    width = system.default_size if recipe.width is None else recipe.width
    defaults = {
        "num_inference_steps": 50,
        "guidance_scale": 5.0 if system.is_xl else 7.5,
        **system.options,
    }
    sizes = {"original_size": (height, width), "target_size": (height, width)} if system.is_xl else {}
    complete = replace(
        recipe,
        seed=secrets.randbelow(2**32) if recipe.seed is None else recipe.seed,
        sampler=system.scheduler.sampler if recipe.sampler is None else recipe.sampler,
        height=height,
        width=width,
        **{
            name: defaults[name] if getattr(recipe, name) is None else getattr(recipe, name)
            for name in ("num_inference_steps", "guidance_scale")
        },
        **{name: getattr(recipe, name) or value for name, value in sizes.items()},
        **stated,
        dtype=str(system.network.dtype).removeprefix("torch."),
        model_hash=system.fingerprint,
        version=__version__,
    )
    check(complete, system.autoencoder.config.factor, system.is_xl)
    plan_of(system, complete)
    tokens = system.text.length([complete.prompt, complete.negative_prompt or ""])
    if tokens > _MOST_TOKENS:
        raise UserError(
            f"the prompt {complete.prompt[:24].strip()!r}... takes {tokens:,} tokens, where {_MOST_TOKENS:,} are the "
            "most: shorten it"
        )
    if complete.clip_skip:
        system.text.encode([""], clip_skip=complete.clip_skip)  # it alone knows how many layers there are
    return complete


def plan_of(system: System, recipe: Recipe) -> Plan:
    """How a complete recipe is sampled. Raises UserError for unknown samplers and schedules."""
    assert recipe.num_inference_steps
    return plan(
        system.scheduler,
        recipe.num_inference_steps,
        recipe.sampler,
        recipe.schedule,
        recipe.eta,
        is_xl=system.is_xl,
    )


def batches_of(text: TextEncoder, recipes: Sequence[Recipe]) -> list[list[int]]:
    """The places of complete recipes whose conditions are the same together as alone."""
    batches: dict[tuple[int, bool], list[int]] = {}
    for place, recipe in enumerate(recipes):
        length = text.length([recipe.prompt, recipe.negative_prompt or ""])
        zeros = text.zeros_without_negative and recipe.negative_prompt is None
        batches.setdefault((length, zeros), []).append(place)
    return list(batches.values())
