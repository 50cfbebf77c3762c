"""Consistency models: a network that maps every point of an ODE's path to its end, in closed formulas.

Song et al. 2023, arXiv:2303.01469 ("the first paper"), and Song & Dhariwal 2023, arXiv:2310.14189 ("the second").
Noise levels are sigma_1 = eps < ... < sigma_N = T; a network learns to put out the same at the two ends of a step
between neighbours. Training counts pictures, `seen`, where the papers count steps k of K.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Asking, Denoise, awaited
from ldm.diffusion.edm import karras_levels
from ldm.diffusion.parameterization import per_image, unit_variance
from ldm.diffusion.schedule import MOST_TIMESTEPS, NoiseSchedule
from ldm.errors import UserError

HUBER_C = (1e-9, 1e6)  # from least to most: at 0 there is no gradient where the two agree; float32 squares it


def levels(count: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return the levels sigma_1 .. sigma_N of N = `count` >= 2, (N,), float64, rising (the first paper, sec. 2)."""
    return karras_levels(low, high, torch.linspace(1, 0, count, dtype=torch.float64), rho)


@dataclass(frozen=True)
class Fixed:
    """N levels all along, and a target of decay mu, as in distillation (the first paper, sec. 4; app. C)."""

    kind: ClassVar[str] = "fixed"

    levels: int = 18
    decay: float = 0.0

    def check(self, where: str) -> None:
        """Raise UserError for values that can't be."""
        if not 2 <= self.levels <= MOST_TIMESTEPS:
            raise UserError(
                f"{where}.levels must be at least 2 and at most {MOST_TIMESTEPS:,}, not {self.levels}"
            )
        check_decay(f"{where}.decay", self.decay)

    @property
    def last(self) -> int:
        """N at the end."""
        return self.levels

    def count(self, seen: int) -> int:
        """Return N when so many pictures were seen."""
        return self.levels

    def target_decay(self, seen: int) -> float:
        """Return mu, of the moving average that the target is; 0 is the student itself."""
        return self.decay


@dataclass(frozen=True)
class Growing:
    """N that grows as the square root of the time, and mu with it (the first paper, app. C).

    pictures: K, after which it grows no more. start, end: s0 and s1, the steps at first and last. decay: mu0, at the
    first N.
    """

    kind: ClassVar[str] = "growing"

    pictures: int
    start: int = 2
    end: int = 150
    decay: float = 0.9

    def check(self, where: str) -> None:
        """Raise UserError for values that can't be."""
        _check_growth(where, self.pictures, self.start, self.end)
        check_decay(f"{where}.decay", self.decay)

    @property
    def last(self) -> int:
        """N at the end."""
        return self.end + 1

    def count(self, seen: int) -> int:
        """Return N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1, of at least 2."""
        share, start = min(seen / self.pictures, 1), self.start**2
        return max(2, math.ceil(math.sqrt(share * ((self.end + 1) ** 2 - start) + start) - 1) + 1)

    def target_decay(self, seen: int) -> float:
        """Return mu(k) = exp(s0 ln(mu0) / N(k))."""
        return 0.0 if self.decay == 0 else math.exp(self.start * math.log(self.decay) / self.count(seen))


@dataclass(frozen=True)
class Doubling:
    """N that doubles every so often, and a target that is the student (the second paper, sec. 3.2, 3.4, table 1).

    pictures: K, after which it doubles no more. start, end: s0 and s1, the steps at first and last.
    """

    kind: ClassVar[str] = "doubling"

    pictures: int
    start: int = 10
    end: int = 1280

    def check(self, where: str) -> None:
        """Raise UserError for values that can't be."""
        _check_growth(where, self.pictures, self.start, self.end)

    @property
    def last(self) -> int:
        """N at the end."""
        return self.end + 1

    def count(self, seen: int) -> int:
        """Return N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2(floor(s1 / s0)) + 1))."""
        stage = seen // max(1, math.floor(self.pictures / (math.log2(self.end // self.start) + 1)))
        return min(self.start * 2 ** min(stage, 64), self.end) + 1

    def target_decay(self, seen: int) -> float:
        """Return 0."""
        return 0.0


Curriculum = Fixed | Growing | Doubling


def lognormal_weights(sigmas: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Return how often training takes each step of rising `sigmas` (N,): (N - 1,), of sum 1 (the second paper, 3.5).

    p(sigma_i) ~ erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / (sqrt(2) std)), the share
    that a normal ln(sigma) has between the two levels.
    """
    mass = torch.special.erf((sigmas.log() - mean) / (math.sqrt(2) * std)).diff()
    return mass / mass.sum()


def chosen(share: Tensor, weights: Tensor) -> Tensor:
    """Return the steps (B,), from 0, at uniform shares (B,) in [0, 1) of the weights (N - 1,), of sum 1."""
    edges = weights.cumsum(0)[:-1].to(share.device)
    return torch.searchsorted(edges, share.to(edges.dtype), right=True)


def step_weight(sigma_low: Tensor, sigma_high: Tensor) -> Tensor:
    """Return lambda(sigma_i) = 1 / (sigma_{i+1} - sigma_i) (the second paper, sec. 3.1)."""
    return 1 / (sigma_high - sigma_low)


def squared_l2(x: Tensor, y: Tensor) -> Tensor:
    """Return |x - y|^2 of each row, (B,) (the first paper, sec. 4)."""
    return (x - y).square().flatten(1).sum(1)


def huber_constant(dims: int) -> float:
    """Return c = 0.00054 sqrt(d) for data of d numbers (the second paper, sec. 3.3)."""
    return 0.00054 * math.sqrt(dims)


def pseudo_huber(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    """Return sqrt(|x - y|^2 + c^2) - c of each row, (B,) (the second paper, eq. 8).

    c: None is `huber_constant`. Written as a quotient, which float32 does not round to 0 where the two are near.
    """
    c = huber_constant(x[0].numel()) if c is None else c
    square = squared_l2(x, y)
    return square / ((square + c**2).sqrt() + c)


def noised_pair(x0: Tensor, noise: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return x0 under the same noise at both levels (B,) of a step (the first paper, algorithm 3)."""
    return x0 + per_image(low, x0) * noise, x0 + per_image(high, x0) * noise


def solver_step(
    teacher: Callable[[Tensor, Tensor], Tensor], x: Tensor, high: Tensor, low: Tensor, heun: bool = True
) -> Tensor:
    """Solve a teacher's ODE from x at the levels `high` (B,) down to `low` (the first paper, eq. 6 and sec. 4).

    One step of Heun's method, or of Euler's. teacher: (x, sigma) to x0.
    """
    above, below = per_image(high, x), per_image(low, x)
    slope = (x - teacher(x, high)) / above
    end = x + (below - above) * slope
    if not heun:
        return end
    return x + (below - above) / 2 * (slope + (end - teacher(end, low)) / below)


def latent_boundary(denoise: Denoise, schedule: NoiseSchedule, timestep_scaling: float = 10.0) -> Denoise:
    """Apply the boundary condition of a latent consistency model, f(x, 0) = x (Luo et al. 2023, appendix B).

    The published models have sigma_data 0.5.
    """

    def bounded(x: Tensor, sigma: Tensor) -> Asking:
        time = timestep_scaling * schedule.to(sigma.device).timestep(sigma).to(x.dtype)
        skip, out = 0.25 / (time**2 + 0.25), time / (time**2 + 0.25).sqrt()
        estimate = yield from awaited(denoise(x, sigma))
        return per_image(skip * unit_variance(sigma), x) * x + per_image(out, x) * estimate

    return bounded


def check_decay(what: str, decay: float) -> None:
    """Raise UserError for a decay by which a running average can't move. what: the setting."""
    if not 0 <= decay < 1:
        raise UserError(f"{what} must be at least 0 and below 1, not {decay}")


def _check_growth(where: str, pictures: int, start: int, end: int) -> None:
    if pictures < 1 or not 1 <= start <= end < MOST_TIMESTEPS:
        raise UserError(
            f"{where}: pictures is at least 1, and 1 <= start <= end < {MOST_TIMESTEPS:,}, not {pictures}, {start} and "
            f"{end}"
        )
