"""What an image is given that no recipe can hold: generators, latents and embeddings, as diffusers' calls take them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ldm.condition import Condition, concatenate
from ldm.errors import UserError
from ldm.sampling import encode
from ldm.system import System
from pipelines.recipe import Recipe


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


def given_for(
    count: int,
    each_prompt: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,
    images: Sequence[np.ndarray | Tensor | None],
    masks: Sequence[np.ndarray | Tensor | None],
    prompt_embeds: Tensor | None,
    pooled_prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    negative_pooled_prompt_embeds: Tensor | None,
) -> list[Given]:
    """What each of a call's `count` images is given; see `TextToImagePipeline.__call__`. Raises UserError.

    each_prompt: images of one prompt, which share a row of embeddings.
    """
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


def encode_given(
    system: System, recipes: Sequence[Recipe], given: Sequence[Given], guides: bool
) -> tuple[Condition, list[str]]:
    """Return what `ldm.sampling.encode` does, with the embeddings that were given in place of prompts.

    recipes, given: of one batch, either all or none of which have a kind of embedding. Raises UserError.
    """
    prompts, clip_skip = [recipe.prompt for recipe in recipes], recipes[0].clip_skip
    without = all(recipe.negative_prompt is None for recipe in recipes)
    against = [recipe.negative_prompt or "" for recipe in recipes]
    positives = [each.prompt_embeds for each in given if each.prompt_embeds]
    negatives = [each.negative_prompt_embeds for each in given if each.negative_prompt_embeds]
    if not positives and not negatives:
        return encode(system, prompts, None if without else against, guides, clip_skip)
    text, notes, device = system.text, list[str](), system.network.device
    length = (positives or negatives)[0].text.shape[1]
    if positives:
        positive = concatenate(positives)
    else:
        positive, notes = text.encode(prompts, clip_skip=clip_skip, length=length)
    if not guides:
        return positive, notes
    if negatives:
        negative = concatenate(negatives)
    elif without and text.zeros_without_negative:
        negative = positive.zeros()
    else:
        negative, more = text.encode(against, length=length)
        notes += more
    if positive.text.shape != negative.text.shape:
        lengths = f"{positive.text.shape[1]} and {negative.text.shape[1]} tokens"
        raise UserError(
            f"the prompts and their negatives have {lengths}: give prompt_embeds and negative_prompt_embeds of one "
            "length"
        )
    return concatenate([negative.to(device), positive.to(device)]), notes


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
