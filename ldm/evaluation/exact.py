"""The exact likelihood of pictures under a model, by its probability-flow ODE, beside the variational bound."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.driver import Noise
from ldm.diffusion.likelihood import log_likelihood
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.sde import VP
from ldm.evaluation.likelihood import Likelihood, Settings, clean_rows, denoiser_of
from ldm.evaluation.subjects import Pictures, Subject


@dataclass(frozen=True)
class Exact:
    """-log p of N pictures, nats an element, under the model's least noise, where both are a density of the same.

    ode: (N,), by the probability-flow ODE, each at one draw of the noise. probes: (N,), its error by the estimate of
    the trace; NaN for a single probe. bound: (N,), see `Bound.noised`. evaluations: of the network, a picture.
    """

    ode: Tensor
    probes: Tensor
    bound: Tensor
    evaluations: int

    @property
    def over(self) -> Tensor:
        """By how much the bound is above the exact value, (N,): each picture's own spread is out of it."""
        return self.bound - self.ode


def measure_exact(
    subject: Subject,
    pictures: Pictures,
    settings: Settings,
    found: Likelihood,
    count: int,
    probes: int = 1,
    tolerance: float = 1e-4,
) -> Exact:
    """Return the exact likelihoods of the first `count` pictures, beside their bound in `found`.

    A picture's figure depends on the seed and its place, but for the tolerance. settings: as for `found`. tolerance: of
    the ODE's solver. Raises UserError where scipy is missing.
    """
    schedule, one = subject.schedule, replace(settings, draws=1)
    sde, ode, errors, evaluations, rows = VP.of(schedule), list[Tensor](), list[Tensor](), 0, settings.batch
    count = min(count, len(pictures))
    for start in range(0, count, rows):
        shown = pictures.read(start, min(rows, count - start))
        x0, seeds, _ = clean_rows(subject, shown, start, one)
        denoiser, _ = denoiser_of(subject, shown, replace(one, batch=len(seeds)), "fixed_small", len(seeds))
        noise = Noise(seeds, (x0.shape[1], x0.shape[2], x0.shape[3]), x0.device)()
        noised = x0 + per_image(torch.full((len(x0),), sde.sigma_min).to(x0), x0) * noise
        # Of a stream of their own, which is the picture's: its figure must not know of the batch.
        generators = [torch.Generator().manual_seed(seed + 2**41) for seed in seeds]
        exact = log_likelihood(
            denoiser, noised, sde, probes, generator=generators, rtol=tolerance, atol=tolerance
        )
        ode.append(exact.nats_per_dim)
        errors.append(exact.error / exact.dims)
        evaluations = max(evaluations, exact.evaluations)
    bound = found.pictures(found.bound.noised(found.chain.sigma_min)).mean(1)[:count]
    return Exact(torch.cat(ode), torch.cat(errors), bound, evaluations)
