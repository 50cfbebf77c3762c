"""Spacings: which noise levels a sampler visits in n steps."""

import math

import torch
from torch import Tensor

from ldm.diffusion.edm import karras_levels
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError, nearest

# Timesteps found by optimisation for ten steps (Sabour et al. 2024, "Align Your Steps"), of SD 1.5 and of SDXL.
_ALIGN_YOUR_STEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
_ALIGN_YOUR_STEPS_XL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)
# These name timesteps; the others name noise levels.
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "sgm_uniform")
SPACINGS = (*TIMESTEP_SPACINGS, "karras", "exponential", "align_your_steps")


def spaced_timesteps(
    spacing: str,
    n: int,
    num_train_timesteps: int = 1000,
    steps_offset: int = 0,
    whole: bool = True,
    extra_point: bool = False,
) -> Tensor:
    """Return descending timesteps (n,), float64, of a spacing in TIMESTEP_SPACINGS (Lin et al. 2023, table 2).

    leading: multiples of T // n, from 0, plus `steps_offset`; trailing: counted down from T - 1; linspace:
    from T - 1 to 0 with both ends; sgm_uniform: as linspace of n + 1 points without the last.
    whole: round linspace to integers. extra_point: divide leading and linspace in n + 1 and leave out the
    last, as diffusers does for DPM-Solver and UniPC.
    """
    last, points = num_train_timesteps - 1, n + 1 if extra_point or spacing == "sgm_uniform" else n
    i = torch.arange(n, dtype=torch.float64)
    if spacing == "leading":
        timesteps = (points - 1 - i) * (num_train_timesteps // points) + steps_offset
    elif spacing == "trailing":
        timesteps = (num_train_timesteps - i * (num_train_timesteps / n)).round() - 1
    else:
        timesteps = (points - 1 - i) * (last / (points - 1)) if points > 1 else i + last
        if whole and spacing == "linspace":
            timesteps = timesteps.round()
    return timesteps.clamp(0, last)


def lcm_timesteps(
    n: int, num_train_timesteps: int = 1000, original_inference_steps: int = 50, strength: float = 1.0
) -> Tensor:
    """Return descending timesteps (n,), float64: n of the `original_inference_steps` a consistency model knows.

    strength: in [0, 1], the share of those, from the picture up, that they are chosen from.
    Raises UserError if n is larger than that, or those are more than `num_train_timesteps`.
    """
    if original_inference_steps > num_train_timesteps:
        raise UserError(
            f"original_inference_steps {original_inference_steps} is more than num_train_timesteps,"
            f" {num_train_timesteps}: give at most as many"
        )
    if not 0 <= strength <= 1:
        raise UserError(f"strength is {strength}: it must be between 0 and 1")
    known = int(original_inference_steps * strength)
    if known < n <= original_inference_steps:
        raise UserError(
            f"strength {strength} leaves {known} of the {original_inference_steps} steps that a latent consistency"
            f" model knows, and num_inference_steps is {n}: give more strength, or fewer steps"
        )
    if n > original_inference_steps:
        raise UserError(
            f"num_inference_steps {n} is more than original_inference_steps, {original_inference_steps}:"
            " a latent consistency model knows no more"
        )
    chosen = torch.arange(n, dtype=torch.float64) * (known / n)
    return (known - chosen.floor()) * (num_train_timesteps // original_inference_steps) - 1


def spaced_sigmas(
    schedule: NoiseSchedule,
    spacing: str,
    n: int,
    *,
    final: float = 0.0,
    ends: tuple[float, float] | None = None,
    steps_offset: int = 0,
    whole: bool = True,
    extra_point: bool = False,
    is_xl: bool = False,
) -> Tensor:
    """Return descending noise levels (n + 1,), float64, of any of SPACINGS; the last is `final`.

    ends: (sigma_max, sigma_min) between which karras (Karras et al. 2022, eq. 5, rho 7) and exponential lie;
    the schedule's own if None. is_xl: align_your_steps as found for SDXL. The other options: see `spaced_timesteps`.
    Raises UserError for an unknown spacing or an n outside 1 .. T.
    """
    if spacing not in SPACINGS:
        raise UserError(
            f"schedule {spacing!r} is unknown{nearest(spacing, SPACINGS)}; known: {', '.join(SPACINGS)}"
        )
    if not 1 <= n <= schedule.num_train_timesteps:
        raise UserError(
            f"num_inference_steps must be between 1 and {schedule.num_train_timesteps}, the model's timesteps"
        )
    high, low = ends or (schedule.sigma_max, schedule.sigma_min)
    if spacing in TIMESTEP_SPACINGS:
        total = schedule.num_train_timesteps
        sigmas = schedule.sigma(spaced_timesteps(spacing, n, total, steps_offset, whole, extra_point))
    elif spacing == "karras":
        sigmas = karras_levels(low, high, torch.linspace(0, 1, n, dtype=torch.float64))
    elif spacing == "exponential":
        sigmas = torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64).exp()
    else:
        sigmas = _align_your_steps(schedule, _ALIGN_YOUR_STEPS_XL if is_xl else _ALIGN_YOUR_STEPS, n)
    return torch.cat([sigmas, sigmas.new_tensor([final])])


def _align_your_steps(schedule: NoiseSchedule, timesteps: tuple[int, ...], n: int) -> Tensor:
    """The ten published timesteps and 0 as noise levels, log-linear in between for other counts."""
    scale = (schedule.num_train_timesteps - 1) / 999
    known = schedule.sigma(torch.tensor([*timesteps, 0], dtype=torch.float64) * scale).log()
    at = torch.arange(n, dtype=torch.float64) * (len(known) - 1) / n
    below = at.floor().long()
    return torch.lerp(known[below], known[below + 1], at - below).exp()
