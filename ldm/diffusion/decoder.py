"""The decoder of a reverse process: data's likelihood under its last step's Gaussian (Ho et al. 2020, sec. 3.3)."""

import math
from typing import Literal

import torch
from torch import Tensor

# "gaussian" is a density, of latents or points. "discretized" is a probability, of pixels in [-1, 1] with so many
# levels (Ho et al. 2020, eq. 13), 256 where they have 8 bits. "discretized_tanh" is the same by the approximation of
# the normal distribution function that the paper's own code and guided-diffusion count with, for figures to compare
# with theirs.
Decoder = Literal["gaussian", "discretized", "discretized_tanh"]
_LEAST = 1e-12  # probability that the approximation tells from none, as in guided-diffusion


def log_likelihood(
    x0: Tensor, mean: Tensor, log_variance: Tensor, decoder: Decoder = "gaussian", levels: int = 256
) -> Tensor:
    """Return log p(x0), nats, of every element under N(mean, exp log_variance) and a decoder: see `Decoder`."""
    if decoder == "gaussian":
        squared = (x0 - mean).square() * (-log_variance).exp()
        return -0.5 * (math.log(2 * math.pi) + log_variance + squared)
    half = 1 / (levels - 1)  # of a level
    if decoder == "discretized":
        return _log_interval(x0, mean, log_variance, half)
    scale = (-0.5 * log_variance).exp()

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())

    below, above = (cdf(scale * (x0 - mean + side)) for side in (-half, half))
    last = 1 - half  # beyond it lie the first and the last level alone
    above, below = torch.where(x0 > last, 1.0, above), torch.where(x0 < -last, 0.0, below)
    return (above - below).clamp(min=_LEAST).log()


def _log_interval(x0: Tensor, mean: Tensor, log_variance: Tensor, half: float) -> Tensor:
    """The log-probability of the level that x0 lies in; the first and the last level reach to infinity.

    In float64 where there is one: a level may lie hundreds of deviations from the mean, or be a thousandth of one wide.
    """
    dtype = x0.dtype if x0.device.type == "mps" else torch.float64
    scale, distance = (-0.5 * log_variance.to(dtype)).exp(), x0.to(dtype) - mean.to(dtype)
    # Mirrored to the left of the mean, where the distribution function is small and its logarithm exact.
    near, far = (torch.special.log_ndtr(scale * (side - distance.abs())) for side in (half, -half))
    inside = near + (-torch.expm1((far - near).clamp(max=-torch.finfo(dtype).eps))).log()
    # Towards infinity: the tail that begins at the level's inner border, seen from the side that x0 is on.
    outward = torch.where(x0 > 0, -distance, distance)
    tail = torch.special.log_ndtr(scale * (outward + half))
    return torch.where(x0.abs() > 1 - half, tail, inside).to(x0.dtype)
