"""Guidance by a likelihood that knows clean pictures only, such as a published CLIP's, at the estimate of x0.

One that reads noised pictures, such as GLIDE's noised CLIP (Nichol et al. 2022, sec. 2.4), guides by `by_score` of
`classifier_guidance`, as a noisy classifier does.
"""

import math
from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.classifier_guidance import gradient, inside
from ldm.diffusion.denoiser import Asking, Denoise, awaited, change_x0
from ldm.diffusion.parameterization import per_image

CleanLogLikelihood = Callable[
    [Tensor], Tensor
]  # x0 (B, C, h, w) -> log p(y | x0), (B,), with a gradient in x0


def by_estimate(
    denoise: Denoise,
    log_likelihood: CleanLogLikelihood,
    scale: float | Tensor = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Denoise:
    """Add scale * sigma^2 / (1 + sigma^2) * (gradient in x0, at the estimate) to every estimate of x0.

    The gradient does not go through the denoiser. By the chain rule that of log p(y | x0(x)) in x is the gradient in
    x0 times the denoiser's derivative, which is Cov(x0 | x) / sigma^2 (Tweedie's second order). Here that has the value
    that it has where x0 is of unit variance, 1 / (1 + sigma^2), as in pseudoinverse guidance (Song et al. 2023, sec.
    3). It costs no pass back through the network, and is exact for a Gaussian x0 of unit variance.

    scale: one for all images, or (B,). interval: guide where low < sigma <= high only.
    """

    def guided(x: Tensor, sigma: Tensor) -> Asking:
        estimate = yield from awaited(denoise(x, sigma))
        share = inside(scale, sigma, interval) * sigma**2 / (1 + sigma**2)
        if not bool(share.any()):
            return estimate

        def moved(x0: Tensor) -> Tensor:
            slope = gradient(lambda here, _: log_likelihood(here), x0, sigma)
            return x0 + per_image(share, x0) * slope.to(x0.dtype)

        return change_x0(moved, estimate, x)

    return guided
