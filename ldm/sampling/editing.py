"""Pictures to begin from: image to image (Meng et al. 2022, SDEdit) and inpainting, as a request of `ldm.sampling`.

    request = prepare(system, plan, prompts, seeds, guidance=guidance, size=size)
    request = begin_from(system, request, Pictures(pixels, mask=mask))

Draws of noise come in diffusers' order, image by image from its own generator: first the autoencoder's, for the
picture; then the noise that is added to it; then the autoencoder's for the masked picture (also where no network sees
it).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.plan import Plan
from ldm.errors import UserError
from ldm.sampling import Known, Request, encode
from ldm.system import System


@dataclass(frozen=True)
class Pictures:
    """B pictures to begin from, of one size.

    pixels: (B, 3, H, W) in [0, 1]; or latents (B, C, h, w) as the network has them, where `encoded`. mask: (B, 1, H,
    W), 1 where something is to be drawn and 0 where the picture stays; None draws all of it anew. noisy: the masked
    part begins as noise, in place of what the picture has there.
    """

    pixels: Tensor
    encoded: bool = False
    mask: Tensor | None = None
    noisy: bool = False


def first_step(plan: Plan, strength: float) -> int:
    """Return the number of the first step that is taken: of n steps the last int(n * strength) are, as in diffusers.

    strength: 0 to 1, how much of the picture is drawn anew. Raises UserError where no step is left.
    """
    steps = len(plan.sigmas) - 1
    if not 0 <= strength <= 1:
        raise UserError(f"strength is {strength}: it must be between 0 and 1")
    taken = min(int(steps * strength), steps)
    if not taken:
        raise UserError(
            f"strength {strength} leaves none of {steps} steps to draw with: give at least {1 / steps:.3g}, or more "
            "num_inference_steps"
        )
    return steps - taken


def check_masked(system: System, masked: bool) -> None:
    """Raise UserError for a picture without a mask where the network has to be shown one."""
    if "channels" in system.wants and not masked:
        raise UserError("this is an inpainting model: give a mask_image with the image, or another model")


def go_on_from(request: Request, latents: Tensor) -> Request:
    """Go on with latents (B, C, h, w) as a request whose plan ended early gave them, of the same or another model.

    The request's plan begins where that one ended. Raises UserError.
    """
    if request.latents is not None:
        raise UserError(
            "latents are the first noise, and what goes on from others has none: leave latents out"
        )
    _check_latents(request, latents)
    return replace(request, state=latents.to(request.noise.device))


def begin_from(system: System, request: Request, pictures: Pictures) -> Request:
    """Begin a request from pictures: its plan begins on the way, or at full strength from noise alone.

    The request's size is theirs; its plan begins at `first_step`, or is whole. Where there is a mask, a network that
    takes one is shown it; in the sampling of another network the picture outside of the mask is put back at every step.
    Raises UserError.
    """
    takes_mask = "channels" in system.wants
    check_masked(system, pictures.mask is not None)
    if pictures.encoded:
        _check_latents(request, pictures.pixels)
    noise = request.noise
    whole = request.plan.span is None or request.plan.span.start == 0
    at_full_strength = whole and pictures.mask is not None  # then only what is outside of a mask counts
    pixels = pictures.pixels.to(noise.device)
    x0 = None
    if not (at_full_strength and takes_mask):
        x0 = pixels if pictures.encoded else encode(system.autoencoder, pixels, noise())
    latents = noise() if request.latents is None else request.latents
    if pictures.mask is None:
        return replace(request, latents=latents, x0=x0)
    mask = pictures.mask.to(noise.device).float()
    small = F.interpolate(mask, size=latents.shape[-2:])
    masked_noise = noise()
    begin = None if at_full_strength else x0
    if pictures.noisy and begin is not None:
        begin = torch.where(small > 0.5, noise(), begin)
    if takes_mask:
        if pictures.encoded:
            raise UserError("an inpainting model is shown the masked picture: give a picture, not latents")
        grey = torch.where(mask < 0.5, pixels, 0.5)
        seen = encode(system.autoencoder, grey, masked_noise)
        return _shown(replace(request, latents=latents, x0=begin), torch.cat([small, seen], dim=1))
    assert x0 is not None
    return replace(request, latents=latents, x0=begin, known=Known(x0, small, latents))


def _check_latents(request: Request, latents: Tensor) -> None:
    """Raise UserError for latents of a picture that are not of the request's size, or that hold no real numbers."""
    shape = (len(request.noise.generators), *request.noise.shape)
    if latents.shape != shape:
        raise UserError(f"the latents of a picture are {tuple(latents.shape)}, where {shape} are drawn")
    if latents.is_complex() or not latents.isfinite().all():
        raise UserError("the latents of a picture hold NaN, infinity or complex numbers: give real ones")


def _shown(request: Request, channels: Tensor) -> Request:
    """Put the masks and the latents of masked pictures, (B, 1 + C, h, w), into the conditions."""

    def told(condition: Condition) -> Condition:
        rows = torch.cat([channels] * (condition.rows // len(channels)))
        return replace(condition, channels=rows.to(condition.text))

    changes = tuple((step, told(condition)) for step, condition in request.changes)
    return replace(request, condition=told(request.condition), changes=changes)
