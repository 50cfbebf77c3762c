"""A text-to-image model that is distilled: its whole U-Net, or a LoRA beside it (LCM-LoRA, Luo et al. 2023)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.checkpoints.hub import resolve
from ldm.condition import Condition
from ldm.diffusion.process import Discrete, Process
from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork
from ldm.system import System
from ldm.system.few_steps import refuse_form, write_few_steps
from ldm.training.bounds import refuse_outside
from ldm.training.data.conditions import Conditions
from ldm.training.data.kinds import Data
from ldm.training.data.latents import LatentBatch
from ldm.training.distillation.taught import Student, Taught
from ldm.training.distributed import BatchGenerator
from ldm.training.drawing import ValidationConfig
from ldm.training.start import BUNDLED, check_channels, starting_system
from ldm.training.trainable.lora import TrainLoRA
from ldm.training.trainable.model import TrainableModel
from ldm.training.trainable.unet import TrainUNet

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TextToImageModel:
    """A text-to-image model, and what its student is.

    base, variant, data, caption_windows: see the settings of `ldm.training.objectives.text_to_image`.
    train: of a kind: the whole `unet`, or a `lora` beside it.
    time_cond_proj_dim: the student is told the guidance scale, as so many features (Meng et al. 2023), such as LCM's
        256: of a whole U-Net, whose teacher is not told it.
    teaching: the precision in which the teacher computes.
    prompts, seeds: what validation draws.
    """

    kind: ClassVar[str] = "text_to_image"

    base: str
    data: Data
    variant: str | None = None
    train: TrainUNet | TrainLoRA = field(default_factory=TrainUNet)
    time_cond_proj_dim: int | None = None
    teaching: Literal["float32", "bfloat16", "float16"] = "float32"
    caption_windows: int = 1
    prompts: tuple[str, ...] = ()
    seeds: int = 2

    def check(self, where: str) -> None:
        """Raise UserError for settings that can't be."""
        refuse_outside(where, self, ("caption_windows", "seeds"), 1)
        if self.train.text_encoder:
            raise UserError(
                f"{where}.train.text_encoder: a student has its teacher's text encoder: leave it out"
            )
        if self.time_cond_proj_dim is not None and isinstance(self.train, TrainLoRA):
            raise UserError(f"{where}.time_cond_proj_dim is of a whole student: set train.kind to unet")
        self.train.check_data(self.data.conditioned, prior=False)
        self.data.check(f"{where}.data")

    def in_round(self, where: str, base: Path | None, last: bool) -> "TextToImageModel":
        """Return the same for one of several rounds: taught by the student in `base`, None for the first.

        What another round begins from keeps float32. Raises UserError for a LoRA.
        """
        if not isinstance(self.train, TrainUNet):
            raise UserError(
                f"{where}.train: rounds follow each other in the whole weights: take kind unet, or one round"
            )
        train = self.train if last else replace(self.train, export_precision="float32")
        if base is None:
            return replace(self, train=train)
        return replace(self, train=train, base=str(base), variant=None, time_cond_proj_dim=None)

    def open(self, where: str) -> "TaughtTextToImage":
        """Load it. Raises UserError."""
        return TaughtTextToImage(self, where)


class TaughtTextToImage(Taught):
    """See `Taught`."""

    def __init__(self, config: TextToImageModel, where: str):
        self.config = config
        if isinstance(config.train, TrainLoRA) and config.base != BUNDLED:  # its export names the base
            refuse_form(resolve(config.base, config.variant), f"{where}.base {config.base}")
        self.system = starting_system(config.base, config.variant, {}, torch.float32, False, False)
        check_channels(self.system, variance=False, inpainting=False)
        self.teacher = _apart(self.system.network).to(getattr(torch, config.teaching))
        if config.time_cond_proj_dim is not None:
            if "guidance" in self.system.wants:
                raise UserError(
                    f"{where}.base is told its guidance scale already: leave time_cond_proj_dim out"
                )
            self.system.network.take_guidance(config.time_cond_proj_dim)
        self.source = config.data.latents(f"{where}.data", self.system, False)
        self.trained = config.train.model(self.system)
        self.student: nn.Module = self.trained
        self.conditions = Conditions(self.system.text, config.caption_windows, config.data.text_cache)

    @property
    def process(self) -> Process:
        return Discrete(self.system.scheduler)

    @property
    def wants(self) -> Mapping[str, int]:
        return replace(self.system, network=self.teacher).wants

    @property
    def student_wants(self) -> Mapping[str, int]:
        return self.system.wants

    def prepare(self, device: torch.device, batch_size: int) -> None:
        for each in (self.teacher, *self.system.modules().values()):
            each.to(device)
        self.source.prepare(batch_size)
        self.conditions.prepare(self.source.captions)

    def helpers(self) -> Mapping[str, nn.Module]:
        modules = self.system.modules()
        return {name: each for name, each in modules.items() if name != self.trained.component}

    def batch(self, start: int, size: int, rows: slice) -> LatentBatch:
        return self.source.read(start, size, rows)

    def clean(self, batch: LatentBatch) -> Tensor:
        return batch.latents.to(self.teacher.device)

    def told(self, batch: LatentBatch, rng: BatchGenerator) -> Condition:
        captions = batch.draw_captions(rng)
        text = self._text(captions, torch.zeros(len(captions), dtype=torch.bool))
        return self._under(text, batch.time_ids.to(self.teacher.device))

    def without(self, condition: Condition) -> Condition:
        text = self._nothing.map(lambda part: part.expand(condition.rows, *part.shape[1:]))
        return self._under(text, condition.time_ids)

    @cached_property
    def _nothing(self) -> Condition:
        """The text of no prompt, one row: always the same, as the text encoder is frozen."""
        return self._text([""], torch.ones(1, dtype=torch.bool))

    def _text(self, captions: list[str], dropped: Tensor) -> Condition:
        with torch.no_grad():
            return self.conditions(captions, dropped).to(self.teacher.device)

    def _under(self, text: Condition, time_ids: Tensor | None) -> Condition:
        return replace(self.system, network=self.teacher).condition(text, time_ids, guidance=1.0)

    def call(self, module: nn.Module, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return module(x, timestep, lambda: condition)

    def mean(self, batch: LatentBatch, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return batch.mean(losses)

    def _system(self, student: Student, steps: int) -> System:
        networks, process = student.networks, student.process
        assert isinstance(networks, TrainableModel) and isinstance(process, Discrete)
        options = {**self.system.options, "num_inference_steps": steps, "guidance_scale": student.scale}
        return replace(networks.within(self.system), scheduler=process.scheduler, options=options)

    def sheet(self, student: Student, steps: int) -> "Image | None":
        if not self.config.prompts:
            return None
        shown = ValidationConfig(self.config.prompts, self.config.seeds, steps, student.scale)
        return shown.draw(self._system(student, steps), self.source.resolution)

    def export(self, student: Student, steps: int, folder: Path, config: str) -> None:
        """Write a diffusers folder; or a LoRA's file and, beside it, how it is drawn with."""
        assert isinstance(student.networks, TrainableModel)
        system = self._system(student, steps)
        self.config.train.export(student.networks, system, folder, {"config": config})
        if isinstance(self.config.train, TrainLoRA):
            base = self.config.base
            base = base if base == BUNDLED or not Path(base).exists() else str(Path(base).resolve())
            write_few_steps(folder, base, system.scheduler.to_dict(), system.options)

    def notes(self) -> list[str]:
        return self.source.notes() + self.conditions.notes()


def _apart(network: DenoisingNetwork) -> DenoisingNetwork:
    """Return the same network as modules of its own on the same frozen weights: adapters of one are not the other's."""
    memo: dict[int, Any] = {
        id(each): nn.Parameter(each.detach(), requires_grad=False) for each in network.parameters()
    }
    return copy.deepcopy(network, memo).eval()
