"""The networks that training builds from nothing: sections of a config whose `kind` says which class it is."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ldm.models.denoising import DenoisingNetwork
from ldm.models.points import PointConfig, PointNetwork
from ldm.models.unet import UNet
from ldm.models.unet2d import UNet2D
from ldm.models.unet2d_config import UNet2DConfig
from ldm.models.unet_config import UNetConfig


@dataclass(frozen=True)
class UNet2DSettings(UNet2DConfig):
    """A U-Net without text; see UNet2DConfig."""

    kind: ClassVar[str] = "unet2d"

    def sized(self, channels: int, out_channels: int, side: int) -> "UNet2DSettings":
        return replace(self, in_channels=channels, out_channels=out_channels, sample_size=side)

    def build(self) -> DenoisingNetwork:
        return UNet2D(self)


@dataclass(frozen=True)
class UNetSettings(UNetConfig):
    """A U-Net with cross-attention; see UNetConfig."""

    kind: ClassVar[str] = "unet"

    def sized(self, channels: int, out_channels: int, side: int) -> "UNetSettings":
        return replace(self, in_channels=channels, out_channels=out_channels, sample_size=side)

    def build(self) -> DenoisingNetwork:
        return UNet(self)


@dataclass(frozen=True)
class PointSettings(PointConfig):
    """Linear layers, for points; see PointConfig."""

    kind: ClassVar[str] = "points"

    def sized(self, channels: int, out_channels: int, side: int) -> "PointSettings":
        return replace(self, in_channels=channels, out_channels=out_channels)

    def build(self) -> DenoisingNetwork:
        return PointNetwork(self)
