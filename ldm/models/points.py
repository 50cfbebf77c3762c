"""A network that denoises points: toys in two dimensions, on which all of diffusion can be seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models import diffusers_config
from ldm.models.denoising import DenoisingNetwork
from ldm.models.layers import TimestepEmbedding, sinusoidal_embedding

_CLASS = "PointNetwork"
_FREQUENCIES = 5  # octaves from 1 on


@dataclass(frozen=True)
class PointConfig:
    """The settings of a PointNetwork.

    in_channels, out_channels: a point's coordinates. block_out_channels: the width of each hidden layer.
    time_embedding_type: "positional" for timesteps, "logarithmic" for noise levels, of which it takes the logarithm.
    num_class_embeds: classes, None for none.
    """

    in_channels: int = 2
    out_channels: int = 2
    block_out_channels: tuple[int, ...] = (128, 128, 128)
    time_embedding_type: str = "positional"
    num_class_embeds: int | None = None

    @property
    def sample_size(self) -> int:
        """A point is a picture of one pixel."""
        return 1

    @property
    def layers(self) -> int:
        return len(self.block_out_channels)

    def check(self, where: str = "the network's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        diffusers_config.check_sizes(
            self, where, "in_channels", "out_channels", "block_out_channels", "num_class_embeds"
        )
        known = ("positional", "logarithmic")
        diffusers_config.check_choice(self, where, "time_embedding_type", known)

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, _CLASS)


class PointNetwork(DenoisingNetwork):
    """Layers with residuals, each shifted by the timestep (and class): (B, C, 1, 1) -> (B, out_channels, 1, 1).

    The coordinates come with sines and cosines of them, without which a network of few dimensions learns no detail
    (Tancik et al. 2020).
    """

    pipelines = ()
    block_types = ()
    config: PointConfig

    def __init__(self, config: PointConfig):
        super().__init__()
        config.check()
        self.config = config
        first, *_ = widths = config.block_out_channels
        self.time_embedding = TimestepEmbedding(first, first)
        self.class_embedding = (
            nn.Embedding(config.num_class_embeds, first) if config.num_class_embeds else None
        )
        features = config.in_channels * (1 + 2 * _FREQUENCIES)
        self.layers = nn.ModuleList(
            nn.Linear(before, width) for before, width in pairwise((features, *widths))
        )
        self.shifts = nn.ModuleList(nn.Linear(first, width) for width in widths)
        self.out = nn.Linear(widths[-1], config.out_channels)

    @classmethod
    def read_config(cls, mapping: Mapping[str, Any], where: str) -> PointConfig:
        config = diffusers_config.parse(PointConfig, mapping, {}, _CLASS, where)
        config.check(where)
        return config

    def wants(self, latent_channels: int) -> dict[str, int]:
        return {"labels": self.config.num_class_embeds} if self.config.num_class_embeds else {}

    def forward(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """See `DenoisingNetwork`. sample: (B, C, 1, 1)."""
        if self.config.time_embedding_type == "logarithmic":
            timestep = (
                250 * timestep.log()
            )  # sigma from 0.01 to 50 over about as many units as timesteps have
        features = sinusoidal_embedding(timestep, self.config.block_out_channels[0])
        time = self.time_embedding(features.to(self.dtype))
        if self.class_embedding is not None:
            assert condition.labels is not None
            time = time + self.class_embedding(condition.labels)
        time = F.silu(time)
        x = sample.flatten(1)
        waves = [2.0**octave * x for octave in range(_FREQUENCIES)]
        x = torch.cat([x, *(each.sin() for each in waves), *(each.cos() for each in waves)], dim=1)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            new = F.silu(layer(x) + shift(time))
            x = x + new if x.shape == new.shape else new
        return self.out(x)[:, :, None, None]
