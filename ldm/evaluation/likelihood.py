"""How likely pictures are under a model: the variational bound of its U-Net, and its first stage's own.

A model of latents gives a bound on the density of latents, in nats a latent element: a density has no greatest value,
so the figure may be negative, and only figures over the same latents can be compared. Its first stage gives a bound on
the density of pixels (the ELBO of Kingma & Welling 2013, eq. 3), and both together one of the whole (Vahdat et al.
2021, eq. 3).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ldm.condition import concatenate
from ldm.diffusion.bound import Bound, variational_bound
from ldm.diffusion.decoder import Decoder
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.driver import Noise
from ldm.diffusion.guidance import limited
from ldm.diffusion.samplers import Variance
from ldm.diffusion.schedule import MOST_TIMESTEPS, NoiseSchedule
from ldm.errors import UserError
from ldm.evaluation.subjects import Pictures, Shown, Subject
from ldm.models import large
from ldm.models.autoencoder import AutoencoderKL

Observation = Literal["gaussian", "laplace"]
PIXEL_LEVEL = math.log(
    127.5
)  # a density over [-1, 1] as the probability of one of 256 levels: nats an element more

_MOST_DRAWS, _MOST_ROWS = 10_000, 1_000_000
_MOST_SEED = 2**62  # pictures count on from it, and so do other streams


@dataclass(frozen=True)
class Settings:
    """How a bound is measured.

    variance: of the model's steps; None is what its scheduler says, fixed_small where that says nothing.
    steps: of the model's chain; None is all that it was trained on. evaluations: see `variational_bound`.
    draws: how often each picture is put under new noise. batch: rows a call of the network takes, but never fewer than
        a picture's draws.
    levels: of a pixel, whose probability L_0 of a model of pixels is; None for a density. Latents have none.
    clip: estimates of x0 are limited to [-1, 1] where pixels have levels, as guided-diffusion counts: under much noise
        a network that predicts the noise may say anything of x0.
    sample_posterior: the latents are drawn from the first stage's posterior, as the bound of the whole has them; else
        they are its mean.
    observation: the noise of pixels around a decoding. scale: its standard deviation, or the Laplace's own scale, of
        pixels in [-1, 1]; None is the likeliest for these pictures, one number for all of them.
    """

    variance: Variance | None = None
    steps: int | None = None
    evaluations: int | None = None
    draws: int = 1
    batch: int = 16
    seed: int = 0
    levels: int | None = 256
    clip: bool = True
    sample_posterior: bool = False
    observation: Observation = "gaussian"
    scale: float | None = None

    def check(self) -> None:
        """Raise UserError for numbers out of range."""
        for name, least, most in (
            ("evaluations", 2, MOST_TIMESTEPS),
            ("draws", 1, _MOST_DRAWS),
            ("batch", 1, _MOST_ROWS),
            ("seed", -_MOST_SEED, _MOST_SEED),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(f"{name} is {value!s:.40}: give it {least:,} to {most:,}")
        if self.levels is not None and self.levels < 2:
            raise UserError(f"levels is {self.levels}: a pixel has 2 or more, 256 where it has 8 bits")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UserError(
                f"scale is {self.scale}: the observation's scale is above 0, in pixels of [-1, 1]"
            )


@dataclass(frozen=True)
class FirstStage:
    """A first stage's bound on N pictures, each under its posterior once, in nats a picture.

    distance: (N,), the sum over pixels of the squared (gaussian) or absolute (laplace) errors of the decoding.
    kl: (N,), of the posterior from N(0, I). entropy: (N,), of the posterior, in the coordinates that the U-Net sees.
    elements: numbers in a picture.
    """

    distance: Tensor
    kl: Tensor
    entropy: Tensor
    elements: int
    observation: Observation
    given: float | None = None

    @property
    def scale(self) -> float:
        """The observation's scale: the one that was given, or the likeliest for these pictures."""
        mean = self.distance.mean().item() / self.elements
        return self.given or (math.sqrt(mean) if self.observation == "gaussian" else mean)

    @property
    def reconstruction(self) -> Tensor:
        """-log p(pixels | latent), (N,), a density over pixels in [-1, 1]."""
        scale = self.scale
        if self.observation == "gaussian":
            return self.distance / (2 * scale**2) + self.elements * math.log(scale * math.sqrt(2 * math.pi))
        return self.distance / scale + self.elements * math.log(2 * scale)


@dataclass(frozen=True)
class Likelihood:
    """What was measured over N pictures: of each `settings.draws` rows, picture by picture, in the bound.

    elements: numbers in what is denoised. first_stage: None for a model of pixels.
    """

    bound: Bound
    elements: int
    chain: NoiseSchedule
    variance: Variance
    settings: Settings
    first_stage: FirstStage | None

    def pictures(self, rows: Tensor) -> Tensor:
        """Return a figure of rows as (N, draws)."""
        return rows.view(-1, self.settings.draws)


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures, and its standard errors: by what pictures were taken, noise included, and by noise alone.

    A single draw of noise a picture can't tell its part: noise is None. One picture has no error either.
    """

    mean: float
    error: float | None
    noise: float | None

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """values: (N, draws)."""
        count, draws = values.shape
        error = values.mean(1).std().item() / math.sqrt(count) if count > 1 else None
        noise = math.sqrt(values.var(1).mean().item() / (count * draws)) if draws > 1 else None
        return cls(values.mean().item(), error, noise)


@torch.no_grad()
def measure(subject: Subject, pictures: Pictures, settings: Settings) -> Likelihood:
    """Return the bounds of pictures under a model.

    A row's figure depends on the seed and its place among the pictures, not on the batch. Raises UserError for settings
    that can't be, pictures that the model is not of, and a network that did not learn the variance asked for.
    """
    from tqdm import tqdm

    settings.check()
    schedule, draws = subject.schedule, settings.draws
    variance = settings.variance or _variance(subject.variance_type)
    chain = schedule if settings.steps is None else schedule.respaced(settings.steps)
    rows = max(settings.batch // draws, 1)
    bounds, stages, elements = list[Bound](), list[FirstStage](), 0
    with tqdm(total=len(pictures), unit="pic", desc="bound", disable=None, dynamic_ncols=True) as bar:
        for start in range(0, len(pictures), rows):
            shown = pictures.read(start, rows)
            x0, seeds, stage = clean_rows(subject, shown, start, settings)
            stages += [] if stage is None else [stage]
            denoiser, together = denoiser_of(subject, shown, settings, variance, len(seeds))
            noise = Noise(seeds, (x0.shape[1], x0.shape[2], x0.shape[3]), x0.device)
            density = stage is not None or settings.levels is None
            decoder: Decoder = "gaussian" if density else "discretized"
            denoise: Denoise = denoiser
            if settings.clip and not density:
                denoise = limited(denoiser, lambda estimate: estimate.clamp(-1, 1))
            arguments = settings.evaluations, together, settings.levels or 256
            bounds.append(variational_bound(denoise, x0, chain, noise, variance, decoder, *arguments))
            elements = x0[0].numel()
            bar.update(len(shown.pictures))
    first_stage = _joined(stages) if stages else None
    return Likelihood(Bound.joined(bounds), elements, chain, variance, settings, first_stage)


def _variance(named: str | None) -> Variance:
    return named if named in ("fixed_large", "learned_range") else "fixed_small"  # pyright: ignore[reportReturnType]


def clean_rows(
    subject: Subject, shown: Shown, start: int, settings: Settings
) -> tuple[Tensor, list[int], FirstStage | None]:
    """Return what is denoised of pictures, `settings.draws` rows of each, the rows' seeds, and the first stage's bound.

    start: the number of the first among all pictures. Raises UserError where they have other channels than the model.
    """
    channels, draws = shown.pictures.shape[1], settings.draws
    if channels != subject.channels:
        raise UserError(
            f"the model is of pictures with {subject.channels} channels, and these have {channels}"
        )
    clean = shown.pictures.to(subject.device)
    seeds = [settings.seed + start * draws + k for k in range(len(clean) * draws)]
    if subject.autoencoder is None:
        return clean.repeat_interleave(draws, 0), seeds, None
    stage, latents = _first_stage(subject.autoencoder, clean, seeds, settings)
    return latents, seeds, stage


def denoiser_of(
    subject: Subject, shown: Shown, settings: Settings, variance: Variance, rows: int
) -> tuple[Denoiser, int]:
    """Return the network under what it is told of the pictures, and how many timesteps a call of it takes."""
    together = max(settings.batch // rows, 1)
    told = subject.condition(shown).map(lambda part: part.repeat_interleave(settings.draws, 0))
    network = subject.bind(concatenate([told] * together))
    learned = variance == "learned_range"
    return Denoiser(network, subject.schedule, subject.prediction_type, "none", learned), together


def _first_stage(
    autoencoder: AutoencoderKL, clean: Tensor, seeds: list[int], settings: Settings
) -> tuple[FirstStage, Tensor]:
    """The first stage's bound of pictures (B, 3, H, W) in [-1, 1], and latents for each seed as the U-Net sees them."""
    dtype = next(autoencoder.parameters()).dtype
    found = large.encode(autoencoder, clean.to(dtype))
    posterior = replace(found, mean=found.mean.float(), logvar=found.logvar.float())
    shape, draws = posterior.mean.shape[1:], len(seeds) // len(clean)
    # Of a stream of its own: the bound's noise must not be that of the latents.
    noise = Noise([seed + 2**40 for seed in seeds], (shape[0], shape[1], shape[2]), clean.device)()
    drawn = replace(
        posterior,
        mean=posterior.mean.repeat_interleave(draws, 0),
        logvar=posterior.logvar.repeat_interleave(draws, 0),
    )
    sampled = drawn.sample(noise)
    decoded = large.decode(autoencoder, sampled[::draws].to(dtype)).float()
    error = (decoded - clean).double()
    distance = (error.square() if settings.observation == "gaussian" else error.abs()).flatten(1).sum(1)
    unit = autoencoder.scale(torch.ones_like(posterior.mean)) - autoencoder.scale(
        torch.zeros_like(posterior.mean)
    )
    entropy = 0.5 * (1 + math.log(2 * math.pi) + posterior.logvar.double()) + unit.double().abs().log()
    stage = FirstStage(
        distance.cpu(),
        posterior.kl().double().cpu(),
        entropy.flatten(1).sum(1).cpu(),
        clean[0].numel(),
        settings.observation,
        settings.scale,
    )
    return stage, autoencoder.scale(sampled if settings.sample_posterior else drawn.mean)


def _joined(stages: list[FirstStage]) -> FirstStage:
    names = ("distance", "kl", "entropy")
    return replace(stages[0], **{name: torch.cat([getattr(each, name) for each in stages]) for name in names})
