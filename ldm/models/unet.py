"""The U-Net with cross-attention (Rombach et al. 2022): SD 1.x, SD 2.x, SDXL, inpainting's 9 channels, small ones.

Parameter names are those of diffusers' UNet2DConditionModel, so its weights load without a map.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models.denoising import DenoisingNetwork, Residuals
from ldm.models.feature_reuse import Features
from ldm.models.layers import (
    Context,
    Downsample,
    GroupNorm,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    TransformerBlock,
    Upsample,
    context_of,
    guidance_embedding,
    with_more_channels,
)
from ldm.models.layers import sinusoidal_embedding as sinusoidal
from ldm.models.packed import Conv2d
from ldm.models.unet_config import Level, UNetConfig, levels


class DownBlock(nn.Module):
    """Residual blocks of one resolution, each with a transformer where the level has attention, then a halving."""

    def __init__(self, width: int, out: int, level: Level, last: bool, config: UNetConfig):
        super().__init__()
        channels = [width] + [out] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(c, out, config) for c in channels)
        self.attentions = nn.ModuleList(_transformers(level, out, len(channels), config))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor, time: Tensor, context: Context) -> list[Tensor]:
        """Return every feature map on the way; the last is what goes on."""
        maps: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            x = self.attentions[i](x, context) if self.attentions else x
            maps.append(x)
        return maps + [sampler(x) for sampler in self.downsamplers]


class UpBlock(nn.Module):
    """As a DownBlock, upwards: each residual block also takes a feature map of the way down."""

    def __init__(self, width: int, skips: list[int], out: int, level: Level, last: bool, config: UNetConfig):
        super().__init__()
        widths = [width] + [out] * (len(skips) - 1)
        self.resnets = nn.ModuleList(_resnet(w + s, out, config) for w, s in zip(widths, skips, strict=True))
        self.attentions = nn.ModuleList(_transformers(level, out, len(skips), config))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out)])

    def forward(self, x: Tensor, maps: list[Tensor], time: Tensor, context: Context) -> Tensor:
        """Take from `maps`, in the order of the way down, what is used."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, maps.pop()], dim=1), time)
            x = self.attentions[i](x, context) if self.attentions else x
        for sampler in self.upsamplers:
            x = sampler(x, maps[-1].shape[-2:])  # odd sizes come back as they were
        return x


class UNetMidBlock(nn.Module):
    """Residual block, transformer, residual block, at the lowest resolution; or the first alone, without attention."""

    def __init__(self, channels: int, level: Level, config: UNetConfig):
        super().__init__()
        count = 2 if level.attention else 1
        self.resnets = nn.ModuleList(_resnet(channels, channels, config) for _ in range(count))
        self.attentions = nn.ModuleList(_transformers(level, channels, 1, config))

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        x = self.resnets[0](x, time)
        if not self.attentions:
            return x
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UNet(DenoisingNetwork):
    """Predicts noise, x0 or v (whatever it was trained for) from noisy latents, timesteps and a text condition."""

    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    )
    block_types = (ResnetBlock, TransformerBlock)
    gives_features = True
    config: UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__()
        config.check()
        self.config = config
        widths = config.block_out_channels
        down = levels(config, config.down_block_types, "Down")
        up = levels(config, config.up_block_types, "Up")[::-1]
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], config.time_cond_proj_dim)
        self.add_embedding = size_embedding(config)
        if config.num_class_embeds:
            self.class_embedding = nn.Embedding(config.num_class_embeds, 4 * widths[0])
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = down_blocks(config)
        self.mid_block = UNetMidBlock(widths[-1], replace(down[-1], attention=True), config)

        width, kept = widths[-1], map_channels(config)
        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            skips = [kept.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(width, skips, out, up[i], i == 0, config))
            width = out

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)
        self._zero_last_layers()

    @classmethod
    def read_config(cls, mapping: Mapping[str, Any], where: str) -> UNetConfig:
        return UNetConfig.from_diffusers(mapping, where)

    def wants(self, latent_channels: int) -> dict[str, int]:
        """See `DenoisingNetwork`: the text, SDXL's pooled text and sizes, inpainting's channels, the guidance."""
        return self.config.wants(latent_channels)

    def wants_scored(self, latent_channels: int) -> dict[str, int]:
        """As DenoisingNetwork says."""
        if not self.config.addition_embed_type:
            return super().wants_scored(latent_channels)
        return self.config.wants(latent_channels, sizes=5)

    def take_channels(self, in_channels: int) -> None:
        """See `DenoisingNetwork`."""
        self.conv_in = with_more_channels(self.conv_in, in_channels)
        self.config = replace(self.config, in_channels=in_channels)

    def take_guidance(self, dim: int) -> None:
        """See `DenoisingNetwork`."""
        self.time_embedding.take(dim)
        self.config = replace(self.config, time_cond_proj_dim=dim)

    @property
    def multiple(self) -> int:
        """The levels below the first halve the sides."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        condition: Condition,
        residuals: Residuals | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """Return one prediction, (B, out_channels, h, w).

        sample: (B, C, h, w), unit variance. timestep: (B,), 0..999, may be fractional.
        condition: hidden (B, L, cross_attention_dim); SDXL's pooled (B, P) and time_ids (B, 6 or 5); channels (B,
        in_channels - C, h, w), which are joined to the sample; labels (B,), of num_class_embeds classes; guidance (B,),
        where there is a time_cond_proj_dim; images, for adapters. residuals: what is added to the
        feature maps. features: what all levels below the finest gave before, or what they give now is put there.
        """
        context = context_of(condition)
        time = embed_time(
            self.config, self.time_embedding, self.add_embedding, sample.dtype, timestep, condition
        )
        if condition.labels is not None:
            time = time + self.class_embedding(condition.labels)
        time = F.silu(time)  # (B, 4*C0); each block projects the activated one
        if condition.channels is not None:
            sample = torch.cat([sample, condition.channels], dim=1)
        maps = [self.conv_in(sample)]
        x = None if features is None else features.deep
        if x is not None:  # the halving of the finest level, and what is below it, are not asked
            maps = (maps + self.down_blocks[0](maps[-1], time, context))[: self.config.layers_per_block + 1]
            if residuals is not None:
                maps = [each + more for each, more in zip(maps, residuals.down, strict=False)]
            return self._out(self.up_blocks[-1](x, maps, time, context))
        for block in self.down_blocks:
            maps += block(maps[-1], time, context)
        x = self.mid_block(maps[-1], time, context)
        if residuals is not None:
            maps = [each + more for each, more in zip(maps, residuals.down, strict=True)]
            x = x + residuals.mid
        for block in self.up_blocks[:-1]:
            x = block(x, maps, time, context)
        if features is not None:
            features.deep = x
        return self._out(self.up_blocks[-1](x, maps, time, context))

    def _out(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _zero_last_layers(self) -> None:
        """Every residual branch starts as the identity and the output as zero (Dhariwal & Nichol 2021)."""
        last = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        last += [m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)]
        for layer in [*last, self.conv_out]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


# What a ControlNet has in common with a U-Net


def size_embedding(config: UNetConfig) -> TimestepEmbedding | None:
    """Return the embedding of SDXL's pooled text and sizes, for networks that have one."""
    if not config.addition_embed_type:
        return None
    return TimestepEmbedding(
        config.projection_class_embeddings_input_dim or 0, 4 * config.block_out_channels[0]
    )


def down_blocks(config: UNetConfig) -> nn.ModuleList:
    """Return the blocks of the way down, one a level."""
    widths = config.block_out_channels
    pairs = pairwise((widths[0], *widths))
    rows = zip(pairs, levels(config, config.down_block_types, "Down"), strict=True)
    return nn.ModuleList(
        DownBlock(width, out, level, i == len(widths) - 1, config)
        for i, ((width, out), level) in enumerate(rows)
    )


def map_channels(config: UNetConfig) -> list[int]:
    """Return the channels of every feature map of the way down, the first convolution's among them, in order."""
    kept = [config.block_out_channels[0]]
    for out in config.block_out_channels:
        kept += [out] * (config.layers_per_block + 1)
    return kept[:-1]  # the last level has no halving


def embed_time(
    config: UNetConfig,
    time_embedding: TimestepEmbedding,
    add_embedding: TimestepEmbedding | None,
    dtype: torch.dtype,
    timestep: Tensor,
    condition: Condition,
) -> Tensor:
    """Embed timesteps (B,), with the guidance scale, and SDXL's pooled text and sizes, where it is told: (B, 4*C0)."""
    c = config
    features = sinusoidal(timestep, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
    told = None
    if c.time_cond_proj_dim is not None:
        if condition.guidance is None:
            raise ValueError("this network, of a time_cond_proj_dim, needs guidance (B,) in its condition")
        told = guidance_embedding(condition.guidance, c.time_cond_proj_dim).to(dtype)
    time = time_embedding(features.to(dtype), told)
    if add_embedding is None:
        return time
    ids, pooled = condition.time_ids, condition.pooled
    if ids is None or pooled is None:
        raise ValueError("this network, SDXL's, needs pooled (B, P) and time_ids (B, n) in its condition")
    sizes = sinusoidal(ids.flatten(), c.addition_time_embed_dim or 0, c.flip_sin_to_cos, c.freq_shift)
    features = torch.cat([pooled, sizes.reshape(ids.shape[0], -1).to(dtype)], dim=-1)
    return time + add_embedding(features)


def _resnet(in_channels: int, out_channels: int, config: UNetConfig) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        time_channels=4 * config.block_out_channels[0],
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
    )


def _transformers(level: Level, channels: int, count: int, config: UNetConfig) -> list[SpatialTransformer]:
    return [
        SpatialTransformer(
            channels,
            level.heads,
            config.cross_attention_dim,
            depth=level.depth,
            linear_projection=config.use_linear_projection,
            groups=config.norm_num_groups,
            dropout=config.dropout,
        )
        for _ in range(count if level.attention else 0)
    ]
