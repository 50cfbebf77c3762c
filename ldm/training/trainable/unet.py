"""The whole U-Net and, where that is asked for, the text encoders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ldm.checkpoints.folder import write_folder
from ldm.errors import UserError
from ldm.system import System
from ldm.training.start import half
from ldm.training.trainable.base import Trainable
from ldm.training.trainable.model import TrainableModel, freeze_idle, thaw


@dataclass(frozen=True)
class TrainUNet(Trainable):
    """The whole U-Net and, with `text_encoder`, the text encoders. The export is a diffusers folder.

    export_precision: of its weights; float32 is what training goes on from.
    """

    kind: ClassVar[str] = "unet"

    text_encoder: bool = False
    export_precision: Literal["float16", "float32"] = "float16"

    def check(self, from_nothing: bool, inpainting: bool) -> None:
        if from_nothing and self.text_encoder:
            raise UserError(
                "train.text_encoder goes with a base that is there, not with a U-Net from nothing"
            )

    def model(self, system: System) -> TrainableModel:
        model = TrainableModel(system, with_text=self.text_encoder)
        for module in (model.network, *model.text_encoders.values()):
            thaw(module)
        if model.text:
            freeze_idle(model.text, list(model.text_encoders.values()))
        return model

    def export(
        self, model: TrainableModel, system: System, folder: Path, metadata: Mapping[str, str]
    ) -> None:
        whole = model.within(system)
        checkpoint = whole.checkpoint()
        if self.export_precision == "float16":
            checkpoint = half(checkpoint)
        write_folder(folder, checkpoint, whole.write_beside)
