"""What a network predicts: one table that samplers, guidance and losses share.

A network's output F stands for the clean picture through three functions of the noise level,

    x0 = c_skip(sigma) * x + c_out(sigma) * F(c_in(sigma) * x),

with x = x0 + sigma * noise (the scalings of Karras et al. 2022, eq. 7). What is here is of variance-preserving
networks, whose c_in is 1 / sqrt(1 + sigma^2); networks of another kind are rows with a c_in of their own: `ve_score`
and `ve_epsilon` see x as it is, and put out the score of x (Song et al. 2021, as diffusers' NCSN++ does) or its noise;
`edm` is table 1 of Karras et al. 2022, and `consistency` that with a boundary at SIGMA_MIN, where x itself comes out
(Song et al. 2023, app. C).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError, nearest

SIGMA_DATA = 0.5  # the standard deviation of data in the papers of the rows `edm` and `consistency`
SIGMA_MIN = 0.002


def unit_variance(sigma: Tensor) -> Tensor:
    """Return the scale that gives x0 + sigma * noise unit variance, in the shape of `sigma`."""
    return 1 / (1 + sigma**2).sqrt()


@dataclass(frozen=True)
class _Scalings:
    """A row of the table: sigma to (c_skip, c_out), and to c_in."""

    skip_out: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale_in: Callable[[Tensor], Tensor] = unit_variance


def _with_data(sigma: Tensor) -> Tensor:
    """The standard deviation of x where the data's is SIGMA_DATA."""
    return (sigma**2 + SIGMA_DATA**2).sqrt()


def _edm(sigma: Tensor) -> tuple[Tensor, Tensor]:
    return (SIGMA_DATA / _with_data(sigma)) ** 2, sigma * SIGMA_DATA / _with_data(sigma)


def _consistency(sigma: Tensor) -> tuple[Tensor, Tensor]:
    above = sigma - SIGMA_MIN
    return (SIGMA_DATA / _with_data(above)) ** 2, above * SIGMA_DATA / _with_data(sigma)


_TABLE = {
    "epsilon": _Scalings(lambda s: (torch.ones_like(s), -s)),
    "sample": _Scalings(lambda s: (torch.zeros_like(s), torch.ones_like(s))),
    "v_prediction": _Scalings(lambda s: (1 / (1 + s**2), -s / (1 + s**2).sqrt())),
    "score": _Scalings(lambda s: (torch.ones_like(s), s**2 / (1 + s**2).sqrt())),
    "ve_score": _Scalings(lambda s: (torch.ones_like(s), s**2), torch.ones_like),
    "ve_epsilon": _Scalings(lambda s: (torch.ones_like(s), -s), torch.ones_like),
    "edm": _Scalings(_edm, lambda s: 1 / _with_data(s)),
    "consistency": _Scalings(_consistency, lambda s: 1 / _with_data(s)),
}
PREDICTION_TYPES = tuple(_TABLE)


def c_in(prediction_type: str, sigma: Tensor) -> Tensor:
    """Return the scale of what the network sees, in the shape of `sigma`."""
    return _TABLE[prediction_type].scale_in(sigma)


def c_skip_out(prediction_type: str, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return (c_skip, c_out) of a prediction type (one of PREDICTION_TYPES), each in the shape of `sigma`."""
    return _TABLE[prediction_type].skip_out(sigma)


def x0_from(prediction_type: str, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean picture that a network's output (B, ...) stands for at `x` (B, ...) and `sigma` (B,)."""
    c_skip, c_out = c_skip_out(prediction_type, per_image(sigma, x))
    return c_skip * x + c_out * output


def target(prediction_type: str, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return what the network ought to put out at `x` (B, ...), `sigma` (B,) when the clean picture is `x0`."""
    c_skip, c_out = c_skip_out(prediction_type, per_image(sigma, x))
    return (x0 - c_skip * x) / c_out


def check(prediction_type: str, schedule: Schedule) -> None:
    """Raise UserError for an unknown prediction type, or one that a zero-terminal-SNR schedule undoes.

    At the last timestep of such a schedule x is noise and nothing else: the noise says nothing of x0.
    """
    if prediction_type not in _TABLE:
        hint = nearest(prediction_type, _TABLE)
        known = ", ".join(_TABLE)
        raise UserError(f"prediction_type {prediction_type!r} is unknown{hint}; known: {known}")
    if schedule.zero_terminal_snr and prediction_type in ("epsilon", "score"):
        raise UserError(
            f"prediction_type {prediction_type!r} is undefined at zero terminal SNR (rescale_betas_zero_snr):"
            " use 'v_prediction' or 'sample'"
        )


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per image, (B,), to broadcast over `x` (B, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))
