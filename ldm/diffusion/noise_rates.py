"""Rates of noise beta(t), t from 0 to 1: what a variance-preserving SDE is made of (Song et al. 2021, app. B)."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError


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
