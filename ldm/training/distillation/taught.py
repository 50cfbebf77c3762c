"""What distillation asks of a model that it teaches: its networks, its data, and how it is drawn and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.process import Process
from ldm.files import write_bytes
from ldm.models.denoising import DenoisingNetwork
from ldm.pictures import png
from ldm.training.distributed import BatchGenerator

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Student:
    """A student to be drawn with: its networks, its process, and its guidance scale, 1 where it is told none."""

    networks: nn.Module
    process: Process
    scale: float


class Taught:
    """A teacher and its student, with what both learn from. A kind of `model` opens one.

    student: what is trained; its parameters that require a gradient. teacher: frozen; it shares no weight that changes.
    new: there is no teacher, and what stands in its place learned nothing.
    """

    student: nn.Module
    teacher: DenoisingNetwork
    new: bool = False

    @property
    def process(self) -> Process:
        """The teacher's."""
        raise NotImplementedError

    @property
    def wants(self) -> Mapping[str, int]:
        """The parts of the teacher's condition."""
        raise NotImplementedError

    @property
    def student_wants(self) -> Mapping[str, int]:
        """The parts of the student's condition."""
        return self.wants

    def prepare(self, device: torch.device, batch_size: int) -> None:
        """Do what `Objective.prepare` says, for all but the student."""
        raise NotImplementedError

    def helpers(self) -> Mapping[str, nn.Module]:
        """Return the frozen networks beside teacher and student."""
        raise NotImplementedError

    def batch(self, start: int, size: int, rows: slice) -> Any:
        """See `Objective.batch`."""
        raise NotImplementedError

    def clean(self, batch: Any) -> Tensor:
        """Return what is denoised, (B, C, h, w), where the teacher computes."""
        raise NotImplementedError

    def told(self, batch: Any, rng: BatchGenerator) -> Condition:
        """Return what the networks are told of each picture, where the teacher computes."""
        raise NotImplementedError

    def without(self, condition: Condition) -> Condition:
        """Return what they are told of nothing, for guidance. Raises UserError where they never learned that."""
        raise NotImplementedError

    def call(self, module: nn.Module, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Call the student, or what accelerate made of it, or its average."""
        raise NotImplementedError

    def mean(self, batch: Any, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of rows (B,) as one, and parts of it by name."""
        raise NotImplementedError

    def sheet(self, student: Student, steps: int) -> "Image | None":
        """Draw what validation shows, in so many steps; None where nothing is to be shown."""
        raise NotImplementedError

    def validate(self, student: Student, steps: Sequence[int], folder: Path, seen: int) -> None:
        """Draw a sheet in each number of steps, into `folder`."""
        for count in steps:
            if (drawn := self.sheet(student, count)) is not None:
                write_bytes(folder / f"drawn-{seen:08d}-{count}-steps.png", png(drawn))

    def export(self, student: Student, steps: int, folder: Path, config: str) -> None:
        """Write the student as others read it, to be drawn in so many steps."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """See `Objective.notes`."""
        return []
