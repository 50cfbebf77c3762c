"""Guidance by the gradient of a likelihood, such as a noisy classifier's (Dhariwal & Nichol 2021, section 4).

The paper's two forms as wrappers of a `Denoise`. In its coordinates x_t = c_in(sigma) * x; here x = x0 + sigma * noise,
and the gradient in x_t is that in x divided by c_in. Both wrap what is guided otherwise, such as `classifier_free`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Asking, Denoise, awaited, change_x0
from ldm.diffusion.parameterization import per_image, unit_variance
from ldm.diffusion.samplers import Variance, ancestral_deviation

# (x (B, C, h, w), sigma (B,)) -> log p(y | x), (B,), of what each picture is to be, with a gradient in x. Each picture
# for itself; any multiple, or a constant more, will do.
LogLikelihood = Callable[[Tensor, Tensor], Tensor]


def gradient(log_likelihood: LogLikelihood, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the gradient of log p(y | x) in x (B, C, h, w), also within no_grad and inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        here = x.detach().clone().requires_grad_()
        found = log_likelihood(here, sigma.detach().clone())
        return torch.autograd.grad(found.sum(), here)[0]


def by_score(
    denoise: Denoise,
    log_likelihood: LogLikelihood,
    scale: float | Tensor = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Denoise:
    """Add the likelihood's score to the model's: algorithm 2, for DDIM and every solver of the flow.

    eps - sqrt(1 - alpha_bar) * scale * (gradient in x_t) is, as an estimate of x0, x0 + scale * sigma^2 * (gradient in
    x). scale: one for all images, or (B,). interval: guide where low < sigma <= high only.
    """

    def guided(x: Tensor, sigma: Tensor) -> Asking:
        estimate = yield from awaited(denoise(x, sigma))
        strength = inside(scale, sigma, interval) * sigma**2
        if not bool(strength.any()):
            return estimate
        shift = per_image(strength, x) * gradient(log_likelihood, x, sigma)
        return change_x0(lambda x0: x0 + shift, estimate, x)

    return guided


def by_mean(
    denoise: Denoise,
    log_likelihood: LogLikelihood,
    sigmas: Sequence[float],
    scale: float | Tensor = 1.0,
    variance: Variance = "fixed_small",
    interval: tuple[float, float] = (0.0, math.inf),
    scale_in: Callable[[Tensor], Tensor] = unit_variance,
) -> Denoise:
    """Shift the mean of every ancestral step by scale * Sigma * (gradient in x_t): algorithm 1, for `samplers.ddpm`.

    The estimate is the x0 of which the step's mean is the shifted one. A step to sigma 0 has no variance, and no shift.

    Args:
        sigmas: the plan's noise levels. An estimate is of the step in which its level lies, as in `by_step`.
        variance: of the steps, as the sampler has it; with "learned_range" the estimate's own.
        scale_in: c_in, 1 for variance-exploding models.
        scale, interval: see `by_score`.
    """
    ends = torch.tensor(sigmas, dtype=torch.float64)
    # float32's rounding of a level must not make it the step before.
    levels = ends[:-1] * (1 + 1e-6)

    def guided(x: Tensor, sigma: Tensor) -> Asking:
        estimate = yield from awaited(denoise(x, sigma))
        here = sigma.double()
        step = (here[:, None] <= levels.to(here.device)).sum(1).clamp(min=1) - 1
        after = ends.to(here.device)[step + 1]
        strength = inside(scale, sigma, interval) * (after > 0)
        if not bool(strength.any()):
            return estimate
        after = torch.where(after > 0, after, here / 2)  # of no weight, but for divisions by zero
        share = estimate[:, x.shape[1] :].double()
        own, following = per_image(here, x), per_image(after, x)
        deviation = ancestral_deviation(own, following, variance, share)
        # The mean is x0 + (x - x0) * (after / here)^2, and the paper's that times c_in(after).
        of_x0 = 1 - (following / own) ** 2
        between = scale_in(following) / scale_in(own)
        factor = per_image(strength.double(), x) * between * deviation**2 / of_x0
        shift = (factor * gradient(log_likelihood, x, sigma)).to(x.dtype)
        return change_x0(lambda x0: x0 + shift, estimate, x)

    return guided


def inside(scale: float | Tensor, sigma: Tensor, interval: tuple[float, float]) -> Tensor:
    """The scale of each image, (B,), 0 outside of the interval."""
    low, high = interval
    strength = torch.as_tensor(scale).to(sigma).expand(len(sigma))
    return torch.where((sigma > low) & (sigma <= high), strength, 0)
