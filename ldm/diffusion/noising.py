"""Pictures under noise, as a network in training sees them."""

from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion import parameterization
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Noised:
    """Clean pictures and what noise made of them at timesteps (B,), float32.

    x0: (B, C, h, w), clean. x: x0 + sigma * noise, in which a prediction is judged. seen: what the network is shown,
    which is x unless it was given another noise. sigma: (B,).
    """

    x0: Tensor
    x: Tensor
    seen: Tensor
    sigma: Tensor
    timestep: Tensor

    def sample(self, prediction_type: str) -> Tensor:
        """Return the input of a network of this prediction type: what is shown, at unit variance."""
        return self.seen * parameterization.c_in(prediction_type, per_image(self.sigma, self.seen))


def add_noise(
    x0: Tensor, noise: Tensor, timestep: Tensor, schedule: Schedule, seen_noise: Tensor | None = None
) -> Noised:
    """Put noise on clean pictures.

    Args:
        x0, noise: (B, C, h, w).
        timestep: (B,), as the schedule counts them: of T steps integers in [0, T-1], or numbers between them.
        seen_noise: (B, C, h, w), what the network sees in place of the noise (Ning et al. 2023).
    """
    schedule, x0, noise = schedule.to(x0.device), x0.float(), noise.float()
    sigma = schedule.sigma(timestep).to(x0.dtype)
    level = per_image(sigma, x0)
    x = x0 + level * noise
    return Noised(x0, x, x if seen_noise is None else x0 + level * seen_noise.float(), sigma, timestep)


def shifted(share: Tensor, shift: float) -> Tensor:
    """Move uniform shares (B,) of the way to noise: u to s u / (1 + (s - 1) u) (Esser et al. 2024, eq. 23).

    Half of them lie above s / (1 + s): above 0.75 for a shift of 3. Where text decides, at high noise, a network so
    learns it from more pictures.
    """
    return shift * share / (1 + (shift - 1) * share)
