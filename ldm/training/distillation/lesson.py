"""What a method of distillation is, and what it is given: a teacher and a student as denoisers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import Process
from ldm.training.distributed import BatchGenerator

# (x (B, C, h, w), sigma (B,)) -> x0 (B, C, h, w), where x = x0 + sigma * noise: a `Denoise` that is run at once. The
# condition is bound.
Estimate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a loss is made of, for the pictures of one batch.

    student: it gives a gradient; call it once. target: the student without a gradient, or its average (see
    `Method.averaging`). teacher: frozen, and guided where that is asked for. process: the student's.
    """

    student: Estimate
    target: Estimate
    teacher: Estimate
    process: Process


class Method:
    """A way to distil; kinds are frozen dataclasses derived from this, with their settings, a file each.

    A new kind is a new file, and a line in the `method` of the objective.
    """

    kind: ClassVar[str]
    taught: ClassVar[bool] = True  # whether there is a teacher
    told_scales: ClassVar[bool] = False  # whether a student of many guidance scales has to be told which

    def check(self, where: str) -> None:
        """Raise UserError for settings that can't be. where: their path in the config."""

    def rounds(self) -> "Sequence[tuple[str, Method]]":
        """Return the methods of a run's rounds, each with its name: the student of one is the teacher of the next."""
        return [("", self)]

    def drawn_in(self, steps: tuple[int, ...]) -> tuple[int, ...]:
        """Return the numbers of steps that a round's student is drawn in; `steps`: those that the config names."""
        return steps

    def process(self, teacher: Process) -> Process:
        """Return what the student predicts, and is drawn with, in its few steps. Raises UserError."""
        raise NotImplementedError

    def around(self, denoise: Denoise, process: Process) -> Denoise:
        """Put around the student what its process's samplers do, such as a consistency model's boundary condition."""
        return denoise

    def averaging(self, seen: int) -> float | None:
        """Return the decay of the target's average for a step after `seen` pictures; None for the student itself."""
        return None

    def losses(self, lesson: Lesson, x0: Tensor, rng: BatchGenerator, seen: int) -> Tensor:
        """Return the loss of each clean picture of `x0` (B, C, h, w): (B,), float32. seen: pictures before the batch.

        The order in which random numbers are drawn is a part of every run.
        """
        raise NotImplementedError
