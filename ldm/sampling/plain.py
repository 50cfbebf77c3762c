"""Drawing with a system without text: by classes, by another condition, or by none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.condition import Condition, concatenate
from ldm.diffusion.denoiser import Asking, Denoise, answered
from ldm.diffusion.driver import Callback, Noise
from ldm.diffusion.process import Drawing
from ldm.sampling import Guidance
from ldm.system.plain import PlainSystem

Wrapper = Callable[[Denoise], Denoise]


@dataclass(frozen=True)
class PlainRequest:
    """Pictures to draw together.

    condition: B rows, on the network's device; one without parts for an unconditional network. noise: of B images.
    wrappers: what is put around the guided denoiser, the first innermost: a limit on x0, another guidance.
    """

    drawing: Drawing
    condition: Condition
    noise: Noise
    guidance: Guidance
    wrappers: Sequence[Wrapper] = ()


def prepare(
    system: PlainSystem,
    drawing: Drawing,
    condition: Condition,
    seeds: Sequence[int | torch.Generator],
    guidance: Guidance | None = None,
    wrappers: Sequence[Wrapper] = (),
    size: tuple[int, int] | None = None,
) -> PlainRequest:
    """Put together all that drawing B pictures needs. size: (h, w) of what is denoised; None is the model's own."""
    device, guidance = system.network.device, (guidance or Guidance(1.0)).of(system.wants)
    if guidance.told:
        scale = torch.as_tensor(guidance.scale, dtype=torch.float32)
        condition = replace(condition, guidance=scale.expand(len(seeds)))
    channels, *sides = system.shape
    noise = Noise(seeds, (channels, *(size or (sides[0], sides[1]))), device)
    condition = condition.to(device, system.network.dtype)
    return PlainRequest(drawing, condition, noise, guidance, wrappers)


def run(system: PlainSystem, request: PlainRequest, callback: Callback | None = None) -> Asking:
    """Draw what is denoised, (B, C, h, w), float32, as a coroutine that asks the network.

    Raises UserError for guidance of a model that never learned without its classes.
    """
    guidance, condition = request.guidance, request.condition
    if guidance.guides:
        condition = concatenate([system.without(condition), condition])
    denoiser = request.drawing.denoiser(system.bind(condition))
    denoise = guidance.around(denoiser)
    for wrapper in request.wrappers:
        denoise = wrapper(denoise)
    return (yield from request.drawing.run(denoise, request.noise, callback))


@torch.no_grad()
def draw(system: PlainSystem, request: PlainRequest, callback: Callback | None = None) -> Tensor:
    """Draw, and decode where it is of latents: (B, C, H, W), pictures in about [-1, 1], or points."""
    drawn = answered(run(system, request, callback))
    if system.autoencoder is None:
        return drawn
    unscaled = system.autoencoder.unscale(drawn)
    return system.autoencoder.decode(unscaled.to(next(system.autoencoder.parameters()).dtype)).float()
