"""A student that draws in few steps, taught by a model that takes many.

What is taught is a kind of `model`, and how, a kind of `method`: progressive distillation, consistency models, latent
consistency. All of it is written over denoisers, (x, sigma) to x0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition, concatenate
from ldm.conditioning.bound import BoundNetwork
from ldm.diffusion.denoiser import Denoise, Denoiser, Network, answered, awaited
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.training.bounds import refuse_outside
from ldm.training.data.arrays import DigitsConfig, ToysConfig
from ldm.training.data.on_disk import PicturesConfig
from ldm.training.distillation.consistency import ConsistencyDistillation, ConsistencyTraining
from ldm.training.distillation.latent_consistency import LatentConsistency
from ldm.training.distillation.lesson import Estimate, Lesson
from ldm.training.distillation.plain_model import PlainModel
from ldm.training.distillation.progressive import Progressive
from ldm.training.distillation.target import Pupil
from ldm.training.distillation.taught import Student
from ldm.training.distillation.text_model import TextToImageModel
from ldm.training.distributed import BatchGenerator

BROUGHT = (DigitsConfig, ToysConfig, PicturesConfig)  # the kinds of data that come with this objective


@dataclass(frozen=True)
class Config:
    """The settings.

    model: what is distilled, of a kind: plain (a model without text), or text_to_image.
    method: of a kind: progressive, latent_consistency, consistency_distillation, or consistency_training, which has no
        teacher.
    guidance: of the teacher. A number is put into the student for good, which is then drawn without; of two, each
        picture has a scale between them, which a student is told that has a `time_cond_proj_dim`. None is no guidance.
    steps: what validation draws the student in; the last is what the finished one is drawn in by default. A student of
        progressive distillation is drawn in those that it learned, and fewer.
    """

    model: PlainModel | TextToImageModel
    method: LatentConsistency | ConsistencyDistillation | ConsistencyTraining | Progressive = field(
        default_factory=LatentConsistency
    )
    guidance: float | tuple[float, float] | None = None
    steps: tuple[int, ...] = (1, 2, 4)

    def check(self) -> None:
        """Raises UserError for settings that do not go together."""
        self.model.check("distillation.model")
        self.method.check("distillation.method")
        if not self.steps or min(self.steps) < 1:
            raise UserError("distillation.steps: give one or more numbers of steps, each 1 or more")
        low, high = self.scales or (1.0, 1.0)
        refuse_outside("distillation", _Scales(low, high), ("guidance", "guidance_to"), 0)
        if high < low:
            raise UserError(f"distillation.guidance is {low} to {high}: give the lower scale first")
        self.rounds(Path())

    def rounds(self, output: Path) -> list[tuple[Path, "Config"]]:
        """Return the rounds of a run into `output`, each with its folder and a config of its own.

        The first puts guidance into its student; who is told the scale is told it in all of them. Raises UserError for
        a model that can't be taught in several.
        """
        self.method.check("distillation.method")
        methods = self.method.rounds()
        if len(methods) == 1:
            return [(output, self)]
        found, base, guidance = list[tuple[Path, Config]](), None, self.guidance
        for name, method in methods:
            folder, last = output / f"round-{name}", method is methods[-1][1]
            settings: Any = {
                "model": self.model.in_round("distillation.model", base, last),
                "method": method,
                "guidance": guidance,
                "steps": method.drawn_in(self.steps),
            }
            found.append((folder, replace(self, **settings)))
            base, guidance = folder / "export", guidance if isinstance(guidance, tuple) else None
        return found

    @property
    def scales(self) -> tuple[float, float] | None:
        """The least and the greatest scale of the teacher's guidance."""
        given = self.guidance
        return given if given is None or isinstance(given, tuple) else (given, given)


@dataclass(frozen=True)
class _Scales:
    guidance: float
    guidance_to: float


class Objective:
    """The method's loss between what the student says and what its teacher, or itself, says nearer to the picture."""

    watched = "loss"

    def __init__(self, config: Config):
        config.check()
        self.config, self.method = config, config.method
        self.taught = config.model.open("distillation.model")
        if self.taught.new and self.method.taught:
            raise UserError(
                f"distillation.method.kind {self.method.kind} has a teacher: give its folder as distillation.model.base"
            )
        if config.scales and not self.method.taught:
            raise UserError("distillation.guidance is of a teacher, and this method has none: leave it out")
        self.process = self.method.process(self.taught.process)
        self.steps = self.method.drawn_in(config.steps)
        for steps in self.steps:
            self.process.plan(steps)  # what can't be drawn is refused now
        self.pupil = Pupil(self.taught.student, self.method.averaging(0) is not None)
        self.model: nn.Module = self.pupil
        # Later rounds tell scales as the first does; a single one is in the weights by then.
        told = isinstance(config.guidance, tuple) if self.method.told_scales else config.scales is not None
        if "guidance" in self.taught.student_wants and not told:
            raise UserError(
                "distillation.guidance: the student is told it: give two scales, from least to greatest"
            )
        if config.scales and not self._told_scale and not self.taught.wants:
            raise UserError(
                "distillation.guidance: this model is told nothing, so there is nothing to guide by"
            )
        low, high = config.scales or (1.0, 1.0)
        if self.method.told_scales and low < high and "guidance" not in self.taught.student_wants:
            raise UserError(
                "distillation.guidance: this student is told no scale (its network has no time_cond_proj_dim), and "
                "would learn the mean of them: give one number"
            )

    @property
    def _told_scale(self) -> bool:
        return "guidance" in self.taught.wants

    def prepare(self, device: torch.device, batch_size: int) -> None:
        self.model.to(device)
        self.taught.prepare(device, batch_size)

    def helpers(self) -> Mapping[str, nn.Module]:
        teacher = {"teacher": self.taught.teacher} if self.method.taught else {}
        return {**teacher, **self.taught.helpers()}

    def batch(self, start: int, size: int, rows: slice) -> tuple[int, Any]:
        return start, self.taught.batch(start, size, rows)

    def loss(
        self, model: nn.Module, batch: tuple[int, Any], rng: BatchGenerator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen, pictures = batch
        decay = self.method.averaging(seen)
        if decay is not None:
            self.pupil.follow(decay, seen)
        x0 = self.taught.clean(pictures).float()
        told = self.taught.told(pictures, rng)
        scale = self._scale(rng, x0.device)
        own = self._with_scale(told, scale, self.taught.student_wants)

        def student_of(module: nn.Module) -> Estimate:
            network: Network = lambda x, timestep: self.taught.call(module, x, timestep, own)  # noqa: E731
            return estimated(self.method.around(_denoiser(network, self.process), self.process))

        lesson = Lesson(
            student_of(model),
            torch.no_grad()(student_of(self.pupil.target())),
            torch.no_grad()(self._teacher(told, scale)),
            self.process,
        )
        return self.taught.mean(pictures, self.method.losses(lesson, x0, rng, seen))

    def _scale(self, rng: BatchGenerator, device: torch.device) -> Tensor | None:
        """The guidance of each picture, (B,)."""
        if self.config.scales is None:
            return None
        low, high = self.config.scales
        return (low + (high - low) * rng.uniform()).to(device)

    def _with_scale(self, told: Condition, scale: Tensor | None, wants: Mapping[str, int]) -> Condition:
        if "guidance" not in wants:
            return told
        given = torch.ones(told.rows, device=told.text.device) if scale is None else scale
        return Condition.of({**told.parts(), "guidance": given})

    def _teacher(self, told: Condition, scale: Tensor | None) -> Estimate:
        """The teacher, guided by what it is told."""
        teacher, process = self.taught.teacher, self.taught.process
        guided = scale is not None and not self._told_scale
        told = self._with_scale(told, scale, self.taught.wants)
        both = concatenate([self.taught.without(told), told]) if guided else told
        denoiser = _denoiser(BoundNetwork(teacher, both.to(dtype=teacher.dtype)), process)
        return estimated(classifier_free(denoiser, scale) if guided and scale is not None else denoiser)

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Draw sheets in each number of steps."""
        assert isinstance(model, Pupil)
        self.taught.validate(self._student(model), self.steps, folder, seen)
        return {}

    @property
    def _drawn_scale(self) -> float:
        """What the student is drawn with: 1 where guidance is in its weights, the middle where it is told it."""
        if "guidance" not in self.taught.student_wants or self.config.scales is None:
            return 1.0
        return sum(self.config.scales) / 2

    def notes(self) -> list[str]:
        return self.taught.notes()

    def export(self, model: nn.Module, folder: Path, config: str) -> None:
        """Write the student: a model's folder, or a LoRA with what it is drawn with."""
        assert isinstance(model, Pupil)
        self.taught.export(self._student(model), self.steps[-1], folder, config)

    def _student(self, model: Pupil) -> Student:
        return Student(model.student, self.process, self._drawn_scale)


def estimated(denoise: Denoise) -> Estimate:
    """Return a denoiser as a function that calls its networks at once."""
    return lambda x, sigma: answered(awaited(denoise(x, sigma)))


def _denoiser(network: Network, process: Process) -> Denoiser:
    return Denoiser(network, process.schedule, process.prediction_type)
