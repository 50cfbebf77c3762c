"""Wrappers that return another `Denoise`: guidance, change by step, limits on x0, known pixels."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Asking, Denoise, Denoiser, awaited, change_x0
from ldm.diffusion.parameterization import per_image

Limit = Callable[[Tensor], Tensor]  # of estimates of x0 (B, ...), each image alone


def classifier_free(
    denoiser: Denoiser,
    scale: float | Tensor,
    rescale: float | Tensor = 0.0,
    interval: tuple[float | Tensor, float | Tensor] = (0.0, math.inf),
) -> Denoise:
    """Return the denoiser of classifier-free guidance: uncond + scale * (cond - uncond), in one network call.

    Ho & Salimans 2022.

    Every number is one for all images, or one each, (B,): images of unlike requests may share a call.
    denoiser: its network takes B rows, all under the condition, or 2B, the first B without it.
    scale: at 1 or less (as in diffusers) an image is not guided, and where none of the batch is, the unconditional
    pass is not run.
    rescale: share, in [0, 1], of the result's standard deviation put back to that of the conditional output
    (Lin et al. 2023, section 3.4). interval: guide where low < sigma <= high only (Kynkäänniemi et al. 2024).

    Both act on the network's own output: rescaling does not commute with the step to x0. A learned variance is the
    conditional one.
    """
    scales, shares, low, high = (torch.as_tensor(each) for each in (scale, rescale, *interval))
    scales = scales.clamp(min=1)
    guided_at_all, rescaled = bool((scales > 1).any()), bool((shares > 0).any())
    always = bool((low <= 0).all() and (high == math.inf).all())

    def denoise(x: Tensor, sigma: Tensor) -> Asking:
        strength = scales.to(x).expand(len(x))
        if not always:
            inside = (sigma > low.to(sigma)) & (sigma <= high.to(sigma))
            strength = torch.where(inside, strength, 1)
        if not guided_at_all or (not always and bool((strength == 1).all())):
            return (yield from denoiser(x, sigma))
        both = yield from denoiser.output(torch.cat([x, x]), torch.cat([sigma, sigma]))
        uncond, cond = both.chunk(2)

        def guide(cond: Tensor) -> Tensor:
            against = uncond[:, : x.shape[1]]
            guided = against + per_image(strength, x) * (cond - against)
            return rescale_output(guided, cond, shares.to(x)) if rescaled else guided

        return denoiser.x0_from(change_x0(guide, cond, x), x, sigma)

    return denoise


def rescale_output(guided: Tensor, cond: Tensor, rescale: float | Tensor) -> Tensor:
    """Move each image's standard deviation by `rescale`, one or (B,), of the way back to that of `cond` (B, ...)."""
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    share = per_image(torch.as_tensor(rescale).to(guided).reshape(-1), guided)
    return torch.where(share > 0, guided * (share * ratio + 1 - share), guided)


def by_step(parts: Sequence[tuple[int, Denoise]], sigmas: Sequence[float]) -> Denoise:
    """Ask another denoiser from certain steps on, such as one with another prompt bound.

    parts: (step, denoiser) with ascending numbers of steps, the first 0: each holds until the next begins. sigmas: the
    plan's noise levels. A row belongs to the step in which its noise level lies, sigmas[step] >= sigma >
    sigmas[step + 1], so a solver that asks several times a step asks the next one where it looks ahead to its end.
    """
    # float32's rounding of a level must not make it the step before.
    levels = torch.tensor([sigmas[step] * (1 + 1e-6) for step, _ in parts], dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Asking:
        own = (sigma.double()[:, None] <= levels.to(sigma.device)).sum(1).clamp(min=1) - 1
        wanted = own.unique().tolist()
        found = yield from awaited(parts[wanted[0]][1](x, sigma))
        for k in wanted[1:]:
            other = yield from awaited(parts[k][1](x, sigma))
            found = torch.where(per_image(own == k, found), other, found)
        return found

    return denoise


def limited(denoise: Denoise, limit: Limit | Sequence[Limit | None]) -> Denoise:
    """Put every estimate of x0 through `limit`: a clamp, or `threshold_x0`; or through one each, None for no limit."""
    rows = None if callable(limit) else list(limit)

    def each(x0: Tensor) -> Tensor:
        pairs = zip(rows or (), x0.split(1), strict=True)
        return torch.cat([row if own is None else own(row) for own, row in pairs])

    def denoised(x: Tensor, sigma: Tensor) -> Asking:
        estimate = yield from awaited(denoise(x, sigma))
        return change_x0(limit if callable(limit) else each, estimate, x)

    return denoised


def threshold_x0(x0: Tensor, quantile: float = 0.995, limit: float = 1.0) -> Tensor:
    """Threshold x0 (B, ...) dynamically (Saharia et al. 2022, section 2.3).

    Each image is clipped to its `quantile` of |x0|, at least 1 and at most `limit`, and divided by it.
    """
    bound = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(1, limit)
    bound = per_image(bound, x0)
    return x0.clamp(-bound, bound) / bound


def known_pixels(
    denoise: Denoise, known: Tensor, mask: Tensor, noise: Tensor | None = None, first: float = math.inf
) -> Denoise:
    """Inpaint: where `mask` is 1 x0 is drawn, where it is 0 it is `known` (both broadcast to x0).

    noise: like `known`, of unit variance; the denoiser then sees `known` under that noise, whatever the sampler's state
    is there. Samplers treat each number by itself, so it is as if the state were replaced after every step (as
    RePaint's and diffusers' inpainting do). first: the noise level that the sampler begins at, where its own state is
    seen, as it is in diffusers.
    """

    def denoised(x: Tensor, sigma: Tensor) -> Asking:
        if noise is not None:
            there = known + per_image(sigma, x) * noise
            begins = per_image(sigma, x) > first * (1 - 1e-6)
            x = torch.where(begins, x, there + mask * (x - there))
        estimate = yield from awaited(denoise(x, sigma))
        return change_x0(lambda x0: known + mask * (x0 - known), estimate, x)

    return denoised
