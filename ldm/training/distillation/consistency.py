"""Consistency models of a teacher or of data alone (Song et al. 2023, arXiv:2303.01469; the improved: 2310.14189).

The formulas are in `ldm.diffusion.consistency`. A student maps a picture's noisy forms at two neighbouring noise levels
to the same: in distillation the lower is where the teacher's ODE leads from the higher, in training the same noise put
on less.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.diffusion import consistency
from ldm.diffusion.consistency import Curriculum, Fixed
from ldm.diffusion.edm import EDM
from ldm.diffusion.edm_processes import ConsistencyConfig, EDMConfig
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.training.bounds import refuse_outside
from ldm.training.distillation.lesson import Lesson, Method
from ldm.training.distributed import BatchGenerator

Drawn = Literal["uniform", "lognormal"]
Weighting = Literal["unit", "step"]
Metric = Literal["l2", "huber"]


@dataclass(frozen=True)
class ConsistencyDistillation(Method):
    """Of a teacher on EDM's noise levels (Song et al. 2023, algorithm 2).

    levels: how many noise levels, and the target's decay, of a kind: fixed, growing or doubling.
    solver: of the step on the teacher's ODE. metric: between the two ends; huber has `huber_c`, None the paper's
        0.00054 sqrt(d). drawn: how often a step is taken, see `lognormal_weights`. weighting: "step" is 1 over its
        length.
    sigma_max: where drawing begins; the teacher knows it. clip_denoised: draw within [-1, 1]: pixels, not latents or
        points.
    """

    kind: ClassVar[str] = "consistency_distillation"

    levels: Curriculum = field(default_factory=Fixed)
    solver: Literal["heun", "euler"] = "heun"
    metric: Metric = "huber"
    huber_c: float | None = None
    drawn: Drawn = "uniform"
    weighting: Weighting = "unit"
    sigma_max: float = 80.0
    clip_denoised: bool = True

    def check(self, where: str) -> None:
        _check(self, where)

    def process(self, teacher: Process) -> Process:
        """A consistency model's, told as the teacher is. Raises UserError for a teacher of other noise levels."""
        made = _process(self, teacher)
        known = teacher.schedule
        if not (known.sigma_min <= made.sigma_min * 1.01 and known.sigma_max >= made.sigma_max * 0.99):
            raise UserError(
                f"distillation.method: the teacher knows noise levels from {known.sigma_min:.4g} to "
                f"{known.sigma_max:.4g}, and the student's are {made.sigma_min} to {made.sigma_max}: train a teacher "
                "with process.kind edm, or take a lower sigma_max"
            )
        return made

    def averaging(self, seen: int) -> float | None:
        return self.levels.target_decay(seen) or None

    def losses(self, lesson: Lesson, x0: Tensor, rng: BatchGenerator, seen: int) -> Tensor:
        """See `Method`. Drawn in this order: the noise, the step."""
        noise = rng.normal(*x0.shape[1:]).to(x0)
        low, high = _step(self, lesson, rng, seen, x0)
        x = x0 + per_image(high, x0) * noise
        x_low = consistency.solver_step(lesson.teacher, x, high, low, self.solver == "heun")
        return _distance(self, lesson.student(x, high), lesson.target(x_low, low), low, high)


@dataclass(frozen=True)
class ConsistencyTraining(Method):
    """Of data alone: no teacher (Song et al. 2023, algorithm 3), by default as improved (Song & Dhariwal 2023).

    The settings are those of ConsistencyDistillation.
    """

    kind: ClassVar[str] = "consistency_training"
    taught: ClassVar[bool] = False

    levels: Curriculum
    metric: Metric = "huber"
    huber_c: float | None = None
    drawn: Drawn = "lognormal"
    weighting: Weighting = "step"
    sigma_max: float = 80.0
    clip_denoised: bool = True

    def check(self, where: str) -> None:
        _check(self, where)

    def process(self, teacher: Process) -> Process:
        """A consistency model's, told as the model is that it begins from. Raises UserError."""
        return _process(self, teacher)

    def averaging(self, seen: int) -> float | None:
        return self.levels.target_decay(seen) or None

    def losses(self, lesson: Lesson, x0: Tensor, rng: BatchGenerator, seen: int) -> Tensor:
        """See `Method`. Drawn in this order: the noise, the step."""
        noise = rng.normal(*x0.shape[1:]).to(x0)
        low, high = _step(self, lesson, rng, seen, x0)
        x_low, x = consistency.noised_pair(x0, noise, low, high)
        return _distance(self, lesson.student(x, high), lesson.target(x_low, low), low, high)


_Either = ConsistencyDistillation | ConsistencyTraining


def _check(method: _Either, where: str) -> None:
    method.levels.check(f"{where}.levels")
    refuse_outside(where, method, ("huber_c",), *consistency.HUBER_C)
    refuse_outside(where, method, ("sigma_max",), 0.01)


def _process(method: _Either, start: Process) -> ConsistencyConfig:
    scale = (
        {"timestep_scale": start.timestep_scale} if isinstance(start, EDMConfig | ConsistencyConfig) else {}
    )
    made = ConsistencyConfig(
        num_train_timesteps=method.levels.last,
        sigma_max=method.sigma_max,
        clip_denoised=method.clip_denoised,
        **scale,
    )
    made.process()
    return made


def _step(
    method: _Either, lesson: Lesson, rng: BatchGenerator, seen: int, x0: Tensor
) -> tuple[Tensor, Tensor]:
    """The levels below and above, (B,), of a step drawn for each picture."""
    known = lesson.process.schedule
    assert isinstance(known, EDM)
    sigmas = consistency.levels(method.levels.count(seen), known.low, known.high, known.rho)
    if method.drawn == "lognormal":
        weights = consistency.lognormal_weights(sigmas)
    else:
        weights = torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1), dtype=torch.float64)
    step = consistency.chosen(rng.uniform(), weights)
    return sigmas[step].to(x0), sigmas[step + 1].to(x0)


def _distance(method: _Either, student: Tensor, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if method.metric == "huber":
        losses = consistency.pseudo_huber(student, target, method.huber_c)
    else:
        losses = consistency.squared_l2(student, target)
    return losses * consistency.step_weight(low, high) if method.weighting == "step" else losses
