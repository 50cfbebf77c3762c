"""The training loss of a denoising network, for every prediction type."""

from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion import parameterization
from ldm.diffusion.denoiser import Network
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError

Weighting = Literal["unit", "snr", "min_snr"]


def diffusion_loss(
    network: Network,
    x0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    weighting: Weighting = "unit",
    gamma: float = 5.0,
) -> Tensor:
    """Weighted squared error of the network's output, one value per picture (B,), float32.

    x0, noise: (B, C, h, w); timestep: (B,) integers in [0, T-1] (or numbers between them). The network
    gets the noised picture at unit variance, `(x0 + sigma * noise) / sqrt(1 + sigma^2)`, in float32.
    Raises UserError for a prediction type that the schedule does not allow.
    """
    parameterization.check(prediction_type, schedule)
    x0, noise = x0.float(), noise.float()
    sigma = schedule.to(x0.device).sigma(timestep).to(x0.dtype)
    x = x0 + per_image(sigma, x0) * noise
    output = network(x * per_image(parameterization.c_in(sigma), x), timestep.to(torch.float32))
    error = output.float() - parameterization.target(prediction_type, x0, x, sigma)
    return loss_weight(sigma, prediction_type, weighting, gamma) * error.square().flatten(1).mean(1)


def loss_weight(
    sigma: Tensor, prediction_type: str, weighting: Weighting = "unit", gamma: float = 5.0
) -> Tensor:
    """Weight of the squared error of the network's output at noise levels `sigma` (B,).

    unit: 1. The others weigh the error of x0, by SNR = 1 / sigma^2 (snr) or by min(SNR, gamma) (min_snr:
    Hang et al. 2023). An error of the output is c_out times smaller than the error of x0 it makes, so the
    weight carries c_out^2: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v_prediction, / 1 for sample.
    """
    if weighting == "unit":
        return torch.ones_like(sigma)
    if weighting not in ("snr", "min_snr"):
        raise UserError(f"weighting {weighting!r} is unknown: use 'unit', 'snr' or 'min_snr'")
    _, c_out = parameterization.c_skip_out(prediction_type, sigma)
    snr = 1 / sigma**2
    return c_out**2 * (snr.clamp(max=gamma) if weighting == "min_snr" else snr)
