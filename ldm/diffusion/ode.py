"""The probability-flow ODE by an adaptive solver, and how much it stretches space on the way.

Whatever the SDE, eq. 13 of Song et al. 2021 is one and the same in the coordinates x = x0 + sigma * noise:

    dx/dsigma = -sigma score = (x - x0) / sigma,

x0 the denoiser's estimate (Karras et al. 2022, eq. 1 and 3). It is solved in log sigma for u = c x with
c = 1 / sqrt(1 + sigma^2), which is of unit size at every noise level, so that one tolerance suits all:

    du/dlog(sigma) = c^2 u - c x0,      its divergence: dims * c^2 - trace(dx0/dx).

The solver is scipy's (Runge-Kutta of order 5 by Dormand and Prince; the paper used the same): it is in every lecture's
environment, the state is small beside the network's work, and no gradient goes through the solver, which is what
torchdiffeq and diffrax are for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, answered, awaited
from ldm.errors import UserError

# (estimate x0 (B, ...), x (B, ...) that it came from) -> estimates of trace(dx0/dx), (K, B)
Trace = Callable[[Tensor, Tensor], Tensor]
_LEAST = 1e-12  # of tolerances


@dataclass(frozen=True)
class Flow:
    """Where the ODE led.

    x: (B, C, h, w) at the noise level that was asked for. log_volume: (K, B), by which the logarithm of a small volume
    around x0 grew on the way, in u; K = 0 where no trace was asked for. evaluations: of the denoiser.
    """

    x: Tensor
    log_volume: Tensor
    evaluations: int


def flow(
    denoise: Denoise,
    x: Tensor,
    start: float,
    end: float,
    trace: Trace | None = None,
    traces: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
) -> Flow:
    """Solve the ODE from noise level `start` to `end`, either way: up is encoding, down is decoding.

    Args:
        x: (B, C, h, w) at `start`. The rows share their steps: a row's end moves within the tolerance with the others.
        trace: estimates the trace of dx0/dx; `traces` of them.
        rtol, atol, method: scipy's, of u; the paper's tolerances.

    Raises UserError for what `check` refuses, levels that are no positive numbers, and where the solver gives up.
    """
    check(rtol, atol)
    if not (0 < start < math.inf and 0 < end < math.inf):
        raise UserError(f"the ODE goes between positive noise levels, not from {start} to {end}")
    solve_ivp, shape = _solver(), x.shape

    def slope(log_sigma: float, state: Any) -> Any:
        sigma = math.exp(log_sigma)
        c = 1 / math.sqrt(1 + sigma**2)
        u = torch.from_numpy(state[: x.numel()].copy()).view(shape)
        at = (u / c).to(x.device, x.dtype)
        x0, found = _estimate(denoise, at, sigma, trace)
        du = c**2 * u - c * x0.to("cpu", torch.float64)
        stretch = x[0].numel() * c**2 - found.to("cpu", torch.float64)
        return torch.cat([du.flatten(), stretch.flatten()]).numpy()

    u = x.detach().to("cpu", torch.float64) / math.sqrt(1 + start**2)
    begin = torch.cat([u.flatten(), u.new_zeros(traces * len(x))]).numpy()
    solved = solve_ivp(
        slope,
        (math.log(start), math.log(end)),
        begin,
        method=method,
        rtol=rtol,
        atol=atol,
        t_eval=[math.log(end)],
    )
    if not solved.success:
        raise UserError(f"the probability-flow ODE was not solved ({solved.message}): take larger tolerances")
    last = torch.from_numpy(solved.y[:, -1].copy())
    u, log_volume = last[: x.numel()].view(shape), last[x.numel() :].view(traces, len(x))
    return Flow((u * math.sqrt(1 + end**2)).to(x.device, x.dtype), log_volume, solved.nfev)


def check(*tolerances: float) -> None:
    """Raise UserError for tolerances below what float64 can keep or not below 1, and where scipy is missing."""
    if bad := [each for each in tolerances if not _LEAST <= each < 1]:
        raise UserError(f"the ODE's tolerance is {bad[0]}: it is {_LEAST:g} or more, and below 1")
    _solver()


def _estimate(denoise: Denoise, x: Tensor, sigma: float, trace: Trace | None) -> tuple[Tensor, Tensor]:
    """The estimate of x0, and of the trace of its derivative by x: no rows of them where none is asked for."""
    level = x.new_full((len(x),), sigma)
    if trace is None:
        with torch.no_grad():
            return answered(awaited(denoise(x, level)))[:, : x.shape[1]], x.new_zeros(0)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        x0 = answered(awaited(denoise(x, level.clone())))[:, : x.shape[1]]
        return x0.detach(), trace(x0, x)


def hutchinson(probes: Sequence[Tensor]) -> Trace:
    """Return the trace's estimates v^T (dx0/dx) v, one for each of `probes` (B, C, h, w) (eq. 40; Skilling 1989)."""

    def trace(x0: Tensor, x: Tensor) -> Tensor:
        products = (torch.autograd.grad(x0, x, v.to(x0), retain_graph=True)[0] * v.to(x0) for v in probes)
        return torch.stack([each.flatten(1).sum(1) for each in products])

    return trace


def exact_trace(x0: Tensor, x: Tensor) -> Tensor:
    """Return the trace itself, (1, B), by one gradient for each of a row's elements: for small pictures."""
    outputs = x0.flatten(1)
    total = x.new_zeros(len(x))
    for i in range(outputs.shape[1]):
        (gradient,) = torch.autograd.grad(outputs[:, i].sum(), x, retain_graph=True)
        total += gradient.flatten(1)[:, i]
    return total[None]


def _solver() -> Any:
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        raise UserError("the probability-flow ODE is solved by scipy: pip install scipy") from None
    return solve_ivp
