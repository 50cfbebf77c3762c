"""Noise that explodes: the VE SDE (Song et al. 2021, eq. 9) and the ladder of NCSN (Song & Ermon 2019), as schedules.

Their data keeps its scale, alpha = 1, and the noise grows far above it. Networks see x as it is (rows `ve_score` and
`ve_epsilon` of the prediction table) and are told, by `embedding`: "fourier", sigma itself, of whose logarithm
diffusers' UNet2DModel takes random Fourier features, putting out a score; "positional", the place between the smallest
and the largest level, of which it takes sines.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm.diffusion.schedule import MOST_TIMESTEPS
from ldm.diffusion.sde import SDE, Embedding
from ldm.errors import UserError


@dataclass(frozen=True)
class VE(SDE):
    """The variance-exploding SDE: sigma(t) = low (high / low)^t, f = 0, g = sigma sqrt(2 log(high / low)) (eq. 9, 30).

    At t = 0 there is the noise `low` already: what is called data lies under it.
    """

    low: float = 0.01
    high: float = 50.0
    embedding: Embedding = "fourier"
    end: float = 0.0
    scale: float = 999.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise UserError(
                f"sigma_min and sigma_max: 0 < sigma_min < sigma_max, not {self.low} and {self.high}"
            )

    @property
    def prior_std(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.high

    def drift(self, y: Tensor, t: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(y)

    def diffusion(self, t: Tensor) -> Tensor:
        """Return sqrt(d sigma^2 / dt)."""
        return self.std(t) * math.sqrt(2 * math.log(self.high / self.low))

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        """Return sigma(t) (eq. 31)."""
        return self.low * (self.high / self.low) ** t

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times; those of levels outside [low, high] are 0 and 1."""
        return ((sigma / self.low).log() / math.log(self.high / self.low)).clamp(0, 1)

    def discretized(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ladder's step, exact: a = 1, G^2 = sigma^2 - sigma_next^2 (eq. 8)."""
        return torch.ones_like(t), self.std(t) ** 2 - self.std(t_next) ** 2

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the noise levels of what a network is told."""
        return timestep if self.embedding == "fourier" else self.std(timestep / self.scale)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return what a network is told at noise levels of any shape."""
        return sigma if self.embedding == "fourier" else self.time(sigma) * self.scale

    def draw(self, share: Tensor) -> Tensor:
        """Return the timesteps (B,) of uniform shares (B,) in [0, 1): log sigma is uniform."""
        return self.timestep(self.std(self.end + (1 - self.end) * share))


@dataclass(frozen=True, eq=False)
class Ladder:
    """The levels of NCSN: `count` of them, each `high` to `low` by the same ratio, which alone are trained and sampled.

    Song & Ermon 2019, sec. 4.2. `geometric_levels` of `langevin` says how many their second paper takes.
    """

    low: float = 0.01
    high: float = 1.0
    count: int = 10
    embedding: Embedding = "fourier"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < math.inf and 1 < self.count <= MOST_TIMESTEPS):
            raise UserError(
                f"a ladder of noise levels: 0 < sigma_min < sigma_max and two or more levels, "
                f"{MOST_TIMESTEPS:,} at the most, not {self.low}, {self.high} and {self.count!s:.40}"
            )

    @cached_property
    def levels(self) -> Tensor:
        """The noise levels, (count,), float64, rising."""
        return torch.linspace(math.log(self.low), math.log(self.high), self.count, dtype=torch.float64).exp()

    @property
    def ratio(self) -> float:
        """Of a level to the one below it: gamma."""
        return (self.high / self.low) ** (1 / (self.count - 1))

    @property
    def sigma_min(self) -> float:
        return self.low

    @property
    def sigma_max(self) -> float:
        return self.high

    @property
    def first_std(self) -> float:
        """The standard deviation of x where drawing begins."""
        return self.high

    def sigmas(self, steps: int | None = None) -> list[float]:
        """Return the noise levels from the highest down, then 0: all of them, or `steps` that are spread over them."""
        count = self.count if steps is None else min(steps, self.count)
        places = torch.linspace(self.count - 1, 0, count).round().long()
        return [*self.levels[places].tolist(), 0.0]

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the noise levels of what a network is told: of sigma, or of the level's number from 0, the lowest."""
        return timestep if self.embedding == "fourier" else self.low * self.ratio**timestep

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return what a network is told at noise levels of any shape."""
        return sigma if self.embedding == "fourier" else (sigma / self.low).log() / math.log(self.ratio)

    def draw(self, share: Tensor) -> Tensor:
        """Return the timesteps (B,) of uniform shares (B,) in [0, 1): every level as often as any other."""
        number = (share * self.count).long().clamp(max=self.count - 1)
        return self.timestep(self.levels.to(share.device, share.dtype)[number])

    def to(self, device: torch.device | str) -> "Ladder":
        """Return the same ladder on `device`."""
        return self
