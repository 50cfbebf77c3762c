"""A ControlNet (Zhang et al. 2023) beside a U-Net that stays as it is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checkpoints.controlnet import write_controlnet_folder
from ldm.condition import Condition
from ldm.conditioning.control import Control
from ldm.conditioning.controlnets import load_controlnet, save_control_lora
from ldm.errors import UserError
from ldm.models.controlnet import ControlNet, check_fit
from ldm.models.unet import UNet
from ldm.preprocess import PREPROCESSORS
from ldm.system import System
from ldm.training.data.latents import LatentBatch
from ldm.training.trainable.base import Trainable
from ldm.training.trainable.model import TrainableModel, thaw

CONTROL_LORA = "control-lora.safetensors"
_WIDTHS = (16, 32, 96, 256)  # of what a control picture goes through; the last one again for deeper latents


class ControlledModel(TrainableModel):
    """A frozen U-Net, and the ControlNet at it that is trained."""

    def __init__(self, system: System, controlnet: ControlNet):
        super().__init__(system, with_text=False)
        self.controlnet = controlnet

    def controls(self, pictures: Tensor | None) -> list[Control]:
        assert pictures is not None
        return [Control(self.controlnet, pictures)]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Callable[[], Condition],
        picture: Tensor | None = None,
    ) -> Tensor:
        told, unet = condition(), self.network
        assert picture is not None and isinstance(unet, UNet)
        return unet(x, timestep, told, self.controlnet(x, timestep, told, self.controlnet.embed(picture)))


@dataclass(frozen=True)
class TrainControlNet(Trainable):
    """A ControlNet; the export, in float16, is a folder that diffusers' ControlNetModel loads, or with `rank` a file.

    base: a ControlNet to go on with; None begins with a copy of the U-Net's encoder. edges: what finds the edges that
    it is shown; None shows it the data's own control pictures (data.conditioning_column). thresholds: of the edges'.
    rank: export a Control-LoRA, one small file with what has changed of the U-Net's encoder, up to this rank.
    """

    kind: ClassVar[str] = "controlnet"
    controlled: ClassVar[bool] = True

    base: str | None = None
    edges: Literal["canny"] | None = None
    thresholds: tuple[float, float] = (100.0, 200.0)
    rank: int | None = None

    def check(self, from_nothing: bool, inpainting: bool) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"train.rank is {self.rank}: give 1 or more, or leave it out")
        if from_nothing:
            raise UserError("a ControlNet goes with a base that is there, not with a U-Net from nothing")
        if inpainting:
            raise UserError("inpainting trains the whole U-Net, not a ControlNet: set train.kind to unet")

    def check_data(self, conditioned: bool, prior: bool) -> None:
        if conditioned == (self.edges is not None):
            raise UserError(
                "a ControlNet learns from control pictures: name their column in data.conditioning_column, or set "
                "train.edges to canny, and not both"
            )
        if conditioned and prior:
            raise UserError(
                "class pictures have no control pictures of their own: leave prior out, or set train.edges"
            )

    @property
    def wants_pictures(self) -> bool:
        return self.edges is not None

    def control_pictures(self, batch: LatentBatch) -> Tensor | None:
        if self.edges is None:
            return batch.conditioning
        assert batch.pictures is not None
        pixels = ((batch.pictures.cpu() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        found = [torch.from_numpy(PREPROCESSORS[self.edges](each, *self.thresholds)) for each in pixels]
        return torch.stack(found).permute(0, 3, 1, 2).float() / 255

    def model(self, system: System) -> TrainableModel:
        network, config = system.network, system.autoencoder.config
        if not isinstance(network, UNet):
            raise UserError(
                f"a ControlNet is for a U-Net, and the base's network is a {type(network).__name__}"
            )
        if self.base is None:
            halvings = round(math.log2(config.factor))
            widths = (*_WIDTHS, *_WIDTHS[-1:] * halvings)[: halvings + 1]
            controlnet = ControlNet.from_unet(network, conditioning_embedding_out_channels=widths)
        else:
            controlnet = load_controlnet(self.base, unet=network)
            check_fit(network, controlnet, config.latent_channels, config.factor, "text_to_image.train.base")
        thaw(controlnet)
        return ControlledModel(system, controlnet)

    def export(
        self, model: TrainableModel, system: System, folder: Path, metadata: Mapping[str, str]
    ) -> None:
        assert isinstance(model, ControlledModel) and isinstance(system.network, UNet)
        if self.rank is not None:
            save_control_lora(model.controlnet, system.network, folder / CONTROL_LORA, self.rank)
            return
        tensors = {name: each.half() for name, each in model.controlnet.state_dict().items()}
        write_controlnet_folder(folder, model.controlnet.config.to_diffusers(), tensors)
