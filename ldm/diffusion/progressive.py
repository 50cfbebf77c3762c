"""Progressive distillation: what one step has to say to land where several of a teacher's do, in closed formulas.

Salimans & Ho 2022, arXiv:2202.00512, algorithm 2. With x = x0 + sigma * noise, a step of DDIM from sigma to sigma_end
lands at x_end = x0 + (x - x0) r, r = sigma_end / sigma. It follows which x0 leads from x to a given x_end:

    x0 = (x_end - r x) / (1 - r),

the paper's (z_end - (sigma_end / sigma_t) z_t) / (alpha_end - (sigma_end / sigma_t) alpha_t), z = alpha x.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.parameterization import per_image
from ldm.diffusion.samplers import straight_step


def target(teacher: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Sequence[Tensor]) -> Tensor:
    """Return the x0 (B, C, h, w) by which one step from `x` lands where the teacher's steps through `sigmas` do.

    teacher: (x, sigma) to x0; it is asked at each level but the last. sigmas: two or more falling noise levels, (B,)
    each, of which the first is that of `x` and the last may be 0.

    The steps are linear in x and in the estimates. In the formula above x cancels out, and a mean of the estimates is
    left, in which number k weighs sigma_end (1 / sigma_{k+1} - 1 / sigma_k) / (1 - r). It is summed up as such: float32
    would lose the difference of two states at a sigma of 4096, where zero terminal SNR begins.
    """
    mean, weight = torch.zeros_like(x), per_image(torch.zeros_like(sigmas[0]), x)
    for sigma, sigma_next in pairwise(sigmas):
        x0 = teacher(x, sigma)
        ratio = per_image(sigma_next / sigma, x)
        mean, weight = mean * ratio + x0 * (1 - ratio), weight * ratio + (1 - ratio)
        x = straight_step(x, x0, sigma, sigma_next)
    return mean / weight
