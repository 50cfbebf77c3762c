"""A model without text that is distilled: of pixels, points or latents, of classes or of none."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork
from ldm.system.plain import PlainSystem
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import Batch
from ldm.training.data.kinds import Data
from ldm.training.data.plain import PlainSource
from ldm.training.data.told import BlurredPicture, Labels, Nothing, SemanticMap, SmallPicture
from ldm.training.distillation.new_plain import NewPlain
from ldm.training.distillation.taught import Student, Taught
from ldm.training.distributed import BatchGenerator
from ldm.training.reconstruction import check_sides
from ldm.training.trainable.model import thaw

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PlainModel:
    """A model without text, as the objective `diffusion` trains it.

    base: its folder, or the network of a new one. data, condition, crop: see the settings of
        `ldm.training.objectives.diffusion`. Nothing is dropped here, whatever the dropout: a new model has no class of
        "nothing", and is drawn without guidance.
    pictures: how many validation draws.
    """

    kind: ClassVar[str] = "plain"

    base: str | NewPlain
    data: Data
    condition: Nothing | Labels | SemanticMap | SmallPicture | BlurredPicture = field(default_factory=Nothing)
    crop: int | None = None
    pictures: int = 60

    def check(self, where: str) -> None:
        """Raise UserError for settings that can't be."""
        refuse_outside(where, self, ("pictures", "crop"), 1)
        self.data.check(f"{where}.data")

    def in_round(self, where: str, base: Path | None, last: bool) -> "PlainModel":
        """Return the same for one of several rounds; see `TextToImageModel.in_round`."""
        return self if base is None else replace(self, base=str(base))

    def open(self, where: str) -> "TaughtPlain":
        """Load it. Raises UserError."""
        return TaughtPlain(self, where)


class TaughtPlain(Taught):
    """See `Taught`."""

    def __init__(self, config: PlainModel, where: str):
        self.config, base, data = config, config.base, config.data
        examples = data.examples(f"{where}.data", config.crop, config.pictures)
        config.condition.check(f"{where}.condition", examples)
        if isinstance(base, NewPlain):
            self.new, self.system = True, base.system(data, examples, config.condition, config.crop, where)
        elif Path(base).is_dir():
            self.system = PlainSystem.load(base)
        else:
            raise UserError(f"{where}.base: there is no folder {base}: give one of a trained model")
        autoencoder = self.system.autoencoder
        factor = 1 if autoencoder is None else autoencoder.config.factor
        check_sides(where, data, config.crop, examples.side, factor)
        self.source = PlainSource(examples, config.condition, autoencoder, config.crop)
        self.teacher = self.system.network
        self._check_fits(where)
        self.student: nn.Module = copy.deepcopy(self.teacher)
        thaw(self.student)

    def _check_fits(self, where: str) -> None:
        """Raise UserError where data are of other sides or conditions than the model's, or it learned its variance."""
        if self.system.network.config.out_channels != self.system.channels:
            raise UserError(
                f"{where}.base learned its variance, which no student of few steps has: take a teacher without"
            )
        batch, shape = self.source.examples.cuts(0, 1), self.system.shape
        found = tuple(self.source.clean(batch).shape[1:])
        if found != shape:
            raise UserError(
                f"{where}.data gives {found} of channels, height and width, and {where}.base is of {shape}"
            )
        self.told(batch, BatchGenerator(0, 1, slice(None))).require(self.system.wants, f"{where}.base")
        names = self.config.condition.names(self.source.examples)
        if names and names != self.system.labels:
            raise UserError(f"{where}.data has other classes than {where}.base")

    @property
    def process(self) -> Process:
        return self.system.process

    @property
    def wants(self) -> Mapping[str, int]:
        return self.system.wants

    def prepare(self, device: torch.device, batch_size: int) -> None:
        for each in (self.teacher, *self.helpers().values()):
            each.to(device)

    def helpers(self) -> Mapping[str, nn.Module]:
        return {} if self.system.autoencoder is None else {"vae": self.system.autoencoder}

    def batch(self, start: int, size: int, rows: slice) -> Batch:
        return self.source.examples.cuts(start, size, rows)

    def clean(self, batch: Batch) -> Tensor:
        return self.source.clean(batch.to(self.teacher.device))

    def told(self, batch: Batch, rng: BatchGenerator) -> Condition:
        return self.source.told(batch.to(self.teacher.device), self.system.shape[-1])

    def without(self, condition: Condition) -> Condition:
        return self.system.without(condition)

    def call(self, module: nn.Module, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return module(x, timestep, condition)

    def mean(self, batch: Batch, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.mean(), {}

    def _system(self, student: Student, steps: int) -> PlainSystem:
        assert isinstance(student.networks, DenoisingNetwork)
        options = {**self.system.options, "num_inference_steps": steps, "guidance_scale": student.scale}
        return replace(self.system, network=student.networks, process=student.process, options=options)

    def sheet(self, student: Student, steps: int) -> "Image":
        drawing = student.process.plan(steps)
        return self.source.drawn(self._system(student, steps), drawing, self.config.pictures, 1.0)

    def export(self, student: Student, steps: int, folder: Path, config: str) -> None:
        self._system(student, steps).save(folder)

    def notes(self) -> list[str]:
        return self.source.examples.notes()
