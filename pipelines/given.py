"""What an image is given that no recipe can hold: generators, latents, embeddings, and pictures out of no file."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ldm.condition import Condition
from pipelines.originals import read
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class Given:
    """Of one image, beside its recipe; None is what the recipe says.

    generator: where its noise comes from, in place of the seed. seed: what draws as the generator does. latents:
    (C, h, w), its first noise, of unit variance. image: what it is drawn from, (H, W, 3) in [0, 1], or latents
    (C, h, w). mask_image: (H, W) in [0, 1]. control_image: (H, W, 3) in [0, 1], of each ControlNet that the recipe
    names. ip_adapter_image: several such, of each IP-Adapter. prompt_embeds, negative_prompt_embeds: one row of
    `hidden` and, where there is one, `pooled`.
    """

    generator: torch.Generator | None = None
    seed: int | None = None
    latents: Tensor | None = None
    image: np.ndarray | Tensor | None = None
    mask_image: np.ndarray | Tensor | None = None
    control_image: tuple[np.ndarray, ...] | None = None
    ip_adapter_image: tuple[tuple[np.ndarray, ...], ...] | None = None
    prompt_embeds: Condition | None = None
    negative_prompt_embeds: Condition | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What there is that no recipe can tell."""
        there = [
            each.name for each in fields(self) if getattr(self, each.name) is not None and each.name != "seed"
        ]
        return tuple(name for name in there if name != "generator" or self.seed is None)


def shown_controls(recipe: Recipe, given: Given) -> tuple[np.ndarray, ...]:
    """The control pictures of one image, each (H, W, 3) in [0, 1] as it was given. Raises UserError."""
    if given.control_image is not None:
        return given.control_image
    return tuple(read(use.image, "control_image") for use in recipe.controls)


def shown_images(recipe: Recipe, given: Given) -> tuple[tuple[np.ndarray, ...], ...]:
    """The pictures of each image prompt of one image, likewise. Raises UserError."""
    if given.ip_adapter_image is not None:
        return given.ip_adapter_image
    return tuple(tuple(read(each, "ip_adapter_image") for each in use.images) for use in recipe.image_prompts)
