"""Guidance by gradients: x0 is moved by that of log p(c | x), which another network knows (Sohl-Dickstein et al. 2015).

The score of p(x | c) is that of p(x) plus the gradient of log p(c | x) (Dhariwal & Nichol 2021, eq. 10 and 13; Song et
al. 2021, eq. 14). In x = x0 + sigma * noise the score is (x0 - x) / sigma^2 (Tweedie), so that gradient, times sigma^2,
is added to x0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Asking, Denoise, awaited, change_x0
from ldm.diffusion.parameterization import per_image

# (x (B, C, h, w), sigma (B,)) -> log p(c | x), (B,), each image's of its own row, up to a constant.
LogLikelihood = Callable[[Tensor, Tensor], Tensor]
CleanLogLikelihood = Callable[[Tensor], Tensor]  # the same of clean x0 (B, C, h, w)
Interval = tuple[float, float]  # noise levels low < sigma <= high, in which it guides
Guide = Callable[[Denoise], Denoise]  # all of it bound, but for whom it guides

EVERYWHERE: Interval = (0.0, math.inf)


def gradient_guided(
    denoise: Denoise,
    log_likelihood: LogLikelihood,
    scale: float | Tensor,
    interval: Interval = EVERYWHERE,
) -> Denoise:
    """Return the denoiser guided by who reads noised pictures: x0 + scale * sigma^2 * grad_x log p(c | x).

    As a step of ancestral sampling sees it, it is the shift of the mean by the variance (Dhariwal & Nichol 2021, alg.
    1); as DDIM's does, the change of epsilon by sqrt(1 - alpha_bar) * grad (alg. 2).

    scale: of the gradient, one or (B,). interval: above it p(c | x) is flat, and what a network's gradient is there,
    times sigma^2, is noise.
    """

    def guided(x: Tensor, sigma: Tensor) -> Asking:
        estimate = yield from awaited(denoise(x, sigma))
        strength = _strength(scale, sigma, interval)
        if not bool(strength.any()):
            return estimate
        gradient = gradient_of(lambda x: log_likelihood(x, sigma), x)
        return change_x0(lambda x0: x0 + per_image(strength * sigma**2, x) * gradient, estimate, x)

    return guided


def clean_guided(
    denoise: Denoise,
    log_likelihood: CleanLogLikelihood,
    scale: float | Tensor,
    interval: Interval = EVERYWHERE,
) -> Denoise:
    """Return the denoiser guided by who knows clean pictures only: x0 + scale * sigma^2 / (1 + sigma^2) * grad_x0.

    The gradient is at the estimate of x0 and does not go through the denoiser. By the chain rule it would be
    multiplied by that one's derivative, which is Cov(x0 | x) / sigma^2 (Tweedie's second order); here this has the
    value that it has where x0 is of unit variance, 1 / (1 + sigma^2), as in pseudoinverse guidance (Song et al. 2023,
    eq. 8). It costs no pass back through the network, and is exact on a Gaussian of unit variance.
    """

    def guided(x: Tensor, sigma: Tensor) -> Asking:
        estimate = yield from awaited(denoise(x, sigma))
        strength = _strength(scale, sigma, interval)
        if not bool(strength.any()):
            return estimate
        share = per_image(strength * sigma**2 / (1 + sigma**2), x)
        return change_x0(lambda x0: x0 + share * gradient_of(log_likelihood, x0), estimate, x)

    return guided


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient (B, ...) of each row of `function(x)`, (B,), with respect to the same row of x (B, ...)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0].to(x.dtype)


def _strength(scale: float | Tensor, sigma: Tensor, interval: Interval) -> Tensor:
    """The scale of each row, (B,), 0 outside of the interval."""
    low, high = interval
    inside = (sigma > low) & (sigma <= high)
    return torch.where(inside, torch.as_tensor(scale).to(sigma), 0.0)
