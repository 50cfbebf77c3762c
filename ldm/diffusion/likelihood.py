"""The exact likelihood of data under a diffusion model, and what a picture's noise is (Song et al. 2021, sec. 4.3).

The probability-flow ODE maps data to noise one to one, so by the change of variables (eq. 39)

    log p(x at sigma_min) = log prior(x at sigma_max) + the growth of log volume on the way,

which Skilling's and Hutchinson's estimate of a trace makes cheap (eq. 40). It is exact but for the solver's tolerance
and the probes, whose error bar is given. Data is taken to lie at sigma_min: the density is that of the data under this
little noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.ode import exact_trace, flow, hutchinson
from ldm.diffusion.sde import SDE
from ldm.errors import UserError

Probe = Literal["rademacher", "gaussian"]
# Of pictures of 256 levels, scaled to [-1, 1] and dequantised by uniform noise: a level is 2 / 256 wide.
BITS_OF_8_BIT_PICTURES = 7.0


@dataclass(frozen=True)
class Likelihood:
    """The log likelihood of B pictures.

    log_p: (B,), float64, nats: of all `dims` elements of a picture together. error: (B,), its standard error by the
    probes; 0 for exact traces, NaN for a single probe. latent: (B, C, h, w), the pictures' state at sigma_max.
    evaluations: of the denoiser.
    """

    log_p: Tensor
    error: Tensor
    dims: int
    latent: Tensor
    evaluations: int

    @property
    def nats_per_dim(self) -> Tensor:
        """The negative log likelihood, nats an element, (B,): the smaller the better."""
        return -self.log_p / self.dims

    def bits_per_dim(self, offset: float = 0.0) -> Tensor:
        """Return the negative log likelihood in bits an element, (B,).

        offset: bits to add where the elements are steps of a scale, BITS_OF_8_BIT_PICTURES for pixels; 0 for latents.
        """
        return self.nats_per_dim / math.log(2) + offset


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    sde: SDE,
    probes: int = 1,
    kind: Probe = "rademacher",
    exact: bool = False,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Likelihood:
    """Return the log likelihood of `x` (B, C, h, w) under the model that `denoise` makes with the prior of `sde`.

    probes: vectors of signs or of Gaussian noise (`kind`), fixed all the way, one gradient each at every evaluation;
    two or more give an error bar. generator: of all of them; or each row's own, so that a row has the same probes in
    any batch. What rows' probes have in common, their errors have, and a mean over rows keeps it. exact: the trace
    itself, one gradient an element, for pictures of few elements.
    A network with frozen weights may be in any state of packing: gradients by its input unpack them.
    """
    if not exact and probes < 1:
        raise UserError(f"probes is {probes}: give one or more, or take the exact trace")
    if exact:
        trace, traces = exact_trace, 1
    else:
        trace, traces = hutchinson([_probe(x, kind, generator) for _ in range(probes)]), probes
    found = flow(denoise, x, sde.sigma_min, sde.sigma_max, trace, traces, rtol, atol)
    dims = x[0].numel()
    # The volume is that of u = x / sqrt(1 + sigma^2): back to x at either end.
    scaled = dims / 2 * (math.log1p(sde.sigma_max**2) - math.log1p(sde.sigma_min**2))
    each = sde.log_prior(found.x.to("cpu", torch.float64)) + found.log_volume + scaled  # (K, B)
    spread = each.std(0) if traces > 1 else torch.full_like(each[0], math.nan)
    error = torch.zeros_like(spread) if exact else spread / math.sqrt(traces)
    return Likelihood(each.mean(0), error, dims, found.x, found.evaluations)


def encode(denoise: Denoise, x: Tensor, sde: SDE, rtol: float = 1e-5, atol: float = 1e-5) -> Tensor:
    """Return the noise (B, C, h, w) that `x` comes from by the ODE: its state at sigma_max."""
    return flow(denoise, x, sde.sigma_min, sde.sigma_max, rtol=rtol, atol=atol).x


def decode(denoise: Denoise, noise: Tensor, sde: SDE, rtol: float = 1e-5, atol: float = 1e-5) -> Tensor:
    """Return the pictures at sigma_min of states at sigma_max, (B, C, h, w): the inverse of `encode`, and a sampler."""
    return flow(denoise, noise, sde.sigma_max, sde.sigma_min, rtol=rtol, atol=atol).x


def _probe(x: Tensor, kind: Probe, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if isinstance(generator, Sequence):
        rows = zip(x.split(1), generator, strict=True)
        return torch.cat([_probe(row, kind, own) for row, own in rows])
    if kind == "rademacher":
        return torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    if kind == "gaussian":
        return torch.randn(x.shape, generator=generator).to(x)
    raise UserError(f"a probe of kind {kind!r} is unknown: use rademacher or gaussian")
