"""The U-Net without text (Ho et al. 2020; Dhariwal & Nichol 2021; Song et al. 2021), of pixels or latents, and classes.

Parameter names are those of diffusers' UNet2DModel, so its weights load without a map.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models.denoising import DenoisingNetwork
from ldm.models.layers import (
    Downsample,
    GroupNorm,
    PositionAttention,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    sinusoidal_embedding,
    with_more_channels,
)
from ldm.models.packed import Conv2d
from ldm.models.unet2d_config import LevelConfig, UNet2DConfig

_FOURIER_SCALE = 16.0  # of the random frequencies (Song et al. 2021, app. H.1)


class GaussianFourierProjection(nn.Module):
    """Random Fourier features of the logarithm of sigma (Tancik et al. 2020): (B,) -> (B, 2 * width), in float32."""

    weight: Tensor

    def __init__(self, width: int):
        super().__init__()
        # Drawn once and never trained: a buffer, under the name of diffusers' parameter.
        self.register_buffer("weight", _FOURIER_SCALE * torch.randn(width))

    def forward(self, sigma: Tensor) -> Tensor:
        angles = 2 * math.pi * sigma.float().log()[:, None] * self.weight.float()  # (B, width)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeProjection(nn.Module):
    """Sinusoidal features of timesteps: (B,) -> (B, width), in float32. It has no weights."""

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        self.config = config

    def forward(self, timestep: Tensor) -> Tensor:
        c = self.config
        return sinusoidal_embedding(timestep, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)


class DownBlock(nn.Module):
    """Residual blocks of one resolution, each with attention where the level has it, then a halving.

    That is a convolution, or where the level resizes in residual blocks one of these, on means of 2x2 positions
    (Song et al. 2021, app. H; Dhariwal & Nichol 2021).
    """

    def __init__(self, width: int, out: int, level: LevelConfig, last: bool, config: UNet2DConfig):
        super().__init__()
        channels = [width] + [out] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(resnet(c, out, config) for c in channels)
        self.attentions = nn.ModuleList(
            attention(out, config, config.norm_num_groups) for _ in channels if level.attends
        )
        self.downsamplers = nn.ModuleList()
        if not last and level.resizes_in_resnets:
            self.downsamplers.append(resnet(out, out, config))
        elif not last:
            self.downsamplers.append(Downsample(out, asymmetric=config.downsample_padding == 0))

    def forward(self, x: Tensor, time: Tensor) -> list[Tensor]:
        """Return every feature map on the way; the last is what goes on."""
        maps: list[Tensor] = []
        for i, block in enumerate(self.resnets):
            x = block(x, time)
            x = self.attentions[i](x) if self.attentions else x
            maps.append(x)
        for sampler in self.downsamplers:
            halved = isinstance(sampler, ResnetBlock)
            maps.append(sampler(x, time, lambda each: F.avg_pool2d(each, 2)) if halved else sampler(x))
        return maps


class UpBlock(nn.Module):
    """As a DownBlock, upwards: each residual block also takes a feature map of the way down."""

    def __init__(
        self, width: int, skips: list[int], out: int, level: LevelConfig, last: bool, config: UNet2DConfig
    ):
        super().__init__()
        widths = [width] + [out] * (len(skips) - 1)
        self.resnets = nn.ModuleList(resnet(w + s, out, config) for w, s in zip(widths, skips, strict=True))
        self.attentions = nn.ModuleList(
            attention(out, config, config.norm_num_groups) for _ in skips if level.attends
        )
        doubling = resnet(out, out, config) if level.resizes_in_resnets else Upsample(out)
        self.upsamplers = nn.ModuleList([] if last else [doubling])

    def forward(self, x: Tensor, maps: list[Tensor], time: Tensor) -> Tensor:
        """Take from `maps`, in the order of the way down, what is used."""
        for i, block in enumerate(self.resnets):
            x = block(torch.cat([x, maps.pop()], dim=1), time)
            x = self.attentions[i](x) if self.attentions else x
        for sampler in self.upsamplers:
            size = maps[-1].shape[-2:]  # odd sizes come back as they were
            doubled = partial(F.interpolate, size=tuple(size))
            x = sampler(x, time, doubled) if isinstance(sampler, ResnetBlock) else sampler(x, size)
        return x


class MidBlock(nn.Module):
    """Residual block, attention if there is any, residual block, at the lowest resolution."""

    def __init__(self, channels: int, config: UNet2DConfig):
        super().__init__()
        self.resnets = nn.ModuleList(resnet(channels, channels, config) for _ in range(2))
        own = [attention(channels, config, config.mid_groups)] if config.add_attention else []
        self.attentions = nn.ModuleList(own)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        for each in self.attentions:
            x = each(x)
        return self.resnets[1](x, time)


class UNet2D(DenoisingNetwork):
    """Predicts noise, x0, v or a score of pixels or latents from noisy ones, the timestep, and a label if it has any.

    For classifier-free guidance over labels the null class is the last row of the table: see `UNet2DConfig`.
    """

    block_types = (ResnetBlock, PositionAttention)
    config: UNet2DConfig

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        config.check()
        self.config = config
        widths = config.block_out_channels
        self.time_proj, features = time_projection(config)
        self.time_embedding = TimestepEmbedding(features, config.time_channels)
        if config.num_class_embeds:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_channels)
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = down_blocks(config)
        self.mid_block = MidBlock(widths[-1], config) if config.mid_block_type else None

        width, up = widths[-1], config.levels("Up")[::-1]
        kept = [widths[0]] + [out for out in widths for _ in range(config.layers_per_block + 1)]
        kept.pop()  # the last level has no halving
        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            skips = [kept.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(width, skips, out, up[i], i == 0, config))
            width = out

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)
        begin_as_identity(self)
        zero(self.conv_out)

    @classmethod
    def read_config(cls, mapping: Mapping[str, Any], where: str) -> UNet2DConfig:
        return UNet2DConfig.from_diffusers(mapping, where)

    def wants(self, latent_channels: int) -> dict[str, int]:
        """See `DenoisingNetwork`: the labels, of so many classes, and channels beside those of what is denoised."""
        return self.config.wants(latent_channels)

    def take_channels(self, in_channels: int) -> None:
        """See `DenoisingNetwork`."""
        self.conv_in = with_more_channels(self.conv_in, in_channels)
        self.config = replace(self.config, in_channels=in_channels)

    @property
    def multiple(self) -> int:
        """The levels below the first halve the sides."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Return one prediction, (B, out_channels, h, w).

        sample: (B, C, h, w). timestep: (B,), 0..999 and may be fractional; where time_embedding_type is "fourier", the
        sigma, above 0. condition: labels (B,), 0..num_class_embeds - 1; channels (B, in_channels - C, h, w), which are
        joined to the sample.
        """
        time = F.silu(self._embedding(sample.dtype, timestep, condition.labels))  # (B, time_channels)
        if condition.channels is not None:
            sample = torch.cat([sample, condition.channels], dim=1)
        maps = [self.conv_in(sample)]
        for block in self.down_blocks:
            maps += block(maps[-1], time)
        x = maps[-1] if self.mid_block is None else self.mid_block(maps[-1], time)
        for block in self.up_blocks:
            x = block(x, maps, time)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x / timestep.to(x)[:, None, None, None] if self._told_sigma else x

    @property
    def _told_sigma(self) -> bool:
        return self.config.time_embedding_type == "fourier"

    def _embedding(self, dtype: torch.dtype, timestep: Tensor, labels: Tensor | None) -> Tensor:
        time = self.time_embedding(self.time_proj(timestep).to(dtype))
        if (self.config.num_class_embeds is None) != (labels is None):
            has = "no labels" if labels is None else "labels"
            raise ValueError(
                f"this network knows {self.config.num_class_embeds or 'no'} classes, and the condition has {has}"
            )
        return time if labels is None else time + self.class_embedding(labels)


# What a noisy classifier has in common with a U-Net


def time_projection(config: UNet2DConfig) -> tuple[nn.Module, int]:
    """Return what makes features of timesteps, and how many."""
    width = config.block_out_channels[0]
    if config.time_embedding_type == "fourier":
        return GaussianFourierProjection(width), 2 * width
    return TimeProjection(config), width


def down_blocks(config: UNet2DConfig) -> nn.ModuleList:
    """Return the blocks of the way down, one a level."""
    widths = config.block_out_channels
    rows = zip(pairwise((widths[0], *widths)), config.levels("Down"), strict=True)
    return nn.ModuleList(
        DownBlock(width, out, level, i == len(widths) - 1, config)
        for i, ((width, out), level) in enumerate(rows)
    )


def resnet(in_channels: int, out_channels: int, config: UNet2DConfig) -> ResnetBlock:
    """Return a residual block that is told the timestep."""
    return ResnetBlock(
        in_channels,
        out_channels,
        time_channels=config.time_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
    )


def attention(channels: int, config: UNet2DConfig, groups: int | None) -> PositionAttention:
    """Return the attention of a level; groups: of its norm, None for no norm."""
    heads = channels // (config.attention_head_dim or channels)
    return PositionAttention(channels, groups, config.norm_eps, heads)


def begin_as_identity(network: nn.Module) -> None:
    """Let every residual branch add zero at first (Dhariwal & Nichol 2021)."""
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            zero(module.conv2)
        elif isinstance(module, PositionAttention):
            zero(module.to_out)


def zero(layer: nn.Module) -> None:
    """Set a layer's parameters to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
