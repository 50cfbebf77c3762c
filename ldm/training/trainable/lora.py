"""A LoRA (Hu et al. 2021) beside the U-Net and, where that is asked for, beside the text encoders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ldm.checkpoints.lora import FILE, write_lora
from ldm.errors import UserError
from ldm.models.lora import LoRA
from ldm.system import System
from ldm.training.trainable.base import Trainable
from ldm.training.trainable.model import TrainableModel, freeze_idle


@dataclass(frozen=True)
class TrainLoRA(Trainable):
    """A LoRA beside the U-Net and, with `text_encoder`, beside the text encoders. The export is its file.

    targets, text_targets: which layers; see `ldm.models.lora.select`. alpha: None is the rank.
    layout: of the file, diffusers' (and peft's) or kohya's.
    """

    kind: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "attention"
    text_encoder: bool = False
    text_targets: str = "attention"
    layout: Literal["diffusers", "kohya"] = "diffusers"

    def check(self, from_nothing: bool, inpainting: bool) -> None:
        if from_nothing:
            raise UserError("a LoRA goes with a base that is there, not with a U-Net from nothing")
        if inpainting:
            raise UserError("inpainting trains the whole U-Net, not a LoRA: set train.kind to unet")

    def model(self, system: System) -> TrainableModel:
        model = TrainableModel(system, with_text=self.text_encoder)
        arguments = (self.rank, self.alpha, self.dropout)
        model.adapters[model.component] = LoRA(system.network, self.targets, *arguments)
        beside = {
            name: LoRA(each, self.text_targets, *arguments) for name, each in model.text_encoders.items()
        }
        model.adapters.update(beside)
        if model.text:
            freeze_idle(model.text, [*model.text_encoders.values(), *beside.values()])
        return model

    def export(
        self, model: TrainableModel, system: System, folder: Path, metadata: Mapping[str, str]
    ) -> None:
        adapters = {name: each.weights() for name, each in model.adapters.items() if isinstance(each, LoRA)}
        write_lora(folder / FILE, adapters, self.layout, model.network.config.to_diffusers(), metadata)
