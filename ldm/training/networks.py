"""The networks that training builds from nothing: sections of a config whose `kind` says which class it is."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork
from ldm.models.points import PointConfig, PointNetwork
from ldm.models.unet import UNet
from ldm.models.unet2d import UNet2D
from ldm.models.unet2d_config import UNet2DConfig
from ldm.models.unet_config import UNetConfig
from ldm.training.data.kinds import Data
from ldm.training.data.plain import PlainSource
from ldm.training.reconstruction import check_sides


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


NetworkSettings = UNet2DSettings | UNetSettings | PointSettings


def built_for(
    settings: NetworkSettings, source: PlainSource, data: Data, where: str, variance: bool = False
) -> DenoisingNetwork:
    """Build a network that is sized by what it learns from and what it is told. variance: it gives twice the channels.

    Raises UserError, that names `where`, for settings that do not fit.
    """
    factor = 1 if source.autoencoder is None else source.autoencoder.config.factor
    check_sides(where, data, source.crop, source.examples.side, factor)
    channels, height, width = source.clean(source.examples.whole(0, 1)).shape[1:]
    if height != width:
        raise UserError(f"{where}.data gives {width}x{height}, and squares are learned: set {where}.crop")
    side = source.crop // factor if source.crop else height
    if (settings.kind == "points") != (height == 1):
        raise UserError(
            f"{where}.network.kind points is of points, such as those of data.kind toys, and no other network is"
        )
    sized = settings.sized(channels, channels * (2 if variance else 1), side)
    network = source.condition.sized(sized, source.examples).build()
    if side % network.multiple:
        raise UserError(
            f"{where}.network halves the sides to an {network.multiple}th, and they are {side}: take fewer levels"
        )
    return network
