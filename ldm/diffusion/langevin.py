"""Langevin dynamics, plain and annealed (Song & Ermon 2019, arXiv:1907.05600; 2020, arXiv:2006.09011), as samplers.

Where the score of x under the noise sigma is known, (x0 - x) / sigma^2 with x0 the denoiser's estimate, the walk

    x <- x + a score + sqrt(2 a) z,    a = step * sigma^2,

ends in samples of the noisy data. `step` is a share of sigma^2 here, so the walk reads x + step (x0 - x) + sqrt(2 step)
sigma z. The first paper writes alpha_i = epsilon sigma_i^2 / sigma_L^2 for 2 a: its step is epsilon / (2 sigma_L^2),
0.1 with its epsilon of 2e-5 and sigma_L of 0.01. The second writes alpha_i for a: `step_size` computes it.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.samplers import NoiseSource, Steps, walk
from ldm.diffusion.variance_exploding import Ladder
from ldm.errors import UserError


def langevin_step(x: Tensor, x0: Tensor, sigma: float, step: float | Tensor, z: Tensor) -> Tensor:
    """Take one step of the walk at noise level `sigma`; z: standard normal noise shaped like x."""
    return x + (x0 - x) * step + z * (sigma * (2 * step) ** 0.5)


def sgld(x: Tensor, sigma: float, noise: NoiseSource, steps: Iterable[float]) -> Steps:
    """Sample the data under noise `sigma` by stochastic gradient Langevin dynamics (Welling & Teh 2011, eq. 4).

    steps: the size of each step, as a share of sigma^2; see `decaying`. All of one size leave a bias of that order:
    Gaussian data of variance v, noise included, come out with v / (1 - a / (2v)).
    """
    for step in steps:
        x0 = yield x, sigma
        x = langevin_step(x, x0, sigma, step, noise())
    return x


def decaying(count: int, first: float, last: float, exponent: float = 0.55) -> list[float]:
    """Return `count` step sizes a (b + t)^-exponent from `first` to `last` (Welling & Teh 2011, sec. 5).

    An exponent in (0.5, 1] makes their sum endless and that of their squares finite (eq. 2), which takes the bias away.
    """
    if count < 2 or not first > last > 0 or not 0.5 < exponent <= 1:
        raise UserError(
            "decaying steps: two or more, first > last > 0, and an exponent above 0.5 and up to 1"
        )
    fall = (last / first) ** (-1 / exponent)  # ((b + count - 1) / b)
    b = (count - 1) / (fall - 1)
    return [first * ((b + t) / b) ** -exponent for t in range(count)]


def annealed_langevin(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    step: float = 0.1,
    steps_per_level: int = 100,
    denoise: bool = True,
) -> Steps:
    """Sample by annealed Langevin dynamics (Song & Ermon 2019, algorithm 1): `steps_per_level` steps at each level.

    sigmas: the ladder from its highest level down, and where to go from the lowest: 0. denoise: end at the estimate of
    x0, one step without noise (2020, algorithm 1; Jolicoeur-Martineau et al. 2020); else with the lowest level's noise.
    """
    for _, sigma, sigma_next in walk(sigmas, span):
        x = yield from sgld(x, sigma, noise, [step] * steps_per_level)
        if sigma_next == 0 and denoise:
            x = yield x, sigma
    return x


# The techniques of Song & Ermon 2020. The third is the row `ve_epsilon` of the prediction table, the fifth is the
# moving average of training.


def largest_level(points: Tensor) -> float:
    """Return the largest distance between two of `points` (N, ...), the level to begin at (technique 1)."""
    flat = points.flatten(1)
    return max(torch.cdist(rows, flat).max().item() for rows in flat.split(1024))


def overlap(ratio: float, dims: int) -> float:
    """Return the share of a level's samples that lie within three sigmas of the next level's shell (proposition 2)."""
    shift = math.sqrt(2 * dims) * (ratio - 1)
    return _normal_cdf(shift + 3 * ratio) - _normal_cdf(shift - 3 * ratio)


def geometric_levels(low: float, high: float, dims: int, share: float = 0.5) -> Ladder:
    """Return the ladder from `high` to `low` whose neighbours overlap by `share` (technique 2): for dims elements.

    The ratio is 1.01 to 1.1 for thousands of elements; the count is rounded up, so that the overlap is no less.
    """
    inside, outside = 1.0, 1.0 + 10 / math.sqrt(2 * dims)
    while overlap(outside, dims) > share and outside < high / low:
        outside = 1 + (outside - 1) * 2
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if overlap(middle, dims) > share else (inside, middle)
    return Ladder(low, high, max(2, math.ceil(math.log(high / low) / math.log(inside)) + 1))


def spread_after(step: float, ratio: float, steps_per_level: int) -> float:
    """Return s_T^2 / sigma^2: the variance of points after a level's steps, of 1 (proposition 3; data in one point).

    They come from the level above, where it was ratio^2.
    """
    decay = (1 - step) ** (2 * steps_per_level)
    limit = 2 * step / (1 - (1 - step) ** 2)
    return decay * (ratio**2 - limit) + limit


def step_size(ratio: float, steps_per_level: int) -> float:
    """Return the step that leaves points nearest to a level's noise (technique 4): epsilon / sigma_L^2 of the paper.

    ratio: of a level to the next. Searched on a fine grid, as the paper says.
    """
    steps = torch.logspace(-8, -0.01, 20_000, dtype=torch.float64).tolist()
    return min(steps, key=lambda step: abs(spread_after(step, ratio, steps_per_level) - 1))


def _normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
