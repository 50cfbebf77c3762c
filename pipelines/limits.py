"""What no picture can have: the values of a complete recipe, checked before anything is drawn."""

import math
from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.models.token_merging import MOST
from pipelines.recipe import Recipe, shown

LARGEST = 16_384  # pixels along a side
_FARTHEST = 1_000_000  # pixels of what SDXL is told
LARGEST_SCALE = 64  # times its sides
LONGEST = 20_000  # characters of a prompt


def check(recipe: Recipe, factor: int, is_xl: bool) -> None:
    """Raise UserError for values of a complete recipe that no picture can have, or that would change nothing.

    Sizes are multiples of `factor`; those that SDXL is told, and eta, are for nothing else than SDXL and DDIM.
    """
    for name, size in (("height", recipe.height), ("width", recipe.width)):
        if not isinstance(size, int) or not factor <= size <= LARGEST or size % factor:
            low = min(max(int(size or 0) // factor, 1) * factor, LARGEST - factor)
            near = f"use {low} or {low + factor}"
            raise UserError(
                f"{name} {shown(size)} is not a multiple of {factor} from {factor} to {LARGEST}: {near}"
            )
    assert (
        recipe.guidance_scale is not None
        and recipe.num_inference_steps is not None
        and recipe.seed is not None
    )
    if recipe.num_inference_steps < 1:
        raise UserError(f"num_inference_steps is {shown(recipe.num_inference_steps)}: it must be 1 or more")
    if not math.isfinite(recipe.guidance_scale):
        raise UserError(f"guidance_scale is {recipe.guidance_scale}: give a number, commonly 1 to 15")
    for name, value in (("eta", recipe.eta), ("guidance_rescale", recipe.guidance_rescale)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}: it must be between 0 and 1")
    if recipe.eta and recipe.sampler != "ddim":
        raise UserError(f"eta is ddim's alone: {recipe.sampler} takes none")
    low, high = recipe.guidance_interval or (0.0, math.inf)
    if not low < high:
        raise UserError(f"guidance_interval is ({low}, {high}): give the lower noise level first")
    if not (recipe.clip_guidance_scale >= 0 and math.isfinite(recipe.clip_guidance_scale)):
        raise UserError(
            f"clip_guidance_scale is {recipe.clip_guidance_scale}: give 0, which is none, or more"
        )
    if recipe.clip_model is not None and not recipe.clip_guidance_scale:
        raise UserError("clip_model goes with clip_guidance_scale: give it too")
    if not 0 <= recipe.clip_skip <= 1000:
        raise UserError(
            f"clip_skip is {shown(recipe.clip_skip)}: give 0, or how many more layers to leave out"
        )
    if not 0 <= recipe.token_merging <= MOST:
        raise UserError(
            f"token_merging is {recipe.token_merging}: give 0, which is exact, to {MOST}, of which a quarter is left"
        )
    if recipe.feature_reuse < 1:
        raise UserError(
            f"feature_reuse is {shown(recipe.feature_reuse)}: give 1, which is exact, or every how many steps all of "
            "the network is computed"
        )
    check_seed(recipe.seed)
    _check_picture(recipe)
    _check_guided(recipe)
    _check_larger(recipe)
    _check_told(recipe, is_xl)
    check_texts(recipe)


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that no generator takes."""
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"the seed {shown(seed)} does not fit in 64 bits")


_OF_A_PICTURE = ("mask_image", "strength", "denoising_start", "outpaint")
_OF_A_MASK = ("mask_blur", "padding_mask_crop")


def _check_picture(recipe: Recipe) -> None:
    """Where a picture is drawn from another one."""
    for name in _OF_A_PICTURE if recipe.image is None else ():
        if getattr(recipe, name) is not None:
            raise UserError(f"{name} goes with an image to draw from: give image too")
    for name in _OF_A_MASK if not recipe.masked else ():
        if getattr(recipe, name):
            raise UserError(f"{name} goes with mask_image or outpaint: give one of them too")
    if recipe.mask_content != "original" and not recipe.masked:
        raise UserError("mask_content goes with mask_image or outpaint: give one of them too")
    if recipe.mask_content != "original" and recipe.strength == 1:
        raise UserError(
            f"mask_content {recipe.mask_content} is what the masked part begins from, and at strength 1 (what it is "
            "with a mask unless you say) it begins from noise alone: give a strength below 1"
        )
    if recipe.resize_mode != "resize" and recipe.image is None:
        raise UserError("resize_mode goes with an image to draw from: give image too")
    if recipe.outpaint_feathering and not any(recipe.outpaint or ()):
        raise UserError("outpaint_feathering goes with outpaint: give outpaint too")
    for name in ("mask_blur", "padding_mask_crop", "outpaint_feathering"):
        if not 0 <= (getattr(recipe, name) or 0) <= LARGEST:
            raise UserError(f"{name} is {shown(getattr(recipe, name))}: give 0 to {LARGEST} pixels")
    start, end = recipe.denoising_start, recipe.denoising_end
    for name, share in (("denoising_start", start), ("denoising_end", end)):
        if share is not None and not 0 < share < 1:
            raise UserError(f"{name} is {share}: give the share of the noise that is gone, between 0 and 1")
    if start is not None and end is not None and start >= end:
        raise UserError(f"denoising_start {start} is not before denoising_end {end}")
    if start is not None and (recipe.strength is not None or recipe.masked):
        raise UserError(
            "denoising_start goes on with latents where another model ended: leave out strength and masks"
        )


def _check_guided(recipe: Recipe) -> None:
    """Where pictures steer it."""
    if recipe.guess_mode and not recipe.controls:
        raise UserError("guess_mode goes with control_image: give it too")
    if len({use.path for use in recipe.controls}) < len(recipe.controls):
        raise UserError("one ControlNet is given two control pictures: give one, or load it again by a name")
    if len({use.path for use in recipe.image_prompts}) < len(recipe.image_prompts):
        raise UserError("one IP-Adapter is given two image prompts: give it all pictures in one")
    if recipe.emphasis != "original" and recipe.prompt_syntax != "a1111":
        raise UserError('emphasis is of prompt_syntax "a1111": give that too')


_OF_A_SECOND_PASS = ("hires_steps", "hires_strength", "hires_upscaler")


def _check_larger(recipe: Recipe) -> None:
    """Where it is drawn a second time, or enlarged."""
    scale, strength = recipe.hires_scale, recipe.hires_strength
    for name in _OF_A_SECOND_PASS if scale is None else ():
        if getattr(recipe, name) is not None:
            raise UserError(f"{name} goes with hires_scale: give it too")
    if scale is not None:
        if not 1 <= scale <= LARGEST_SCALE:
            raise UserError(f"hires_scale is {scale}: give 1 to {LARGEST_SCALE} times the sides")
        if recipe.hires_steps is None or recipe.hires_steps < 1:
            raise UserError(f"hires_steps is {shown(recipe.hires_steps)}: it must be 1 or more")
        if strength is None or not 0 <= strength <= 1:
            raise UserError(f"hires_strength is {strength}: it must be between 0 and 1")
        if recipe.masked:
            raise UserError("hires_scale draws all of the picture anew: leave out masks and outpaint")
        if recipe.denoising_end is not None:
            raise UserError("hires_scale goes on from a finished picture: leave out denoising_end")
    if recipe.upscaler is not None and recipe.upscale is None:
        raise UserError("upscaler goes with upscale: give how many times larger")
    if recipe.upscale is not None and not 0 < recipe.upscale <= LARGEST_SCALE:
        raise UserError(f"upscale is {recipe.upscale}: give more than 0, and {LARGEST_SCALE} at the most")


_SIZES = ("original_size", "target_size", "crops_coords_top_left")


def _check_told(recipe: Recipe, is_xl: bool) -> None:
    """The sizes that SDXL is told."""
    names = (*_SIZES, *(f"negative_{each}" for each in _SIZES))
    told = [name for name in names if getattr(recipe, name) not in (None, (0, 0))]
    if told and not is_xl:
        raise UserError(f"{', '.join(_SIZES[:2])} and {_SIZES[2]}, negative or not, are for SDXL alone")
    for name in names:
        for pixels in getattr(recipe, name) or ():
            if not 0 <= pixels <= _FARTHEST:
                raise UserError(f"{name} has {shown(pixels)} pixels: give 0 to {_FARTHEST:,}")


def check_texts(recipe: Recipe) -> None:
    """Raise UserError for prompts that are too long to be read, or no Unicode: before anything parses them."""
    for text in (recipe.prompt, recipe.negative_prompt or ""):
        if len(text) > LONGEST:
            raise UserError(
                f"the prompt {text[:24].strip()!r}... has {len(text):,} characters, where {LONGEST:,} are the most: "
                "shorten it"
            )
        check_unicode(text, "the prompt ")


def check_unicode(value: Any, what: str = "") -> None:
    """Raise UserError for a text, or one in lists and mappings, that is no Unicode: no file of ours could hold it."""
    if isinstance(value, Mapping):
        for each in value.values():
            check_unicode(each, what)
    elif isinstance(value, list | tuple):
        for each in value:
            check_unicode(each, what)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{what}{value[:100]!r} is not valid Unicode: is it in another encoding?"
            ) from error
