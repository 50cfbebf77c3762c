"""On the way between two noises: a row of pictures that change into each other, as a strip or an animation.

A picture is drawn from its first noise without a break, so noises between two give pictures between two (Song et al.
2020, DDIM, sec. 5.3). The noises are those of seeds, or those that pictures come from, found by the probability-flow
ODE (Song et al. 2021, sec. 4.3), solved upwards.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.driver import Noise, sample
from ldm.diffusion.samplers import heun
from ldm.errors import UserError, nearest
from ldm.files import write_bytes
from ldm.pictures import grid, png
from ldm.sampling import encode
from ldm.system import System
from pipelines.canvas import resized
from pipelines.drawing import Drawing
from pipelines.files import check_target
from pipelines.given import Given
from pipelines.limits import check_seed
from pipelines.loaded import Loaded
from pipelines.originals import Original, use_of
from pipelines.output import TextToImageOutput
from pipelines.recipe import MOST, Recipe
from pipelines.requests import request_for

if TYPE_CHECKING:
    from PIL.Image import Image

Method = Literal["slerp", "lerp"]
ANIMATIONS = (".gif", ".webp")
_TOGETHER = 8  # pictures drawn at once
_PARALLEL = 1e-4  # radians: nearer, the two ways are one


def lerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Go the share of the way from a to b on a straight line. Of two noises, the middle has 0.7 of their size."""
    return a + (b - a) * share


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Go the share of the way from a to b on the great circle, where noises of unit variance lie (Shoemake 1985)."""
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    angle = math.acos(max(-1.0, min(1.0, cosine.item())))
    if angle < _PARALLEL or math.pi - angle < _PARALLEL:
        return lerp(a, b, share)
    return (a * math.sin((1 - share) * angle) + b * math.sin(share * angle)) / math.sin(angle)


METHODS = {"slerp": slerp, "lerp": lerp}


def between(noises: Tensor, frames: int, method: Method = "slerp") -> Tensor:
    """Return the noises on the way through `noises` (N, C, h, w): `frames` from each to the next, both included."""
    if method not in METHODS:
        names = ", ".join(get_args(Method))
        raise UserError(f"method {method!r:.40} is unknown{nearest(str(method), METHODS)}; known: {names}")
    if frames < 2 or len(noises) < 2:
        raise UserError("interpolation is of two or more seeds, or pictures, and at least 2 frames")
    if (len(noises) - 1) * frames > MOST:
        raise UserError(
            f"{(len(noises) - 1) * frames:,} frames are more than the {MOST:,} pictures of one call"
        )
    shares = [k / (frames - 1) for k in range(frames)]
    ways = [[METHODS[method](a, b, share) for share in shares] for a, b in pairwise(noises)]
    return torch.stack([ways[0][0], *(each for way in ways for each in way[1:])])


def asked_between(recipe: Recipe, images: Sequence[Original] | None) -> Recipe:
    """Return the recipe of the frames: unguided where they are between pictures. Raises UserError."""
    if recipe.image is not None:
        raise UserError(
            "interpolation begins from noise: leave image out; to go between two pictures, give images"
        )
    if images is None:
        return recipe
    if recipe.guidance_scale not in (None, 1.0):
        raise UserError("interpolation between pictures is unguided: leave guidance_scale out, or give 1")
    return replace(recipe, guidance_scale=1.0)


def noises_of(
    system: System,
    drawing: Drawing,
    seeds: Sequence[int],
    images: Sequence[Original] | None,
    loaded: Loaded,
    device: torch.device,
) -> Tensor:
    """Return the noises (N, C, h, w), of unit variance, of seeds, or those that pictures come from.

    drawing: of the frames. Pictures are led up to their noise by Heun's method on its plan's noise levels; drawn from
    there, they come back but for the solver's error and the autoencoder's. Raises UserError.
    """
    recipe, plan, config = drawing.recipe, drawing.plan, system.autoencoder.config
    assert recipe.height and recipe.width
    if images is None:
        for each in seeds:
            check_seed(each)
        shape = (config.latent_channels, recipe.height // config.factor, recipe.width // config.factor)
        return Noise(seeds, shape)()
    shown = [use_of(each, "image")[1] for each in images]
    pixels = [
        resized(each, (recipe.height, recipe.width), "crop") for each in shown if isinstance(each, np.ndarray)
    ]
    if len(pixels) < len(shown):
        raise UserError("interpolation takes pictures, and not latents: decode them first")
    x0 = encode(system.autoencoder, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device))
    request = request_for(system, [drawing] * len(shown), loaded, device)
    least = plan.schedule.sigma_min
    upwards = [least, *sorted(each for each in plan.sigmas if each > least)]
    denoise = plan.denoiser(system.bind(request.condition))
    return sample(denoise, heun(x0, upwards, lambda: x0)).cpu() / plan.initial_scale


def interpolated(
    draw: Callable[..., TextToImageOutput],
    recipe: Recipe,
    noises: Tensor,
    frames: int,
    method: Method,
    progress: bool,
) -> TextToImageOutput:
    """Draw the frames of a recipe on the way through noises (N, C, h, w); see `between`. draw: the pipeline's.

    What a sampler draws after the first noise is the same for all, and that of the recipe's seed. Raises UserError.
    """
    images, recipes, notes = list[Any](), list[Recipe](), list[str]()
    for rows in between(noises, frames, method).split(_TOGETHER):
        given = [Given(_after_the_first(recipe.seed or 0, row.shape), latents=row) for row in rows]
        drawn = draw([recipe] * len(rows), progress=progress, given=given)
        images, recipes = images + drawn.images, recipes + drawn.recipes
        notes = list(dict.fromkeys(notes + drawn.notes))
    return TextToImageOutput(images, recipes, notes)


def _after_the_first(seed: int, shape: torch.Size) -> torch.Generator:
    """A generator whose first noise was drawn: that of the frames is given."""
    generator = torch.Generator("cpu").manual_seed(seed)
    torch.randn(shape, generator=generator)
    return generator


def save(pictures: "Sequence[Image]", path: Path, milliseconds: int = 120) -> Path:
    """Write a strip, of pictures side by side (.png), or an animation that goes there and back (.gif, .webp)."""
    check_path(path)
    if path.suffix.lower() == ".png":
        write_bytes(path, png(grid(pictures, len(pictures))))
        return path
    first, *others = [*pictures, *reversed(pictures[1:-1])]
    buffer, how = io.BytesIO(), {"lossless": True} if path.suffix.lower() == ".webp" else {}
    first.save(
        buffer,
        path.suffix[1:].upper(),
        save_all=True,
        append_images=others,
        duration=milliseconds,
        loop=0,
        **how,
    )
    write_bytes(path, buffer.getvalue())
    return path


def check_path(path: Path) -> None:
    """Find out before minutes of drawing, not after, that nothing can be written there. Raises UserError."""
    from PIL import features

    if path.suffix.lower() not in (".png", *ANIMATIONS):
        raise UserError(f"{path}: name a strip .png, an animation .gif or .webp")
    if path.suffix.lower() == ".webp" and not features.check("webp"):
        raise UserError(f"{path}: this Pillow writes no WebP: name it .gif")
    check_target(path.with_suffix(".png"), 1, folder=False)
