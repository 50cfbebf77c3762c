"""The training loss of a denoising network, for every prediction type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion import parameterization
from ldm.diffusion.bound import LN2, Posterior, bound_terms, of_betas
from ldm.diffusion.decoder import Decoder
from ldm.diffusion.noising import Noised
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.sde import SDE
from ldm.errors import UserError

Weighting = Literal["unit", "snr", "truncated_snr", "snr_plus_one", "min_snr", "p2", "vlb", "likelihood"]
PAPER_WEIGHT = 0.001 / LN2  # of the hybrid loss: lambda of Nichol & Dhariwal 2021, whose unit is bits


@dataclass(frozen=True)
class LossConfig:
    """The weights of errors, and the noise that a network learns from.

    weighting: see `loss_weight` and `x0_weight`. gamma: min-SNR's bound. p2_gamma, p2_k: P2's exponent and offset.
    offset_noise: scale of a noise that is the same all over a channel, which teaches very dark and bright pictures.
    input_perturbation: scale of more noise in what the network sees, and not in what it should predict (Ning et al.
        2023; 0.1).
    timestep_shift: above 1 the network sees more noisy pictures, see `noising.shifted`; 1 draws timesteps uniformly.
    variance: true for a network that learns its variance too, and so gives twice the channels: the hybrid loss of
        Nichol & Dhariwal 2021, eq. 16, with the paper's weight of the variational bound. A number is that weight, for
        a bound in nats. The paper's 0.001 is of a bound in bits, as guided-diffusion counts: 0.001 / ln 2 here.
    decoder: of the bound's last term, L_0: see `decoder.Decoder`. Latents have the density of a Gaussian, as no latent
        is a whole number; pixels of so many `levels`, 256 where they have 8 bits, the probability of one.
    """

    weighting: Weighting = "unit"
    gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    timestep_shift: float = 1.0
    variance: bool | float = False
    decoder: Decoder = "gaussian"
    levels: int = 256

    @property
    def bound_weight(self) -> float:
        """The weight of the variational bound in nats; 0 where no variance is learned."""
        return PAPER_WEIGHT if self.variance is True else float(self.variance)


def prediction_loss(
    output: Tensor,
    noised: Noised,
    schedule: Schedule,
    prediction_type: str = "epsilon",
    config: LossConfig | None = None,
) -> Tensor:
    """Return the weighted squared error of a network's output (B, C, h, w), one value per picture (B,), float32.

    The output answers `noised.sample(prediction_type)`; with a learned variance it has twice the channels, and the
    timesteps are integers. Raises UserError for a prediction type that the schedule does not allow.
    """
    config = config or LossConfig()
    parameterization.check(prediction_type, schedule)
    x0, sigma, timestep = noised.x0, noised.sigma, noised.timestep
    schedule, output = schedule.to(x0.device), output.float()
    output, fraction = output.chunk(2, dim=1) if config.variance else (output, None)
    error = output - parameterization.target(prediction_type, x0, noised.x, sigma)
    weight = loss_weight(timestep, schedule, prediction_type, config)
    losses = weight.to(error.dtype) * error.square().flatten(1).mean(1)
    if fraction is None:
        return losses
    found = parameterization.x0_from(prediction_type, output.detach(), noised.seen, sigma)
    table = of_betas(schedule)
    terms = bound_terms(found, x0, timestep, table, "learned_range", fraction, config.decoder, config.levels)
    # One timestep stands for all the terms of the bound.
    return losses + config.bound_weight * table.num_train_timesteps * terms


def loss_weight(timestep: Tensor, schedule: Schedule, prediction_type: str, config: LossConfig) -> Tensor:
    """Weight of the squared error of the network's output at timesteps (B,), in the schedule's precision.

    unit: 1. The others weigh the error of x0, by the signal-to-noise ratio (see `x0_weight`), or by the process:
        vlb: the variational bound's own weights (Ho et al. 2020, eq. 12), (SNR(t-1) - SNR(t)) / 2
        likelihood: the same in continuous time, of an SDE (Song et al. 2021b, arXiv:2101.09258, eq. 7): g^2 / 2 on the
            score's error, which is -dSNR/dt / 2 on that of x0
    An error of the output is c_out times smaller than the error of x0 it makes, so the weight carries c_out^2.
    """
    sigma = schedule.sigma(timestep)
    if config.weighting == "unit":
        return torch.ones_like(sigma)
    _, c_out = parameterization.c_skip_out(prediction_type, sigma)
    if config.weighting == "vlb":
        posterior = Posterior.at(timestep, of_betas(schedule))
        weight = posterior.x0_scale**2 / (2 * posterior.log_variance.exp())
    elif config.weighting == "likelihood":
        if not isinstance(schedule, SDE):
            raise UserError("weighting likelihood is of a process in continuous time: of steps it is vlb")
        weight = schedule.growth(sigma) / (2 * sigma**4)
    else:
        weight = x0_weight(sigma, config)
    return c_out**2 * weight


def x0_weight(sigma: Tensor, config: LossConfig) -> Tensor:
    """Weight of the squared error of x0 at noise levels (B,), by the signal-to-noise ratio SNR = 1 / sigma^2.

    snr: SNR, which is a unit weight on the noise's error (Ho et al. 2020)
    truncated_snr: max(SNR, 1) (Salimans & Ho 2022, sec. 4)
    snr_plus_one: SNR + 1, which is a unit weight on the error of v (the same)
    min_snr: min(SNR, gamma) (Hang et al. 2023)
    p2: SNR / (k + SNR)^gamma (Choi et al. 2022, eq. 8)
    On the score's error `snr` is sigma^2, the weight of denoising score matching (Song & Ermon 2019, eq. 6).

    Raises UserError for a weighting that is none of these.
    """
    if config.weighting not in _OF_SNR:
        known = ", ".join(get_args(Weighting))
        raise UserError(f"weighting {config.weighting!r} is unknown here: use one of {known}")
    return _OF_SNR[config.weighting](1 / sigma**2, config)


_OF_SNR: dict[str, Callable[[Tensor, LossConfig], Tensor]] = {
    "snr": lambda snr, config: snr,
    "truncated_snr": lambda snr, config: snr.clamp(min=1),
    "snr_plus_one": lambda snr, config: snr + 1,
    "min_snr": lambda snr, config: snr.clamp(max=config.gamma),
    "p2": lambda snr, config: snr / (config.p2_k + snr) ** config.p2_gamma,
}
