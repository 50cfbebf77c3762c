"""What a network without text is told of a picture: a section of a config whose `kind` says which class it is.

In training a share of the pictures is told nothing, so that the model can be guided (Ho & Salimans 2022): they have the
class of no class, and zeros in place of all else.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.parameterization import per_image
from ldm.errors import UserError
from ldm.models.layers import sinusoidal_embedding
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import Batch, Examples

_PLACE = 32  # features of a token's place, half of its row and half of its column


@dataclass(frozen=True)
class Nothing:
    """The network learns pictures by themselves."""

    kind: ClassVar[str] = "nothing"

    @property
    def left_out(self) -> float:
        """The share of pictures of which the network is told nothing."""
        return 0.0

    def check(self, where: str, examples: Examples) -> None:
        """Raise UserError for data that it does not go with."""

    def sized(self, config: Any, examples: Examples) -> Any:
        """Return a network's settings, changed to take what it is told."""
        return config

    def condition(self, batch: Batch, dropped: Tensor, examples: Examples, side: int) -> Condition:
        """Return what the network is told of a batch.

        dropped: (B,), of which pictures it is told nothing. side: of what is denoised.
        """
        return Condition()

    def names(self, examples: Examples) -> list[str]:
        """Return the classes' names, for a model that knows classes."""
        return []


@dataclass(frozen=True)
class _Told(Nothing):
    """dropout: the share of pictures of which the network is told nothing."""

    dropout: float = 0.1

    @property
    def left_out(self) -> float:
        return self.dropout

    def check(self, where: str, examples: Examples) -> None:
        refuse_outside(where, self, ("dropout",), 0, 1)


@dataclass(frozen=True)
class Labels(_Told):
    """The network is told each picture's class."""

    kind: ClassVar[str] = "labels"

    def check(self, where: str, examples: Examples) -> None:
        super().check(where, examples)
        if not examples.labels:
            raise UserError(
                f"{where}: these data have no classes: name their column in data.label_column, or take kind: nothing"
            )

    def sized(self, config: Any, examples: Examples) -> Any:
        return replace(config, num_class_embeds=len(examples.labels) + bool(self.dropout))

    def condition(self, batch: Batch, dropped: Tensor, examples: Examples, side: int) -> Condition:
        assert batch.labels is not None
        null = torch.full_like(batch.labels, len(examples.labels))
        return Condition(labels=torch.where(dropped.to(null.device), null, batch.labels))

    def names(self, examples: Examples) -> list[str]:
        return examples.labels


@dataclass(frozen=True)
class SemanticMap(_Told):
    """The network is told what lies where (Rombach et al. 2022, sec. 4.3.2).

    by: "channels" joins one-hot maps to its input, a channel a region. "cross_attention" gives it a token a position,
    one-hot, with the position's sinusoidal features: for a network of kind unet.
    """

    kind: ClassVar[str] = "semantic_map"

    by: str = "channels"

    def check(self, where: str, examples: Examples) -> None:
        super().check(where, examples)
        if self.by not in ("channels", "cross_attention"):
            raise UserError(f"{where}.by is {self.by!r}: make it channels or cross_attention")
        if not examples.regions:
            raise UserError(
                f"{where}: these data don't say what lies where: take another kind, or compositions"
            )

    def sized(self, config: Any, examples: Examples) -> Any:
        count = len(examples.regions)
        if self.by == "channels":
            return replace(config, in_channels=config.in_channels + count)
        if not hasattr(config, "cross_attention_dim"):
            raise UserError(
                "condition.by cross_attention needs a network that has cross-attention: take network.kind unet"
            )
        return replace(config, cross_attention_dim=count + _PLACE)

    def condition(self, batch: Batch, dropped: Tensor, examples: Examples, side: int) -> Condition:
        if batch.maps is None:
            raise UserError("what lies where is known of whole pictures only: set crop to null")
        maps = F.interpolate(batch.maps[:, None].float(), size=(side, side), mode="nearest").long()[:, 0]
        hot = F.one_hot(maps, len(examples.regions)).float()  # (B, side, side, K)
        if self.by == "channels":
            return Condition(channels=kept(hot.permute(0, 3, 1, 2).contiguous(), dropped))
        places = sinusoidal_embedding(torch.arange(side, device=maps.device), _PLACE // 2)
        rows = places[:, None].expand(side, side, -1)
        tokens = torch.cat([rows, rows.transpose(0, 1)], dim=-1).expand(len(hot), -1, -1, -1)
        return Condition(hidden=kept(torch.cat([hot, tokens], dim=-1).flatten(1, 2), dropped))


@dataclass(frozen=True)
class SmallPicture(_Told):
    """The network is told what a picture looks like at a low resolution (Saharia et al. 2021, SR3; Ho et al. 2022).

    resolution: of its side, in pixels; it is then enlarged to what is denoised and joined to the network's input.
    """

    kind: ClassVar[str] = "low_resolution"

    resolution: int = 16

    def check(self, where: str, examples: Examples) -> None:
        super().check(where, examples)
        refuse_outside(where, self, ("resolution",), 1, examples.side)

    def sized(self, config: Any, examples: Examples) -> Any:
        return replace(config, in_channels=config.in_channels + examples.whole(0, 1).pictures.shape[1])

    def condition(self, batch: Batch, dropped: Tensor, examples: Examples, side: int) -> Condition:
        small = resized(batch.pictures, self.resolution)
        return Condition(channels=kept(resized(small, side), dropped))


@dataclass(frozen=True)
class BlurredPicture(_Told):
    """The network is told a blurred picture.

    blur: the standard deviation of the Gaussian, in pixels. The picture is then brought to the size of what is denoised
    and joined to the network's input.
    """

    kind: ClassVar[str] = "blurred"

    blur: float = 8.0

    def check(self, where: str, examples: Examples) -> None:
        super().check(where, examples)
        refuse_outside(where, self, ("blur",), 0.1, 1000)

    def sized(self, config: Any, examples: Examples) -> Any:
        return replace(config, in_channels=config.in_channels + examples.whole(0, 1).pictures.shape[1])

    def condition(self, batch: Batch, dropped: Tensor, examples: Examples, side: int) -> Condition:
        return Condition(channels=kept(resized(blurred(batch.pictures, self.blur), side), dropped))


def kept(told: Tensor, dropped: Tensor) -> Tensor:
    """Return what is told (B, ...), with zeros where it is left out."""
    return told.masked_fill(per_image(dropped.to(told.device), told), 0)


def resized(pictures: Tensor, side: int) -> Tensor:
    """Return pictures (B, C, H, W) as squares of another side, without aliasing."""
    return F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)


def blurred(pictures: Tensor, blur: float) -> Tensor:
    """Convolve pictures (B, C, H, W) with a Gaussian; beyond their edges they go on as they end."""
    reach = min(math.ceil(3 * blur), min(pictures.shape[2:]) * 2)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=pictures.device) ** 2) / (2 * blur**2))
    kernel = kernel / kernel.sum()
    channels = pictures.shape[1]
    wide = F.pad(pictures, (reach,) * 4, mode="replicate")
    across = F.conv2d(wide, kernel.expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, kernel[:, None].expand(channels, 1, -1, 1), groups=channels)
