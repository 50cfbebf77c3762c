"""What a recipe leaves open, filled in from the model: defaults, sizes, the plan of sampling."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ldm import __version__
from ldm.condition import AESTHETIC_SCORES
from ldm.conditioning.prompts.weighted import Lora
from ldm.diffusion.plan import Plan, plan
from ldm.errors import UserError
from ldm.models import feature_reuse, token_merging
from ldm.sampling import Guidance, check_scores
from ldm.sampling.editing import check_masked, first_step
from ldm.system import System
from pipelines.canvas import Canvas, canvas_of, fitting
from pipelines.defaults import defaults_of, takes_all_steps
from pipelines.drawing import Drawing
from pipelines.enlarging import second_plan, second_size
from pipelines.given import Given, shown_controls, shown_images
from pipelines.limits import LARGEST, check
from pipelines.loaded import Loaded
from pipelines.originals import changed, latents_of, read
from pipelines.prompts import read_prompts
from pipelines.recipe import Recipe
from pipelines.uses import PictureUse

_OF_A_CANVAS = (
    "resize_mode",
    "mask_blur",
    "mask_content",
    "padding_mask_crop",
    "outpaint",
    "outpaint_feathering",
)  # of Recipe
_MOST_TOKENS = 8192  # of a prompt: the U-Net attends to each of them in every step
_MOST_IN_ALL = 8 * _MOST_TOKENS  # of all texts that a prompt changes between: all are held


def completed(
    system: System,
    recipe: Recipe,
    given: Given,
    stated: Mapping[str, Any],
    loaded: Loaded,
    like: Drawing | None = None,
    loras: Sequence[Lora] = (),
) -> Drawing:
    """Fill in the model's defaults in place of every None. Raises UserError for impossible values.

    stated: of Recipe, what is so whatever was asked for: how the model was loaded. like: a drawing of this system,
    whose plan serves for this one too where it is the same. loras: to take part beside those that the prompt asks for.
    """
    if lacking := [name for name in recipe.beside if getattr(given, name, None) is None]:
        raise UserError(
            f"the picture was drawn from {' and '.join(lacking)} beside its recipe, which no file holds: it can't be "
            "drawn again without"
        )
    original = _original(recipe, given)
    complete = _filled(system, recipe, given, stated, _size_of(system, recipe, original))
    check(complete, system.autoencoder.config.factor, system.is_xl)
    _check_given(system, complete, given)
    complete = _check_loaded(system, complete, given, loaded)
    how, second = (
        (like.plan, like.second)
        if like and _sampling(like.recipe) == _sampling(complete)
        else (_plan_of(system, complete), second_plan(system, complete))
    )
    assert complete.guidance_scale is not None
    guides = Guidance(complete.guidance_scale).of(system.wants).guides
    prompts = read_prompts(complete).with_loras(loras)
    drawing = Drawing(complete, how, prompts, given, second=second, guided=guides)
    canvas = canvas_for(complete, given, original) if isinstance(original, np.ndarray) else None
    if complete.upscale is not None:
        size = _drawn_size(system, complete, canvas)
        loaded.upscalers.get(complete.upscaler).check(size, complete.upscale)
    drawing = replace(drawing, batch=_text_of(system, drawing), canvas=canvas)
    return with_loaded(drawing, loaded)


def with_loaded(drawing: Drawing, loaded: Loaded) -> Drawing:
    """Draw with the LoRAs and words that are loaded now. Raises UserError for a LoRA that the prompt asks for in vain.

    Called for each drawing, in the turn that draws it, too: others may have been loaded since.
    """
    adapters, prompts = loaded.adapters, drawing.prompts
    adapters.check_words(prompts.embeddings)
    weights = adapters.asked(prompts.prompt.loras)
    recipe = replace(drawing.recipe, **adapters.recipe(weights, prompts.prompt.loras))
    return replace(drawing, recipe=recipe, lora_weights=weights)


def _check_loaded(system: System, recipe: Recipe, given: Given, loaded: Loaded) -> Recipe:
    """The recipe with its networks' hashes. Raises UserError for what is not loaded, or can't be."""
    assert recipe.height and recipe.width
    drawn = recipe.height, recipe.width
    loaded.controlnets.check(recipe.controls, drawn)
    loaded.image_adapters.check(recipe.image_prompts)
    shown_controls(recipe, given)
    shown_images(recipe, given)
    if recipe.hires_scale is not None:
        size = second_size(recipe, system.autoencoder.config.factor)
        if max(size) > LARGEST:
            raise UserError(
                f"hires_scale {recipe.hires_scale} makes the picture {size[1]} x {size[0]} pixels, where {LARGEST} "
                "along a side are the most"
            )
        if recipe.hires_upscaler is not None:
            upscaler = loaded.upscalers.get(recipe.hires_upscaler)
            upscaler.check(drawn, upscaler.scale)
            recipe = replace(recipe, hires_upscaler=loaded.upscalers.stated(recipe.hires_upscaler))
    if recipe.clip_guidance_scale:
        if given.prompt_embeds is not None:
            raise UserError("clip_guidance_scale guides by words: give prompt, and not prompt_embeds")
        recipe = replace(recipe, clip_model=loaded.clips.stated(recipe.clip_model))
    if recipe.upscale is not None:
        recipe = replace(recipe, upscaler=loaded.upscalers.stated(recipe.upscaler))
    return recipe


def _drawn_size(system: System, recipe: Recipe, canvas: Canvas | None) -> Sequence[int]:
    """(height, width) of the picture that comes of it, before it is enlarged."""
    assert recipe.height and recipe.width
    if recipe.hires_scale is not None:
        return second_size(recipe, system.autoencoder.config.factor)
    return (recipe.height, recipe.width) if canvas is None else canvas.picture.shape[:2]


def _original(recipe: Recipe, given: Given) -> np.ndarray | Tensor | None:
    """The picture, or the latents, that it is drawn from."""
    if given.image is not None or recipe.image is None:
        return given.image
    return read(recipe.image, "image")


def canvas_for(recipe: Recipe, given: Given, original: np.ndarray | Tensor | None = None) -> Canvas:
    """The canvas of a complete recipe that has a picture. Raises UserError."""
    original = _original(recipe, given) if original is None else original
    mask = given.mask_image
    if mask is None and recipe.mask_image is not None:
        mask = read(recipe.mask_image, "mask_image")
    assert isinstance(original, np.ndarray) and not isinstance(mask, Tensor)
    assert recipe.height and recipe.width
    return canvas_of(
        original,
        mask,
        (recipe.height, recipe.width),
        **{name: getattr(recipe, name) for name in _OF_A_CANVAS},
    )


def _size_of(system: System, recipe: Recipe, original: np.ndarray | Tensor | None) -> tuple[int, int]:
    """Height and width where the recipe names none: of the picture that it is drawn from, else the model's own."""
    factor = system.autoencoder.config.factor
    if isinstance(original, Tensor):
        return original.shape[-2] * factor, original.shape[-1] * factor
    left, top, right, bottom = recipe.outpaint or (0, 0, 0, 0)
    if not all(0 <= each <= LARGEST for each in (left, top, right, bottom)):
        raise UserError(
            f"outpaint is {recipe.outpaint}: give 0 to {LARGEST} pixels at left, top, right and bottom"
        )
    if original is None or recipe.padding_mask_crop is not None:
        return system.default_size, system.default_size
    height, width = original.shape[0] + top + bottom, original.shape[1] + left + right
    size = fitting(height, width, factor)
    if any(recipe.outpaint or ()) and (height, width) != size:
        raise UserError(
            f"outpaint makes the picture {width} x {height} pixels, no multiples of {factor}: add {-width % factor} at "
            f"a side and {-height % factor} at the top or the bottom"
        )
    return size


def _filled(
    system: System, recipe: Recipe, given: Given, stated: Mapping[str, Any], size: tuple[int, int]
) -> Recipe:
    height = size[0] if recipe.height is None else recipe.height
    width = size[1] if recipe.width is None else recipe.width
    strength = recipe.strength
    if strength is None and recipe.image is not None and recipe.denoising_start is None:  # as in diffusers
        strength = (0.9999 if system.is_xl else 1.0) if recipe.masked else (0.3 if system.is_xl else 0.8)
    defaults = defaults_of(system)
    sizes = {"original_size": (height, width), "target_size": (height, width)} if system.is_xl else {}
    steps = (
        defaults["num_inference_steps"] if recipe.num_inference_steps is None else recipe.num_inference_steps
    )
    more: dict[str, Any] = {}
    if recipe.hires_scale is not None:
        # As in AUTOMATIC1111. What is only stretched has to be drawn anew for more.
        more |= {"hires_steps": steps, "hires_strength": 0.7 if recipe.hires_upscaler is None else 0.4}
    if system.requires_aesthetics_score:
        with_prompt, without = AESTHETIC_SCORES
        more |= {"aesthetic_score": with_prompt, "negative_aesthetic_score": without}
    seed = given.seed if given.generator is not None else recipe.seed
    return replace(
        recipe,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        beside=tuple(name for name in given.names if not _is_named(recipe, name)),
        sampler=system.scheduler.sampler if recipe.sampler is None else recipe.sampler,
        height=height,
        width=width,
        strength=strength,
        **{
            name: defaults[name] if getattr(recipe, name) is None else getattr(recipe, name)
            for name in ("num_inference_steps", "guidance_scale")
        },
        **{name: getattr(recipe, name) or value for name, value in sizes.items()},
        **{name: value for name, value in more.items() if getattr(recipe, name) is None},
        **stated,
        version=__version__,
    )


def _is_named(recipe: Recipe, name: str) -> bool:
    """Whether the recipe names the files of all that was given under this name."""
    uses: dict[str, Sequence[PictureUse | None]] = {
        "image": [recipe.image],
        "mask_image": [recipe.mask_image],
        "control_image": [each.image for each in recipe.controls],
        "ip_adapter_image": [picture for each in recipe.image_prompts for picture in each.images],
    }
    return name in uses and all(use is not None and use.path is not None for use in uses[name])


def _check_given(system: System, recipe: Recipe, given: Given) -> None:
    """Raise UserError for what does not fit the model, or the recipe."""
    assert recipe.height and recipe.width
    config = system.autoencoder.config
    shape = (config.latent_channels, recipe.height // config.factor, recipe.width // config.factor)
    for name, latents in (
        ("latents", given.latents),
        ("the latents that are the image", latents_of(given.image)),
    ):
        if latents is not None and latents.shape != shape:
            raise UserError(
                f"{name} are {tuple(latents.shape)} an image, where a picture of {recipe.width} x {recipe.height} "
                f"pixels has {shape}"
            )
    if recipe.denoising_start is not None and latents_of(given.image) is None:
        raise UserError(
            "denoising_start goes on with latents: give those of a call with denoising_end as image"
        )
    check_scores(system, recipe.aesthetic_score, recipe.negative_aesthetic_score)
    if recipe.token_merging:
        token_merging.check(system.network)
    if recipe.feature_reuse > 1:
        feature_reuse.check(system.network)
    if recipe.hires_scale is not None and "channels" in system.wants:
        raise UserError(
            "hires_scale draws all of the picture anew, and this is an inpainting model: leave it out"
        )
    if latents_of(given.image) is not None and recipe.resize_mode != "resize":
        raise UserError("resize_mode brings pictures to size, and image is latents: leave it out")
    if recipe.image is not None and recipe.denoising_start is None:
        check_masked(system, recipe.masked)
    if latents_of(given.image) is not None and recipe.masked:
        raise UserError(
            "image is latents, of which no part can be kept: give a picture with mask_image or outpaint"
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
    part = (recipe.strength, recipe.denoising_start, recipe.denoising_end)
    second = (recipe.hires_scale is None, recipe.hires_steps, recipe.hires_strength)
    main = (recipe.num_inference_steps, recipe.sampler, recipe.schedule, recipe.eta)
    return *main, *part, recipe.masked, *second


def _plan_of(system: System, recipe: Recipe) -> Plan:
    """How a complete recipe is sampled. Raises UserError for unknown samplers and schedules."""
    steps, sampler, schedule, eta, strength, start, end, masked, *_ = _sampling(recipe)
    planned = partial(plan, system.scheduler, steps, sampler, schedule, eta, is_xl=system.is_xl)
    if strength is not None and not masked and takes_all_steps(system, sampler, schedule):
        whole, strength = planned(strength=strength), None
    else:
        whole = planned()
    if strength is start is end is None:
        return whole
    begin = whole.step_at(start or 0.0) if strength is None else first_step(whole, strength)
    stop = steps if end is None else whole.step_at(end)
    if begin >= stop:
        raise UserError(
            f"none of {steps} steps lies between where it begins and ends: give more num_inference_steps, or other "
            "shares of the noise"
        )
    return whole.part(begin, stop)


def _text_of(system: System, drawing: Drawing) -> tuple[object, ...]:
    """What batches of text depend on. Raises UserError for a prompt that is too long, or layers that are not there."""
    text, recipe, given = system.text, drawing.recipe, drawing.given
    own = [] if given.prompt_embeds else drawing.prompts.prompt.texts
    own = own + ([] if given.negative_prompt_embeds else drawing.prompts.negative_texts)
    tokens = text.length(own) if own else 0
    if tokens > _MOST_TOKENS:
        raise UserError(
            f"the prompt {recipe.prompt[:24].strip()!r}... takes {tokens:,} tokens, where {_MOST_TOKENS:,} are the "
            "most: shorten it"
        )
    if tokens * len(own) > _MOST_IN_ALL:
        raise UserError(
            f"the prompt {recipe.prompt[:24].strip()!r}... changes between {len(own):,} texts of {tokens:,} tokens, "
            f"where {_MOST_IN_ALL:,} tokens in all are the most: shorten it, or let it change less often"
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
    """The places of drawings that may share a batch: their conditions are the same together as alone."""
    batches: dict[tuple[object, ...], list[int]] = {}
    for place, drawing in enumerate(drawings):
        controls = tuple((each.path, each.start, each.end) for each in drawing.recipe.controls)
        images = tuple((each.path, len(each.images)) for each in drawing.recipe.image_prompts)
        loras = tuple(drawing.lora_weights.items())
        batches.setdefault((*drawing.batch, controls, images, loras), []).append(place)
    return list(batches.values())


def picture_notes(drawings: Sequence[Drawing]) -> list[str]:
    """What the user should know of the pictures that others are drawn from: changed files, masks that are white."""
    uses: dict[PictureUse, None] = {}
    for each in drawings:
        recipe, given = each.recipe, each.given
        for name in ("image", "mask_image"):
            if getattr(given, name) is None and (use := getattr(recipe, name)) is not None:
                uses[use] = None
        if given.control_image is None:
            uses |= dict.fromkeys(use.image for use in recipe.controls)
        if given.ip_adapter_image is None:
            uses |= dict.fromkeys(picture for use in recipe.image_prompts for picture in use.images)
    notes = [note for use in uses if (note := changed(use))]
    if any(each.canvas and each.canvas.mask is not None and each.canvas.mask.all() for each in drawings):
        notes.append("mask_image is white everywhere: all of the picture is drawn anew")
    return notes
