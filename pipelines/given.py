"""What an image is given that no recipe can hold: generators, latents and embeddings, as diffusers' calls take them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.errors import UserError
from pipelines.originals import originals_for
from pipelines.recipe import Recipe, recipes_for


@dataclass(frozen=True)
class Given:
    """Of one image, beside its recipe; None is what the recipe says.

    generator: where its noise comes from, in place of the seed. seed: what draws as the generator does. latents:
    (C, h, w), its first noise, of unit variance. image: what it is drawn from, (H, W, 3) in [0, 1], or latents (C, h,
    w). mask_image: (H, W) in [0, 1]. prompt_embeds, negative_prompt_embeds: one row of `hidden` and, where
    there is one, `pooled`.
    """

    generator: torch.Generator | None = None
    seed: int | None = None
    latents: Tensor | None = None
    image: np.ndarray | Tensor | None = None
    mask_image: np.ndarray | Tensor | None = None
    prompt_embeds: Condition | None = None
    negative_prompt_embeds: Condition | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What there is that no recipe can tell."""
        there = [
            each.name for each in fields(self) if getattr(self, each.name) is not None and each.name != "seed"
        ]
        return tuple(name for name in there if name != "generator" or self.seed is None)


def asked(
    prompt: str | Iterable[str] | None,
    negative_prompt: str | Iterable[str | None] | None,
    seed: SupportsIndex | Iterable[SupportsIndex] | None,
    images_per_prompt: SupportsIndex,
    settings: Mapping[str, Any],
    handed: Mapping[str, Any],
) -> tuple[list[Recipe], list[Given]]:
    """Make of a call's arguments the recipe of each image, and what it is given beside; see the pipeline's `__call__`.

    settings: what the recipes have in common. handed: the arguments that are objects of Python, by their names.
    Raises UserError.
    """
    if handed["prompt_embeds"] is not None:
        if prompt is not None:
            raise UserError("prompt and prompt_embeds are the same thing twice: give one of them")
        prompt = [""] * len(handed["prompt_embeds"])
    if handed["generator"] is not None and seed is not None:
        raise UserError("generator and seed are the same thing twice: give one of them")
    recipes = recipes_for(prompt, negative_prompt, seed, images_per_prompt, settings)
    count, each_prompt = len(recipes), int(images_per_prompt)
    rest = dict(handed)
    uses, images = originals_for(rest.pop("image"), count, each_prompt, "image")
    mask_uses, masks = originals_for(rest.pop("mask_image"), count, each_prompt, "mask_image")
    recipes = [
        replace(recipe, image=use, mask_image=mask)
        for recipe, use, mask in zip(recipes, uses, mask_uses, strict=True)
    ]
    return recipes, _given(count, each_prompt, images, masks, **rest)


def _given(
    count: int,
    each_prompt: int,
    images: Sequence[np.ndarray | Tensor | None],
    masks: Sequence[np.ndarray | Tensor | None],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,
    prompt_embeds: Tensor | None,
    pooled_prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    negative_pooled_prompt_embeds: Tensor | None,
) -> list[Given]:
    """What each of a call's `count` images is given. each_prompt: images of one prompt, which share embeddings."""
    prompts = count // each_prompt
    positive = _embeds(prompt_embeds, pooled_prompt_embeds, prompts, "prompt_embeds")
    negative = _embeds(
        negative_prompt_embeds, negative_pooled_prompt_embeds, prompts, "negative_prompt_embeds"
    )
    if positive and negative and positive[0].text.shape[1:] != negative[0].text.shape[1:]:
        shapes = " and ".join(str(tuple(each[0].text.shape[1:])) for each in (positive, negative))
        raise UserError(f"prompt_embeds and negative_prompt_embeds are of other shapes ({shapes})")
    if latents is not None and (
        not isinstance(latents, Tensor) or latents.ndim != 4 or len(latents) != count
    ):
        raise UserError(
            f"latents are {_shown(latents)}: give a tensor ({count}, channels, height, width) for {count} images"
        )
    generators = _generators(generator, count)
    return [
        Given(
            generators[k],
            _seed_of(generators[k]) if len(generators) == len(set(generators)) else None,
            None if latents is None else latents[k],
            images[k],
            masks[k],
            positive[k // each_prompt] if positive else None,
            negative[k // each_prompt] if negative else None,
        )
        for k in range(count)
    ]


def _generators(
    given: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> Sequence[torch.Generator | None]:
    if given is None or isinstance(given, torch.Generator):
        return [given] * count  # one for all: each draws on where the one before ended
    generators = list(given) if isinstance(given, Sequence) else []
    if len(generators) != count or not all(isinstance(each, torch.Generator) for each in generators):
        raise UserError(
            f"generator is {_shown(given)}: give one torch.Generator, or a list of {count} for {count} images"
        )
    return generators


def _seed_of(generator: torch.Generator | None) -> int | None:
    """The seed that draws as the generator does, where there is one: of a generator that is still unused."""
    if generator is None or generator.device.type != "cpu":
        return None
    seed = generator.initial_seed()
    fresh = torch.Generator("cpu").manual_seed(seed).get_state()
    return seed if torch.equal(fresh, generator.get_state()) else None


def _embeds(hidden: Tensor | None, pooled: Tensor | None, rows: int, name: str) -> list[Condition]:
    if hidden is None:
        if pooled is not None:
            raise UserError(f"pooled embeddings are given without {name}: give both")
        return []
    for tensor, dimensions in ((hidden, 3), (pooled, 2)):
        if tensor is not None and (
            not isinstance(tensor, Tensor) or tensor.ndim != dimensions or len(tensor) != rows
        ):
            wanted = f"({rows}, tokens, features)" if dimensions == 3 else f"({rows}, features), pooled"
            raise UserError(f"{name} are {_shown(tensor)}: give a tensor {wanted}, a row a prompt")
    whole = Condition(hidden, pooled)
    return [whole.map(lambda part, k=k: part[k : k + 1]) for k in range(rows)]


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"{len(value)} of them" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
