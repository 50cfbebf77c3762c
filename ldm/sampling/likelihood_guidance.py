"""Guidance of a request by a classifier of noisy pictures (Dhariwal & Nichol 2021), beside the text's.

classifier = Classifier.load("runs/lectures/classifier/export")
guide = ClassifierGuidance(classifier, ["fox", "rocket"], scale=3.0)
request = guided(prepare(system, plan, ["", ""], seeds, guidance=Guidance(1.0)), [guide])
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ldm.conditioning.classifier import Classifier
from ldm.diffusion.classifier_guidance import by_mean, by_score
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.plan import Plan
from ldm.errors import UserError


class Guide(Protocol):
    """What moves every estimate of a run, outside of the prompt's guidance and of the limits on x0."""

    def check(self, plan: Plan, shape: tuple[int, ...], rows: int) -> None:
        """Raise UserError where it can't guide `rows` pictures of this shape (C, h, w) of latents under this plan."""
        ...

    def around(self, denoise: Denoise, plan: Plan) -> Denoise:
        """Return the guided denoiser of a run."""
        ...


@dataclass(frozen=True)
class ClassifierGuidance:
    """A classifier and what each of B pictures is to be: names or numbers of its classes.

    scale: one number, or one a picture, (B,). form: "mean" shifts the mean of DDPM's steps (algorithm 1), "score" adds
    to the score (algorithm 2) for any sampler; None takes the first for the sampler ddpm and the second for others.
    interval: guide where low < sigma <= high only. At pure noise, of a schedule with zero terminal SNR, the form
    "score" never guides: sigma is in the thousands there, and so would be any error of the gradient.
    """

    classifier: Classifier
    labels: Sequence[str | int]
    scale: float | Tensor = 1.0
    form: Literal["mean", "score"] | None = None
    interval: tuple[float, float] = (0.0, math.inf)

    def check(self, plan: Plan, shape: tuple[int, ...], rows: int) -> None:
        """See `Guide`."""
        config = self.classifier.network.config
        wanted = (config.in_channels, config.sample_size, config.sample_size)
        if wanted[0] != shape[0]:
            raise UserError(
                f"the classifier sees {wanted[0]} channels, and this model's pictures have {shape[0]}: take "
                "one that was trained on this model's first stage"
            )
        if wanted != tuple(shape):
            raise UserError(
                f"the classifier sees {wanted[1]} x {wanted[2]} positions, and these pictures have {shape[1]} x "
                f"{shape[2]}: draw at the size that it was trained at"
            )
        if len(self.labels) != rows:
            raise UserError(f"{len(self.labels)} labels for {rows} pictures: give one for each")
        self.classifier.numbers(self.labels)
        scale = torch.as_tensor(self.scale)
        if scale.ndim > 1 or scale.numel() not in (1, rows) or not bool(scale.isfinite().all()):
            raise UserError(
                f"the classifier's scale is {self.scale!r:.60}: give a finite number, or one a picture"
            )
        if self.form == "mean" and plan.sampler != "ddpm":
            raise UserError(
                f"the classifier's form 'mean' is for the sampler ddpm, not {plan.sampler}: take 'score'"
            )

    def around(self, denoise: Denoise, plan: Plan) -> Denoise:
        """See `Guide`."""
        likelihood = self.classifier.log_likelihood(self.classifier.numbers(self.labels))
        if self.form == "mean" or (self.form is None and plan.sampler == "ddpm"):
            variance = plan.options["variance"]
            return by_mean(denoise, likelihood, plan.sigmas, self.scale, variance, self.interval)
        low, high = self.interval
        if plan.schedule.zero_terminal_snr:
            high = min(high, plan.schedule.sigma_max * (1 - 1e-3))
        return by_score(denoise, likelihood, self.scale, (low, high))
