"""A batch of drawings as one request of `ldm.sampling`."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ldm.condition import Condition, concatenate
from ldm.errors import UserError
from ldm.sampling import Guidance, Request, controlled, guided, prepare
from ldm.sampling.editing import Pictures, begin_from, go_on_from
from ldm.system import System
from pipelines.canvas import resized
from pipelines.drawing import Drawing
from pipelines.given import shown_controls, shown_images
from pipelines.loaded import Loaded
from pipelines.originals import latents_of


def request_for(system: System, drawings: Sequence[Drawing], loaded: Loaded, device: torch.device) -> Request:
    """Put together the request of drawings that share a batch: they differ in what is of one image only.

    device: where the network computes. Raises UserError.
    """
    recipes, given = [each.recipe for each in drawings], [each.given for each in drawings]
    shared = recipes[0]
    assert shared.guidance_scale is not None
    assert shared.height and shared.width
    interval = shared.guidance_interval or (0.0, math.inf)
    guidance = Guidance(shared.guidance_scale, shared.guidance_rescale, interval).of(system.wants)
    size = (shared.height, shared.width)
    none = all(recipe.negative_prompt is None for recipe in recipes)
    images = [shown_images(recipe, each) for recipe, each in zip(recipes, given, strict=True)]
    text, notes = _encoded(system, drawings, guidance)
    latents = [each.latents for each in given if each.latents is not None]
    request = prepare(
        system,
        drawings[0].plan,
        [each.prompts.prompt for each in drawings] if text is None else text,
        [each.given.generator or each.recipe.seed or 0 for each in drawings],
        negatives=None if none else [each.prompts.negative or "" for each in drawings],
        guidance=guidance,
        clip_skip=shared.clip_skip,
        size=size,
        sizes=shared.sizes(),
        negative_sizes=shared.negative_sizes(),
        aesthetic_score=shared.aesthetic_score,
        negative_aesthetic_score=shared.negative_aesthetic_score,
        images=loaded.image_adapters.prompts([recipe.image_prompts for recipe in recipes], images),
        latents=torch.stack(latents) if latents else None,
        device=device,
    )
    request = replace(
        request,
        notes=(*notes, *request.notes),
        token_merging=shared.token_merging,
        feature_reuse=shared.feature_reuse,
    )
    if shared.clip_guidance_scale:
        texts = [each.prompts.prompt.at(0) for each in drawings]
        guide = loaded.clips.guide(shared.clip_model, texts, shared.clip_guidance_scale)
        request = guided(request, [guide])
    if shared.controls:
        shown = [_control_pictures(each, size) for each in drawings]
        uses = [recipe.controls for recipe in recipes]
        controls = loaded.controlnets.controls(uses, shown, shared.guess_mode)
        request = controlled(system, request, controls)
    return _begun(system, request, drawings) if shared.image is not None else request


def _control_pictures(drawing: Drawing, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The control pictures of a drawing, each brought to its (height, width) as what it is drawn from was."""
    canvas, mode = drawing.canvas, drawing.recipe.resize_mode
    shown = shown_controls(drawing.recipe, drawing.given)
    return tuple(resized(each, size, mode) if canvas is None else canvas.beside(each, mode) for each in shown)


def _encoded(
    system: System, drawings: Sequence[Drawing], guidance: Guidance
) -> tuple[Condition | None, list[str]]:
    """Put together the text of a request from embeddings in place of prompts; None where none were given.

    drawings: of one batch, either all or none of which have a kind of embedding. Returns B rows, where guided 2B, the
    negatives first, and notes. Raises UserError.
    """
    recipes, given = [each.recipe for each in drawings], [each.given for each in drawings]
    without = all(recipe.negative_prompt is None for recipe in recipes)
    positives = [each.prompt_embeds for each in given if each.prompt_embeds]
    negatives = [each.negative_prompt_embeds for each in given if each.negative_prompt_embeds]
    if not positives and not negatives:
        return None, []
    if any(len(each.prompts.prompt.segments) > 1 for each in drawings) or any(
        each.prompts.negative and len(each.prompts.negative.segments) > 1 for each in drawings
    ):
        raise UserError("prompts that change at a step go with prompts alone, and not with embeddings")
    prompts, clip_skip = [each.prompts.prompt.at(0) for each in drawings], recipes[0].clip_skip
    against = [each.prompts.negative.at(0) if each.prompts.negative else "" for each in drawings]
    text, notes, device = system.text, list[str](), system.network.device
    length = (positives or negatives)[0].text.shape[1]
    if positives:
        positive = concatenate(positives)
    else:
        positive, notes = text.encode(prompts, clip_skip=clip_skip, length=length)
    if not guidance.guides:
        return positive, notes + (guidance.notes(True) if negatives else [])
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


def _begun(system: System, request: Request, drawings: Sequence[Drawing]) -> Request:
    """Begin the request of drawings from the pictures, or the latents, that their recipes have. Raises UserError."""
    latents = [each for drawing in drawings if (each := latents_of(drawing.given.image)) is not None]
    recipe = drawings[0].recipe
    if recipe.denoising_start is not None:
        return go_on_from(request, torch.stack(latents))
    if latents:
        return begin_from(system, request, Pictures(torch.stack(latents), encoded=True))
    canvases = [drawing.canvas for drawing in drawings if drawing.canvas is not None]
    pixels = torch.from_numpy(np.stack([each.begin for each in canvases])).permute(0, 3, 1, 2)
    masks = [each.mask for each in canvases if each.mask is not None]
    mask = torch.from_numpy(np.stack(masks))[:, None] if masks else None
    return begin_from(system, request, Pictures(pixels, mask=mask, noisy=recipe.mask_content == "noise"))
