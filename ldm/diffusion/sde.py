"""Score SDEs: noise that is put on in continuous time, as schedules (Song et al. 2021, arXiv:2011.13456).

A stochastic differential equation dy = f(y, t) dt + g(t) dw, t from 0 to 1, turns data into noise (eq. 5). The three of
the paper have a Gaussian kernel p(y(t) | y(0)) = N(alpha(t) y(0), std(t)^2). The paper's state y is alpha x in the
coordinates of this house, where x = x0 + sigma * noise and sigma = std / alpha. So each SDE is a schedule as
`NoiseSchedule` is one: networks that learned on it go through the same denoiser, noising and samplers. The reverse of
an SDE is in `sde_samplers`, its probability-flow ODE in `ode`.

`t` are float tensors of any shape, in [0, 1]. `timestep` is what a network is told.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ldm.diffusion.parameterization import per_image
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError

Embedding = Literal["fourier", "positional"]


class SDE:
    """What is common to the SDEs: the schedule that follows from alpha, std and their inverse.

    scale: the timestep at t = 1, of networks that are told t. end: the smallest t that is trained and sampled; at t = 0
    the score of data on a surface is infinite (app. C). prior_std: of the Gaussian that y(1) is taken to have.
    """

    scale: float
    end: float
    prior_std: float
    zero_terminal_snr = False

    def drift(self, y: Tensor, t: Tensor) -> Tensor:
        """Return f(y, t) at states `y` (B, ...) and times `t` (B,)."""
        raise NotImplementedError

    def diffusion(self, t: Tensor) -> Tensor:
        """Return g(t)."""
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        """Return the scale of the data at time t."""
        raise NotImplementedError

    def std(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise at time t."""
        raise NotImplementedError

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times at which std / alpha is `sigma`, in [0, 1]."""
        raise NotImplementedError

    def discretized(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, G^2) of the step from t_next up to t: y(t) = a y(t_next) + G z, as the reverse takes it.

        This one is Euler-Maruyama's of the forward SDE, at t; app. E has better ones for VE and VP.
        """
        dt = t - t_next
        return 1 + self.drift(torch.ones_like(t), t) * dt, self.diffusion(t) ** 2 * dt

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the noise levels at timesteps of any shape."""
        return self._ratio(timestep / self.scale)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return what a network is told at noise levels of any shape."""
        return self.time(sigma) * self.scale

    def draw(self, u: Tensor) -> Tensor:
        """Return the timesteps (B,) of uniform numbers `u` (B,) in [0, 1): t is uniform between `end` and 1."""
        return (self.end + (1 - self.end) * u) * self.scale

    def to(self, device: torch.device | str) -> "SDE":
        """Return the same SDE on `device`."""
        return self

    @property
    def sigma_min(self) -> float:
        return self._ratio(torch.tensor(self.end, dtype=torch.float64)).item()

    @property
    def sigma_max(self) -> float:
        return self._ratio(torch.ones((), dtype=torch.float64)).item()

    def sigmas(self, steps: int) -> list[float]:
        """Return the noise levels of `steps` steps that are even in t from 1 to `end`, then 0; `steps` + 1 of them."""
        return [*self._ratio(torch.linspace(1, self.end, steps, dtype=torch.float64)).tolist(), 0.0]

    def log_prior(self, x: Tensor) -> Tensor:
        """Return the log density, nats, of states x (B, ...) at sigma_max under the prior; x = y(1) / alpha(1)."""
        std = self.prior_std / self.alpha(torch.ones((), dtype=torch.float64)).item()
        return -((x / std).square().flatten(1).sum(1) / 2) - x[0].numel() * math.log(
            std * math.sqrt(math.tau)
        )

    def _ratio(self, t: Tensor) -> Tensor:
        return self.std(t) / self.alpha(t)


class Beta(Protocol):
    """A rate beta(t) of noise, and its integral B(t) from the clean picture to t, with B's inverse."""

    def rate(self, t: Tensor) -> Tensor: ...
    def integral(self, t: Tensor) -> Tensor: ...
    def inverse(self, integral: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LinearBeta:
    """beta(t) = low + (high - low) t, the paper's (app. C); 0.1 and 20 are DDPM's 0.0001 and 0.02, times 1000."""

    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise UserError(
                f"beta_min and beta_max of an SDE: 0 < beta_min < beta_max, not {self.low}, {self.high}"
            )

    def rate(self, t: Tensor) -> Tensor:
        """Return beta(t)."""
        return self.low + (self.high - self.low) * t

    def integral(self, t: Tensor) -> Tensor:
        """Return B(t) = low t + (high - low) t^2 / 2."""
        return t * (self.low + (self.high - self.low) * t / 2)

    def inverse(self, integral: Tensor) -> Tensor:
        """Return t of B(t): the root of the quadratic, in the form that loses no digits at small t."""
        return 2 * integral / (self.low + (self.low**2 + 2 * (self.high - self.low) * integral).sqrt())


@dataclass(frozen=True)
class TableBeta:
    """The rate that runs through a table of discrete noise levels, whose timesteps 0 to T - 1 are t from 0 to 1.

    B = log(1 + sigma^2), and log sigma is linear between two timesteps, as `NoiseSchedule.sigma` has it.
    """

    schedule: NoiseSchedule

    def rate(self, t: Tensor) -> Tensor:
        """Return beta(t) = dB/dt = 2 sigma^2 / (1 + sigma^2) dlog(sigma)/dt."""
        last = self.schedule.num_train_timesteps - 1
        below = (t * last).long().clamp(0, last - 1)
        slope = (self.schedule.log_sigmas[below + 1] - self.schedule.log_sigmas[below]) * last
        variance = self.schedule.sigma(t * last) ** 2
        return 2 * variance / (1 + variance) * slope

    def integral(self, t: Tensor) -> Tensor:
        """Return B(t); above 0 at t = 0, where the first timestep's noise lies."""
        return (self.schedule.sigma(t * (self.schedule.num_train_timesteps - 1)) ** 2).log1p()

    def inverse(self, integral: Tensor) -> Tensor:
        """Return t of B(t), in [0, 1]."""
        return self.schedule.timestep(integral.expm1().sqrt()) / (self.schedule.num_train_timesteps - 1)


@dataclass(frozen=True)
class VP(SDE):
    """The variance-preserving SDE, dy = -beta y / 2 dt + sqrt(beta) dw (eq. 11): DDPM's limit of many steps."""

    beta: Beta = field(default_factory=LinearBeta)
    end: float = 1e-3
    scale: float = 999.0
    prior_std: float = 1.0

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> "VP":
        """Return the SDE through a discrete schedule's noise levels; networks are told the same timesteps as before."""
        return cls(TableBeta(schedule), end=0.0, scale=schedule.num_train_timesteps - 1)

    def drift(self, y: Tensor, t: Tensor) -> Tensor:
        """Return -beta(t) y / 2."""
        return -per_image(self.beta.rate(t), y) * y / 2

    def diffusion(self, t: Tensor) -> Tensor:
        """Return sqrt(beta(t))."""
        return self.beta.rate(t).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        """Return exp(-B(t) / 2) (eq. 29)."""
        return (-self.beta.integral(t) / 2).exp()

    def std(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - exp(-B(t))) (eq. 29)."""
        return (-(-self.beta.integral(t)).expm1()).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times: 1 + sigma^2 = exp(B)."""
        return self.beta.inverse((sigma**2).log1p())

    def discretized(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return DDPM's step, exact for the data: a^2 = 1 - beta_i, G^2 = beta_i (eq. 10)."""
        a = self.alpha(t) / self.alpha(t_next)
        return a, 1 - a**2

    def to(self, device: torch.device | str) -> "VP":
        """Return the same SDE with a table of levels, where it has one, on `device`."""
        if isinstance(self.beta, TableBeta):
            return replace(self, beta=TableBeta(self.beta.schedule.to(device)))
        return self


@dataclass(frozen=True)
class SubVP(SDE):
    """The sub-VP SDE, dy = -beta y / 2 dt + sqrt(beta (1 - exp(-2B))) dw (eq. 12): VP's mean under less noise.

    A network sees x at unit variance here, as VP's does; the paper's sees alpha x, at most 14 % less.
    """

    beta: Beta = field(default_factory=LinearBeta)
    end: float = 1e-3
    scale: float = 999.0
    prior_std: float = 1.0

    def drift(self, y: Tensor, t: Tensor) -> Tensor:
        """Return -beta(t) y / 2."""
        return -per_image(self.beta.rate(t), y) * y / 2

    def diffusion(self, t: Tensor) -> Tensor:
        """Return sqrt(beta(t) (1 - exp(-2 B(t))))."""
        return (-self.beta.rate(t) * (-2 * self.beta.integral(t)).expm1()).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        """Return exp(-B(t) / 2) (eq. 29)."""
        return (-self.beta.integral(t) / 2).exp()

    def std(self, t: Tensor) -> Tensor:
        """Return 1 - exp(-B(t)) (eq. 29; the variance is its square)."""
        return -(-self.beta.integral(t)).expm1()

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times: sigma = (1 - exp(-B)) exp(B / 2) = 2 sinh(B / 2)."""
        return self.beta.inverse(2 * (sigma / 2).asinh())
