"""Samplers of a score SDE: the reverse-time SDE by Euler-Maruyama, predictors and correctors (Song et al. 2021).

They are coroutines as those of `samplers`, with the SDE as an option: they work in its own state y = alpha x, yield
(x, sigma) and end with x. sigmas: see `SDE.sigmas`; a last step to 0 has no noise and ends at the estimate of x0. The
score of y is (alpha x0 - y) / std^2. Ancestral sampling (app. F) is `samplers.ddpm`, for VP and VE alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.langevin import langevin_step
from ldm.diffusion.samplers import NoiseSource, Steps, walk
from ldm.diffusion.sde import SDE
from ldm.errors import UserError, nearest


@dataclass(frozen=True)
class Moment:
    """A time of the SDE, (1,), float64, and what holds there: the noise level, alpha and std."""

    t: Tensor
    sigma: float
    alpha: float
    std: float

    def score(self, y: Tensor, x0: Tensor) -> Tensor:
        """Return the score of y, of which x0 is the estimate."""
        return (x0 * self.alpha - y) / self.std**2


# (sde, y, score at y, here, next, noise) -> y at next
Predictor = Callable[[SDE, Tensor, Tensor, Moment, Moment, NoiseSource], Tensor]


def euler_maruyama_step(
    sde: SDE, y: Tensor, score: Tensor, here: Moment, there: Moment, noise: NoiseSource
) -> Tensor:
    """Step back along dy = [f - g^2 score] dt + g dw (eq. 6), to first order in t."""
    dt, diffusion = (here.t - there.t).item(), sde.diffusion(here.t).item()
    y = y - (y * _drift(sde, here.t) - score * diffusion**2) * dt
    return y + noise() * (diffusion * dt**0.5)


def reverse_diffusion_step(
    sde: SDE, y: Tensor, score: Tensor, here: Moment, there: Moment, noise: NoiseSource
) -> Tensor:
    """Step back as the forward chain y' = a y + G z went (eq. 45-46): y - (a - 1) y + G^2 score + G z."""
    a, variance = (each.item() for each in sde.discretized(here.t, there.t))
    return y * (2 - a) + score * variance + noise() * variance**0.5


def no_step(sde: SDE, y: Tensor, score: Tensor, here: Moment, there: Moment, noise: NoiseSource) -> Tensor:
    """Leave y as it is: what a corrector does alone."""
    return y


PREDICTORS: dict[str, Predictor] = {
    "euler_maruyama": euler_maruyama_step,
    "reverse_diffusion": reverse_diffusion_step,
    "none": no_step,
}


def euler_maruyama(
    x: Tensor, sigmas: Sequence[float], noise: NoiseSource, span: range | None = None, *, sde: SDE
) -> Steps:
    """Sample by Euler-Maruyama of the reverse-time SDE (eq. 6)."""
    return predictor_corrector(x, sigmas, noise, span, sde=sde, predictor="euler_maruyama", corrector_steps=0)


def predictor_corrector(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    *,
    sde: SDE,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    measured: bool = False,
) -> Steps:
    """Sample by predictor and corrector (algorithms 1 to 3): a step back, then Langevin steps where it ended.

    predictor: one of PREDICTORS. snr: r of the corrector (algorithms 4, 5; the paper's 0.16 is of VE on CIFAR-10);
    measured: how its steps are sized; for both see `corrector_step`. 0 corrector_steps leaves the predictor.
    """
    if predictor not in PREDICTORS:
        known = ", ".join(PREDICTORS)
        raise UserError(f"predictor {predictor!r} is unknown{nearest(predictor, PREDICTORS)}; known: {known}")
    for here, there in _moments(sde, sigmas, span):
        x0 = yield x, here.sigma
        if there.sigma == 0:
            return x0
        y = x * here.alpha
        y = PREDICTORS[predictor](sde, y, here.score(y, x0), here, there, noise)
        x = y / there.alpha
        for _ in range(corrector_steps):
            x0 = yield x, there.sigma
            x = corrector_step(x, x0, there, noise(), snr, sde, measured)
    return x


def corrector_step(
    x: Tensor, x0: Tensor, at: Moment, z: Tensor, snr: float, sde: SDE, measured: bool = False
) -> Tensor:
    """Take a Langevin step y + e score + sqrt(2 e) z, e = 2 k (snr |z| / |score|)^2 (algorithms 4, 5).

    k is 1 for VE, and 1 - beta_i otherwise, which is that of a step of 1/1000 of the way, as in the paper.
    |z| / |score| is taken for std, which it is where a denoiser can't tell noise from data; or, `measured`, it is the
    ratio of the batch's mean norms, as the authors and diffusers have it, by which an image depends on its neighbours.
    An image's own norms are no way out: its steps would be longest where its score happens to be short, and its
    variance too large.
    """
    score = at.score(x * at.alpha, x0)
    ratio = _norm(z) / _norm(score) if measured else at.std
    size = 2 * (snr * ratio) ** 2 * _shrink(sde, at.t)
    # As a share of the noise's variance, e is the same for x and for y = alpha x.
    return langevin_step(x, x0, at.sigma, size / at.std**2, z)


def _shrink(sde: SDE, t: Tensor) -> float:
    """alpha_i = 1 - beta_i of algorithm 5, with beta_i = beta(t) / 1000; 1 without a drift."""
    return 1 + 2 * _drift(sde, t) / 1000


def _drift(sde: SDE, t: Tensor) -> float:
    """The share of y that drifts away: f is linear in y, and a number keeps y's dtype."""
    return sde.drift(torch.ones_like(t), t).item()


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1).mean()


def _moments(sde: SDE, sigmas: Sequence[float], span: range | None) -> Iterator[tuple[Moment, Moment]]:
    """The steps of a span, each from a moment to the next; in float64 on the CPU."""
    sde, levels = sde.to("cpu"), torch.tensor(sigmas, dtype=torch.float64)
    moments = [
        Moment(t, sigma, sde.alpha(t).item(), sde.std(t).item())
        for t, sigma in zip(sde.time(levels).split(1), sigmas, strict=True)
    ]
    for i, _, _ in walk(sigmas, span):
        yield moments[i], moments[i + 1]
