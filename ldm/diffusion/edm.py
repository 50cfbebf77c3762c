"""The noise levels of EDM (Karras et al. 2022, arXiv:2206.00364), on which consistency models are built too.

x = x0 + sigma * noise as it stands, sigma from 0.002 to 80. A network sees x at unit variance (row `edm` of the
prediction table) and is told the logarithm of sigma.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UserError


def karras_levels(low: float, high: float, share: Tensor, rho: float = 7.0) -> Tensor:
    """Return the noise levels at shares in [0, 1] of the way from `high` down to `low`, in the shape of `share`.

    Karras et al. 2022, eq. 5: their root of order `rho` is linear in the share. `low` and `high` change places for
    levels that rise.
    """
    first, last = high ** (1 / rho), low ** (1 / rho)
    return (first + share * (last - first)) ** rho


@dataclass(frozen=True)
class EDM:
    """Noise levels between `low` and `high`, spaced as `karras_levels`, of which networks are told the logarithm.

    scale: a network is told scale * ln(sigma) / 4; table 1 has 1, OpenAI's consistency models 1000. mean, std: of
    ln(sigma) in training, which is normal (table 1: P_mean, P_std) and may go beyond `low` and `high`. data_std: what
    the data is taken to add to the noise where drawing begins.
    """

    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0
    scale: float = 1.0
    mean: float = -1.2
    std: float = 1.2
    data_std: float = 0.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise UserError(
                f"sigma_min and sigma_max: 0 < sigma_min < sigma_max, not {self.low} and {self.high}"
            )
        if not (0 < self.rho < math.inf and 0 < self.scale < math.inf and 0 < self.std < math.inf):
            raise UserError(
                f"rho, timestep_scale and p_std must be above 0, not {self.rho}, {self.scale} and {self.std}"
            )

    @property
    def sigma_min(self) -> float:
        return self.low

    @property
    def sigma_max(self) -> float:
        return self.high

    @property
    def first_std(self) -> float:
        """The standard deviation of x where drawing begins."""
        return math.hypot(self.high, self.data_std)

    def levels(self, count: int) -> Tensor:
        """Return `count` noise levels (count,), float64, from the highest to the lowest; of one, the highest."""
        return karras_levels(self.low, self.high, torch.linspace(0, 1, count, dtype=torch.float64), self.rho)

    def sigmas(self, steps: int) -> list[float]:
        """Return the noise levels of so many steps, then 0 (eq. 5)."""
        return [*self.levels(steps).tolist(), 0.0]

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the noise levels of what a network is told, of any shape, in its precision."""
        return (timestep * (4 / self.scale)).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return what a network is told at noise levels of any shape, in float64: c_noise, ln(sigma) / 4."""
        return sigma.double().log() * (self.scale / 4)

    def draw(self, share: Tensor) -> Tensor:
        """Return the timesteps (B,), float64, of uniform shares (B,) in [0, 1), multiples of 2^-24.

        ln(sigma) is normal: it is the quantile in the middle of what a share stands for, so that 0 is no infinity.
        """
        quantile = torch.special.ndtri(share.double() + 2.0**-25)
        return self.timestep((self.mean + self.std * quantile).exp())

    def to(self, device: torch.device | str) -> "EDM":
        """Return the same levels on `device`."""
        return self
