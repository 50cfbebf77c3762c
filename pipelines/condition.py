"""What a recipe asks of the networks: its prompts encoded, and the U-Net with that condition bound to it."""

from collections.abc import Sequence

import torch

from ldm.conditioning.text import TextEmbedding, TextEncoder, concatenate, encode_pair
from ldm.diffusion.denoiser import Network
from ldm.system import System
from pipelines.recipe import Recipe


def condition_of(
    text: TextEncoder, recipes: Sequence[Recipe], guided: bool
) -> tuple[TextEmbedding, list[str]]:
    """B rows; where guided 2B, the first B under the negative prompts. And the notes on the prompts."""
    prompts = [recipe.prompt for recipe in recipes]
    if not guided:
        return text.encode(prompts, clip_skip=recipes[0].clip_skip)
    none = all(recipe.negative_prompt is None for recipe in recipes)
    negatives = None if none else [recipe.negative_prompt or "" for recipe in recipes]
    cond, uncond, notes = encode_pair(text, prompts, negatives, recipes[0].clip_skip)
    return concatenate([uncond, cond]), notes


def bound(system: System, condition: TextEmbedding, recipe: Recipe) -> Network:
    """The U-Net under a condition that lies where it computes, in its precision.

    A call of half the condition's rows is the one without the negative prompts.
    """
    if not system.is_xl:
        return system.bind(condition)
    assert recipe.original_size and recipe.target_size
    ids = (*recipe.original_size, *recipe.crops_coords_top_left, *recipe.target_size)
    time_ids = torch.tensor([ids], dtype=torch.float32, device=condition.hidden.device)
    return system.bind(condition, time_ids.expand(len(condition.hidden), -1))
