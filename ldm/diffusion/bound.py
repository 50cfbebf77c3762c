"""The variational bound of a denoising model's negative log-likelihood (Ho et al. 2020, eq. 5), term by term, in nats.

    -log p(x0) <= L_T + L_{T-1} + ... + L_1 + L_0
    L_T      KL(q(x_T | x0) || N(0, I))                       the prior's term, which nothing trained is in
    L_{t-1}  KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))     a Gaussian against a Gaussian
    L_0      -log p(x0 | x_1)                                 the decoder's term

The paper counts t from 1, the code from 0: its timestep is t - 1. Every figure is nats an element of x0; in bits it is
that divided by `LN2`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.decoder import Decoder, log_likelihood
from ldm.diffusion.denoiser import Denoise, answered, awaited
from ldm.diffusion.driver import Noise
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.samplers import Variance
from ldm.diffusion.schedule import NoiseSchedule, Schedule
from ldm.errors import UserError

LN2 = math.log(2)


def of_betas(schedule: Schedule) -> NoiseSchedule:
    """Return a schedule that has steps, for whoever needs them. Raises UserError for one of continuous time."""
    if not isinstance(schedule, NoiseSchedule):
        raise UserError(
            "a variational bound, and a variance that is learned by it, are of a process in steps: take kind: ddpm"
        )
    return schedule


@dataclass(frozen=True)
class Posterior:
    """q(x_{t-1} | x_t, x0) of Ho et al. 2020, eq. 6-7, at timesteps (B,), in coordinates of unit variance.

    x0_scale: what an error of x0 is multiplied by in the mean. log_variance, log_beta: of the posterior, and of the
    forward step, the bounds between which a variance is learned. The first timestep's variance is 0: it takes the
    second's (Nichol & Dhariwal 2021, sec. 3.1). log_large: log_beta, but at the first timestep too the posterior's
    second, which Ho et al. (2020) found better for L_0.
    """

    x0_scale: Tensor
    log_variance: Tensor
    log_beta: Tensor
    log_large: Tensor

    @classmethod
    def at(cls, timestep: Tensor, schedule: NoiseSchedule) -> "Posterior":
        """Return the posterior at timesteps (B,), integers."""
        here = schedule.alphas_cumprod
        before = torch.cat([torch.ones_like(here[:1]), here[:-1]])
        beta = 1 - here / before
        variance = beta * (1 - before) / (1 - here)
        variance = torch.cat([variance[1:2], variance[1:]])
        large = torch.cat([variance[:1], beta[1:]])
        tables = (before.sqrt() * beta / (1 - here), variance.log(), beta.log(), large.log())
        return cls(*(table[timestep.long()] for table in tables))

    def learned_log_variance(self, fraction: Tensor) -> Tensor:
        """Return what `fraction` (B, ...), in [-1, 1], names between the bounds (Nichol & Dhariwal 2021, eq. 15)."""
        low, high = (
            per_image(each.to(fraction.dtype), fraction) for each in (self.log_variance, self.log_beta)
        )
        return low + (high - low) * (fraction + 1) / 2

    def model_log_variance(self, variance: Variance, fraction: Tensor | None, like: Tensor) -> Tensor:
        """Return the log-variance of the model's step, to broadcast over `like` (B, ...): see `samplers.ddpm`.

        Raises UserError where the variance is the network's and `fraction`, what it says of it, is None.
        """
        if variance != "learned_range":
            chosen = self.log_large if variance == "fixed_large" else self.log_variance
            return per_image(chosen.to(like.dtype), like)
        if fraction is None:
            raise UserError(
                "the network did not learn a variance (it gives as many channels as it takes): take the variance "
                "fixed_small or fixed_large"
            )
        return self.learned_log_variance(fraction)


def bound_terms(
    found: Tensor,
    x0: Tensor,
    timestep: Tensor,
    schedule: NoiseSchedule,
    variance: Variance = "fixed_small",
    fraction: Tensor | None = None,
    decoder: Decoder = "gaussian",
    levels: int = 256,
) -> Tensor:
    """Return L_{t-1}, or L_0 where the timestep is 0, nats an element, (B,).

    found: the network's estimate of x0, which is (B, ...). timestep: (B,), integers. fraction: what the network says of
    a learned variance, shaped like x0; see `Posterior.learned_log_variance`. levels: see `Decoder`. Raises UserError.
    """
    posterior = Posterior.at(timestep, schedule.to(found.device))
    x0_scale, low = (
        per_image(each.to(x0.dtype), x0) for each in (posterior.x0_scale, posterior.log_variance)
    )
    log_variance = posterior.model_log_variance(variance, fraction, x0)
    error = x0_scale * (found - x0)  # of the mean
    divergence = gaussian_kl(error, low, log_variance)
    # At timestep 0 the posterior's mean is x0 itself, and the model's is its estimate.
    likelihood = log_likelihood(x0, found, log_variance, decoder, levels)
    return torch.where(per_image(timestep == 0, x0), -likelihood, divergence).flatten(1).mean(1)


def prior_term(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return L_T of x0 (B, ...), nats an element, (B,): how far the last noise is from pure noise."""
    alpha_bar = schedule.alphas_cumprod[-1].to(x0)
    return (
        gaussian_kl(alpha_bar.sqrt() * x0, torch.log1p(-alpha_bar), torch.zeros_like(alpha_bar))
        .flatten(1)
        .mean(1)
    )


def gaussian_kl(difference: Tensor, log_variance: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(a, exp log_variance) || N(b, exp other_log_variance)), nats, where difference = a - b."""
    apart = log_variance - other_log_variance
    return 0.5 * (difference.square() * (-other_log_variance).exp() + apart.exp() - 1 - apart)


@dataclass(frozen=True)
class Bound:
    """The terms of N rows, each a picture under noise of its own: nats an element, of all figures here.

    prior: (N,), L_T. terms: (N, K); the first is L_0. timesteps: (N, K) of the terms, counted from 0. counts: (K,), the
    number of timesteps from which each was drawn, and that it stands for. x0_mse, eps_mse: (N, K), squared errors of
    the network's x0 and of its noise there, a mean over elements.
    """

    prior: Tensor
    terms: Tensor
    timesteps: Tensor
    counts: Tensor
    x0_mse: Tensor
    eps_mse: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Bound"]) -> "Bound":
        """Return the rows of several bounds over the same timesteps as one."""
        names = ("prior", "terms", "timesteps", "x0_mse", "eps_mse")
        rows = {name: torch.cat([getattr(each, name) for each in parts]) for name in names}
        return cls(counts=parts[0].counts, **rows)

    @property
    def decoder(self) -> Tensor:
        """L_0, (N,)."""
        return self.terms[:, 0]

    @property
    def steps(self) -> Tensor:
        """The sum of L_1 to L_{T-1}, (N,); without bias where it was estimated from some of them."""
        return (self.terms * self.counts)[:, 1:].sum(1)

    @property
    def total(self) -> Tensor:
        """The bound, (N,)."""
        return self.prior + self.steps + self.decoder

    def noised(self, sigma_min: float) -> Tensor:
        """Return the bound on the mean -log p(x0 + sigma_min * noise) instead, (N,): a density, without L_0.

        sigma_min: the chain's least noise level. All terms but L_0 bound KL(q(x_1 | x0) || p(x_1)) (the chain rule of
        divergences), which this is but for the noise's entropy. Exact likelihoods are of the same density.
        """
        return self.prior + self.steps + 0.5 * math.log(2 * math.pi * math.e * sigma_min**2)


@torch.no_grad()
def variational_bound(
    denoise: Denoise,
    x0: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    variance: Variance = "fixed_small",
    decoder: Decoder = "gaussian",
    evaluations: int | None = None,
    together: int = 1,
    levels: int = 256,
) -> Bound:
    """Return the bound of x0 (B, C, h, w); the result is float64, on the CPU.

    denoise: see `ldm.diffusion.denoiser`; under `guidance.limited` it counts as guided-diffusion does with
        clip_denoised. For learned_range it hands on C more channels.
    schedule: the steps of the model's chain; a part of those it was trained on where it draws in fewer, see
        `NoiseSchedule.respaced`.
    noise: of B rows; one draw a term, from which the same row gets the same bound in any batch.
    evaluations: how many terms are asked for at most, 2 or more; None is all. L_0 always is. The others are of one
        timestep drawn from each of so many ranges, for each row by itself: their sum is right on average, and the rows'
        spread tells its error. The ranges grow in proportion to the timestep, as the terms fall about with its inverse.
    together: how many timesteps a call of the network takes, B rows each: timestep by timestep in the batch.
    decoder, levels: see `Decoder`. Raises UserError where a learned variance is asked for and there is none.
    """
    steps, shape = schedule.num_train_timesteps, x0.shape[1:]
    first = torch.arange(steps)
    if evaluations is not None and evaluations < steps:
        edges = torch.logspace(0, math.log10(steps), evaluations, dtype=torch.float64)[:-1]
        first = torch.cat([torch.zeros(1), edges.floor()]).unique().long()
    counts = torch.diff(first, append=torch.tensor([steps]))
    share = torch.stack(
        [torch.rand(len(first), generator=each, device=each.device) for each in noise.generators]
    )
    timesteps = first + (share.double().cpu() * counts).long()
    found = list[Tensor]()
    for some in range(0, len(first), together):
        timestep = timesteps[:, some : some + together].T.to(x0.device)
        drawn = torch.stack([noise() for _ in timestep]).flatten(0, 1)
        clean = x0.expand(len(timestep), *x0.shape).flatten(0, 1)
        level = schedule.to(x0.device).sigma(timestep.flatten())
        sigma = level.to(x0.dtype)
        estimate = answered(awaited(denoise(clean + per_image(sigma, clean) * drawn, sigma)))
        x0_found, fraction = estimate[:, : shape[0]], estimate[:, shape[0] :]
        learned = fraction if fraction.shape[1] else None
        terms = bound_terms(x0_found, clean, timestep.flatten(), schedule, variance, learned, decoder, levels)
        x0_mse = (x0_found - clean).square().flatten(1).mean(1)
        terms, x0_mse, level = (each.cpu().double() for each in (terms, x0_mse, level))
        found.append(torch.stack([terms, x0_mse, x0_mse / level**2]).view(3, len(timestep), len(x0)))
    terms, x0_mse, eps_mse = torch.cat(found, dim=1).mT
    return Bound(prior_term(x0.cpu().double(), schedule.to("cpu")), terms, timesteps, counts, x0_mse, eps_mse)
