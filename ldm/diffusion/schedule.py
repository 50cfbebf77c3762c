"""Noise schedules: how much noise a model sees at each of its training timesteps.

`Schedule` is what the rest knows of one; `NoiseSchedule` is that of a table of betas.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ldm.errors import UserError, nearest

# What stands for an alpha_bar of 0, whose sigma would be infinite: diffusers' value (the smallest subnormal
# of float16), which puts sigma_max at about 4096.
TERMINAL_ALPHA_BAR = 2.0**-24
MOST_TIMESTEPS = 100_000


class Schedule(Protocol):
    """The noise levels of a model, and what it is told of them, its timesteps.

    zero_terminal_snr: at the last timestep there is noise and nothing else.
    """

    @property
    def zero_terminal_snr(self) -> bool: ...

    @property
    def sigma_min(self) -> float:
        """The least noise level, of x0 + sigma * noise, that the model was trained at."""
        ...

    @property
    def sigma_max(self) -> float: ...

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the noise level of timesteps (B,)."""
        ...

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timesteps (B,) that a network is told at noise levels (B,)."""
        ...

    def draw(self, share: Tensor) -> Tensor:
        """Return timesteps (B,) to train at: of uniform shares in [0, 1), such as training draws, rising with them."""
        ...

    def to(self, device: torch.device | str) -> "Schedule":
        """Return the same schedule with its tables on `device`."""
        ...


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The table alpha_bar_t, shape (T,), float64, falling; and what follows from it.

    In the coordinates used everywhere here, `x = x0 + sigma * noise`; a variance-preserving network sees
    `x / sqrt(1 + sigma^2)`, and sigma^2 = (1 - alpha_bar) / alpha_bar.
    """

    alphas_cumprod: Tensor
    zero_terminal_snr: bool = False

    @classmethod
    def build(
        cls,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        terminal_alpha_bar: float = TERMINAL_ALPHA_BAR,
    ) -> "NoiseSchedule":
        """Build a schedule from the keys of diffusers' scheduler_config.json.

        beta_schedule: linear (Ho et al. 2020), scaled_linear (latent diffusion: linear in sqrt(beta)) or
        squaredcos_cap_v2, also called cosine (Nichol & Dhariwal 2021); `trained_betas` takes its place.
        rescale_betas_zero_snr: make the last timestep pure noise (Lin et al. 2023, algorithm 1), but for
        `terminal_alpha_bar`.
        Raises UserError for an unknown schedule, betas outside (0, 1), and noise levels that do not rise.
        """
        count = num_train_timesteps if trained_betas is None else len(trained_betas)
        if count > MOST_TIMESTEPS:
            raise UserError(f"a noise schedule has at most {MOST_TIMESTEPS:,} timesteps, not {count:,}"[:200])
        if not all(map(math.isfinite, (beta_start, beta_end, *(trained_betas or ())))):
            raise UserError("beta_start, beta_end and trained_betas must be finite numbers")
        valid = num_train_timesteps > 1 and min(beta_start, beta_end) > 0
        if trained_betas is not None:
            betas = torch.tensor(trained_betas, dtype=torch.float32)
        elif beta_schedule not in BETAS:
            hint = nearest(beta_schedule, BETAS)
            raise UserError(f"beta_schedule {beta_schedule!r} is unknown{hint}; known: {', '.join(BETAS)}")
        else:
            betas = (
                BETAS[beta_schedule](num_train_timesteps, beta_start, beta_end) if valid else torch.zeros(0)
            )
        if not (betas.ndim == 1 and len(betas) > 1 and bool(((betas > 0) & (betas < 1)).all())):
            raise UserError(
                "the betas of a noise schedule (num_train_timesteps of them, from beta_start to beta_end, or "
                "trained_betas) must be two or more numbers between 0 and 1"
            )
        schedule = cls.from_betas(betas, rescale_betas_zero_snr, terminal_alpha_bar)
        sigmas = schedule.sigmas
        if not (bool(sigmas.isfinite().all()) and sigmas[0] > 0 and bool((sigmas.diff() > 0).all())):
            raise UserError(
                "the betas of the noise schedule are too small or too large: float32 tells its timesteps' noise levels "
                "not apart, or from no noise, or from nothing but noise"
            )
        return schedule

    @classmethod
    def from_betas(
        cls,
        betas: Tensor,
        rescale_betas_zero_snr: bool = False,
        terminal_alpha_bar: float = TERMINAL_ALPHA_BAR,
    ) -> "NoiseSchedule":
        """Build from beta_t, shape (T,); see `build`.

        The betas and their running product are float32, as diffusers has them, so that the noise levels are
        diffusers' too. The original code (CompVis) takes both in float64, where sigmas differ by a share of at
        most 1.3e-5 (scaled_linear), 8.3e-5 (linear) or 2.7e-4 (squaredcos_cap_v2), at the first timesteps.
        """
        alphas = 1 - betas.to("cpu", torch.float32)
        if rescale_betas_zero_snr:
            alphas = _rescale_zero_terminal_snr(alphas)
        alphas_cumprod = alphas.cumprod(0)
        if rescale_betas_zero_snr:
            alphas_cumprod[-1] = min(terminal_alpha_bar, alphas_cumprod[-2].item() / 2)  # still the noisiest
        return cls(alphas_cumprod.double(), rescale_betas_zero_snr)

    def respaced(self, steps: int) -> "NoiseSchedule":
        """Return the chain of so many of the timesteps, evenly from the first to the last.

        Nichol & Dhariwal 2021, sec. 4. A `Denoiser` goes on counting the timesteps by its own schedule. Raises
        UserError for steps outside [2, T].
        """
        if not 2 <= steps <= self.num_train_timesteps:
            raise UserError(
                f"steps is {steps}: a chain has 2 to {self.num_train_timesteps} of this model's timesteps"
            )
        kept = torch.linspace(0, self.num_train_timesteps - 1, steps, dtype=torch.float64).round().long()
        return NoiseSchedule(self.alphas_cumprod[kept.to(self.alphas_cumprod.device)], self.zero_terminal_snr)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """The noise level of each timestep, (T,), rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def log_sigmas(self) -> Tensor:
        return self.sigmas.log()

    @property
    def sigma_min(self) -> float:
        return self.sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        return self.sigmas[-1].item()

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the noise level of timesteps of any shape, in [0, T-1]; between two integers log sigma is linear."""
        last = self.num_train_timesteps - 1
        timestep = timestep.to(self.sigmas.dtype).clamp(0, last)
        low = timestep.long()
        below, above = self.sigmas[low], self.sigmas[(low + 1).clamp(max=last)]
        return below * (above / below) ** (timestep - low)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timestep of noise levels of any shape: the inverse of `sigma`, clamped to [0, T-1].

        Whole timesteps come back whole although sigma is often float32 here: a value within 1e-3 of an
        integer is that integer.
        """
        log_sigma = sigma.to(self.log_sigmas.dtype).log()
        above = torch.searchsorted(self.log_sigmas, log_sigma).clamp(1, self.num_train_timesteps - 1)
        low, high = self.log_sigmas[above - 1], self.log_sigmas[above]
        timestep = above - 1 + ((log_sigma - low) / (high - low)).clamp(0, 1)
        whole = timestep.round()
        return torch.where((timestep - whole).abs() < 1e-3, whole, timestep)

    def draw(self, share: Tensor) -> Tensor:
        """Return timesteps, integers in [0, T-1], of uniform shares in [0, 1)."""
        # A share may be rounded up to 1 on its way here, by `noising.shifted`.
        return (share * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return the same schedule with its table on `device` (float32 on MPS, which has no float64); made once."""
        device = torch.device(device)
        if self.alphas_cumprod.device == device:
            return self
        if device not in self._elsewhere:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            table = self.alphas_cumprod.to(device, dtype)
            self._elsewhere[device] = NoiseSchedule(table, self.zero_terminal_snr)
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, "NoiseSchedule"]:
        return {}


def _linear(steps: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float32)


def _scaled_linear(steps: int, start: float, end: float) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2


def _cosine(steps: int, start: float, end: float) -> Tensor:
    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float32)


BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "cosine": _cosine,
}


def _rescale_zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and begins where it did (Lin et al. 2023)."""
    root = alphas.cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    betas = 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - betas  # through the betas: diffusers keeps those, and float32 rounds them
