"""Progressive distillation: a student's step learns to take several of its teacher's (Salimans & Ho 2022).

arXiv:2202.00512, algorithm 2; the formula is in `ldm.diffusion.progressive`. Rounds follow each other, in each of which
the student of the one before teaches. Guidance is put into the first student (Meng et al. 2023, arXiv:2210.03142).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor

from ldm.diffusion.losses import LossConfig, x0_weight
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.process import Discrete, Process
from ldm.diffusion.progressive import target
from ldm.diffusion.scheduler_config import CLASSES, SchedulerConfig
from ldm.diffusion.spacing import spaced_sigmas
from ldm.errors import UserError
from ldm.training.bounds import refuse_outside
from ldm.training.distillation.lesson import Lesson, Method
from ldm.training.distributed import BatchGenerator

# What would draw on other noise levels, or change the estimates; where a scheduler's class has such a key.
_PLAIN = {
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "final_sigmas_type": "zero",
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
}


@dataclass(frozen=True)
class Progressive(Method):
    """The student says, at the noise levels of its n steps, the x0 whose one step lands where its teacher's do.

    steps: of the student, falling, a round each.
    teacher_steps: how many steps of the first teacher are one of the student's. In later rounds it is as many as the
        round before learned: of [8, 4, 1] first two and then four.
    weighting: of the error of x0, see `losses.x0_weight`: max(SNR, 1), or SNR + 1.
    """

    kind: ClassVar[str] = "progressive"
    told_scales: ClassVar[bool] = True

    steps: tuple[int, ...] = (8, 4, 2, 1)
    teacher_steps: int = 2
    weighting: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr"

    def check(self, where: str) -> None:
        refuse_outside(where, self, ("teacher_steps",), 1)
        if not self.steps or min(self.steps) < 1:
            raise UserError(f"{where}.steps: give one or more numbers of steps, each 1 or more")
        for before, after in pairwise(self.steps):
            if before <= after or before % after:
                raise UserError(
                    f"{where}.steps: a round of {after} steps after one of {before}: one step has to take the place of "
                    "two or more, so divide from round to round"
                )

    def rounds(self) -> "Sequence[tuple[str, Progressive]]":
        taken = (self.teacher_steps, *(before // after for before, after in pairwise(self.steps)))
        return [
            (str(steps), replace(self, steps=(steps,), teacher_steps=fine))
            for steps, fine in zip(self.steps, taken, strict=True)
        ]

    def drawn_in(self, steps: tuple[int, ...]) -> tuple[int, ...]:
        last = self.steps[-1]
        return (*(each for each in steps if each < last), last)

    def process(self, teacher: Process) -> Process:
        """The teacher's noise, drawn with by DDIM on the noise levels that are learned.

        diffusers' DDIM steps back whole timesteps, T / n rounded down. Where that is not where the next step begins,
        it is Euler's method, the same line, that keeps to the levels.

        Raises UserError where the teacher has no discrete timesteps, or too few of them.
        """
        if not isinstance(teacher, Discrete):
            raise UserError(
                "progressive is of a model in discrete timesteps: for others take consistency_distillation"
            )
        (steps,), total = self.steps, teacher.schedule.num_train_timesteps
        if steps * self.teacher_steps > total:
            raise UserError(
                f"distillation.method: {steps} steps of {self.teacher_steps} of the teacher's are more than the "
                f"model's {total} timesteps"
            )
        config = teacher.scheduler.with_sampler("euler" if total % steps else "ddim")
        return Discrete(SchedulerConfig(config.class_name, {**config.values, **_known(config, _PLAIN)}))

    def losses(self, lesson: Lesson, x0: Tensor, rng: BatchGenerator, seen: int) -> Tensor:
        """See `Method`. Drawn in this order: the noise, the step."""
        (steps,), fine = self.steps, self.teacher_steps
        noise = rng.normal(*x0.shape[1:]).to(x0)
        step = rng.integers(steps)
        levels = self.levels(lesson.process)
        sigmas = [levels[step * fine + k].to(x0) for k in range(fine + 1)]
        x = x0 + per_image(sigmas[0], x0) * noise
        error = lesson.student(x, sigmas[0]) - target(lesson.teacher, x, sigmas)
        return x0_weight(sigmas[0], LossConfig(self.weighting)) * error.square().flatten(1).mean(1)

    def levels(self, process: Process) -> Tensor:
        """Return all noise levels of the teacher's steps, falling to 0; every `teacher_steps`-th is the student's."""
        assert isinstance(process, Discrete)
        (steps,), schedule = self.steps, process.schedule
        levels = spaced_sigmas(schedule, "trailing", steps * self.teacher_steps)
        # The same to the last bit, unless whole timesteps were rounded otherwise.
        levels[:: self.teacher_steps] = spaced_sigmas(schedule, "trailing", steps)
        return levels


def _known(config: SchedulerConfig, values: Mapping[str, object]) -> dict[str, object]:
    defaults = CLASSES[config.class_name].defaults
    return {key: value for key, value in values.items() if key in defaults}
