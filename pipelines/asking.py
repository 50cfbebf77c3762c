"""What a call asks for: a recipe for each image, and what the image is given beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.errors import UserError
from pipelines.given import Given
from pipelines.loaded import Loaded
from pipelines.named_files import clip_use, upscaler_use
from pipelines.originals import originals_for
from pipelines.recipe import SETTINGS, Recipe, recipes_for

# The arguments of a call that are objects of Python, beside those that make a recipe's settings.
_HANDED = (
    "generator",
    "latents",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def asked(call: Mapping[str, Any], loaded: Loaded) -> tuple[list[Recipe], list[Given]]:
    """Make of a call's arguments the recipe of each image, and what it is given beside; see the pipeline's `__call__`.

    call: the arguments by their names. Raises UserError.
    """
    prompt, images_per_prompt = call["prompt"], call["num_images_per_prompt"]
    if call["prompt_embeds"] is not None:
        if prompt is not None:
            raise UserError("prompt and prompt_embeds are the same thing twice: give one of them")
        prompt = [""] * len(call["prompt_embeds"])
    if call["generator"] is not None and call["seed"] is not None:
        raise UserError("generator and seed are the same thing twice: give one of them")
    settings = {name: call[name] for name in SETTINGS if call.get(name) is not None}
    for name in ("upscaler", "hires_upscaler"):
        if name not in settings:
            continue
        if not isinstance(settings[name], str | Path):
            given_as = _shown(settings[name])
            raise UserError(f'{name} is {given_as}: give a file of an upscaling network, or "bundled"')
        use = upscaler_use(settings[name], name)
        settings[name] = None if use is None else asdict(use)
    if "clip_model" in settings:
        if not isinstance(settings["clip_model"], str | Path):
            given_as = _shown(settings["clip_model"])
            raise UserError(f'clip_model is {given_as}: give the folder of a CLIP, or "bundled"')
        settings["clip_model"] = asdict(clip_use(settings["clip_model"]))
    if call["hires_upscaler"] is not None and call["hires_scale"] is None:  # "latent" is none in a recipe
        raise UserError("hires_upscaler goes with hires_scale: give it too")
    recipes = recipes_for(prompt, call["negative_prompt"], call["seed"], images_per_prompt, settings)
    count, each_prompt = len(recipes), int(images_per_prompt)
    uses, images = originals_for(call["image"], count, each_prompt, "image")
    mask_uses, masks = originals_for(call["mask_image"], count, each_prompt, "mask_image")
    given = _given(count, each_prompt, images, masks, **{name: call[name] for name in _HANDED})
    recipes = [
        replace(recipe, image=use, mask_image=mask)
        for recipe, use, mask in zip(recipes, uses, mask_uses, strict=True)
    ]
    return _guided(call, loaded, recipes, given, each_prompt)


def _guided(
    call: Mapping[str, Any], loaded: Loaded, recipes: list[Recipe], given: list[Given], each_prompt: int
) -> tuple[list[Recipe], list[Given]]:
    """The same with the call's control pictures and image prompts."""
    names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    stated = [*names, "control_preprocessor"]
    if call["control_image"] is not None:
        defaults = (1.0, 0.0, 1.0, None)
        how: list[Any] = [
            default if call[name] is None else call[name]
            for name, default in zip(stated, defaults, strict=True)
        ]
        found = loaded.controlnets.asked(call["control_image"], len(recipes), each_prompt, *how)
        recipes = [replace(recipe, controls=uses) for recipe, (uses, _) in zip(recipes, found, strict=True)]
        given = [
            replace(each, control_image=pictures) for each, (_, pictures) in zip(given, found, strict=True)
        ]
    elif useless := [name for name in stated if call[name] is not None]:
        raise UserError(f"{useless[0]} goes with control_image: give it too")
    if call["ip_adapter_image"] is not None:
        prompts, shown = loaded.image_adapters.asked(call["ip_adapter_image"], call["ip_adapter_scale"])
        recipes = [replace(recipe, image_prompts=prompts) for recipe in recipes]
        given = [replace(each, ip_adapter_image=shown) for each in given]
    elif call["ip_adapter_scale"] is not None:
        raise UserError("ip_adapter_scale goes with ip_adapter_image: give it too")
    return recipes, given


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
            prompt_embeds=positive[k // each_prompt] if positive else None,
            negative_prompt_embeds=negative[k // each_prompt] if negative else None,
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
