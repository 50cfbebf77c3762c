"""The U-Net with cross-attention (Rombach et al. 2022): SD 1.x, SD 2.x, SDXL, inpainting's 9 channels, small ones.

Parameter names are those of diffusers' UNet2DConditionModel, so its weights load without a map.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models import diffusers_config
from ldm.models.denoising import DenoisingNetwork, extra_channels
from ldm.models.layers import (
    Downsample,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    TransformerBlock,
    Upsample,
)
from ldm.models.layers import sinusoidal_embedding as sinusoidal

_CLASS = "UNet2DConditionModel"
_ADDED = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")  # SDXL's
# Keys of diffusers' config that Stable Diffusion's networks leave at one value (the first; others mean the same).
_INERT: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (False,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False, [False] * 4, [False] * 3),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True)
class UNetConfig:
    """The settings of a U-Net, named as in diffusers' `unet/config.json`; the defaults are SD 1.x's.

    attention_head_dim: the NUMBER of heads a level (diffusers' historical misnomer).
    upcast_attention: kept for other programs' sake; SDPA accumulates in float32 anyway.
    addition_embed_type: "text_time" for SDXL's pooled text and size/crop conditions.
    """

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    upcast_attention: bool = False
    dropout: float = 0.0
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_diffusers(cls, mapping: Mapping[str, Any], where: str = "unet/config.json") -> "UNetConfig":
        """Raises UserError that names a key this network cannot honour."""
        config = diffusers_config.parse(cls, mapping, _INERT, _CLASS, where)
        config.check(where)
        return config

    def check(self, where: str = "the U-Net's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        sizes = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
        more = ("attention_head_dim", "cross_attention_dim", "sample_size", *_ADDED)
        diffusers_config.check_sizes(self, where, *sizes, "transformer_layers_per_block", *more)
        diffusers_config.check_layers(self.layers, where)
        diffusers_config.check_finite(self, where, "norm_eps", "dropout")
        if self.norm_eps < 0:
            raise UserError(f"{where}: norm_eps is {self.norm_eps}, where a number of at least 0 is needed")
        if (
            not abs(self.freq_shift) < self.block_out_channels[0] // 2
        ):  # the frequencies are divided by the rest
            raise UserError(f"{where}: freq_shift is {self.freq_shift!r:.60}: it is 0 or 1 in every network")
        diffusers_config.check_groups(self.block_out_channels, self.norm_num_groups, where)
        down = _levels(self, self.down_block_types, "Down", where)
        up = _levels(self, self.up_block_types, "Up", where)[::-1]
        down[-1] = replace(down[-1], attention=True)  # the middle block's
        for width, *ways in zip(self.block_out_channels, down, up, strict=True):
            for level in ways:
                if level.attention and width % level.heads:
                    raise UserError(
                        f"{where}: attention_head_dim {level.heads} (the number of heads) does not divide the "
                        f"block_out_channels {width}"
                    )

        if not 0 <= self.dropout < 1:
            raise UserError(f"{where}: dropout is {self.dropout}, where a share of less than 1 is meant")
        if self.addition_embed_type not in (None, "text_time"):
            raise UserError(
                f"{where}: addition_embed_type {self.addition_embed_type!r} is not supported (only 'text_time')"
            )
        if self.addition_embed_type and None in (getattr(self, name) for name in _ADDED):
            raise UserError(f"{where}: addition_embed_type 'text_time' needs {' and '.join(_ADDED)}")

    @property
    def layers(self) -> int:
        """Residual blocks and transformers on the way down: no file has fewer tensors than a network these."""
        depth = self.transformer_layers_per_block
        deepest = max(depth) if isinstance(depth, tuple) else depth
        return len(self.block_out_channels) * self.layers_per_block + self.layers_per_block * deepest

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, _CLASS)


class DownBlock(nn.Module):
    """Residual blocks of one resolution, each with a transformer where the level has attention, then a halving."""

    def __init__(self, width: int, out: int, level: "_Level", last: bool, config: UNetConfig):
        super().__init__()
        channels = [width] + [out] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(c, out, config) for c in channels)
        self.attentions = nn.ModuleList(level.transformers(out, len(channels), config))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """Every feature map on the way; the last is what goes on."""
        maps: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            x = self.attentions[i](x, context) if self.attentions else x
            maps.append(x)
        return maps + [sampler(x) for sampler in self.downsamplers]


class UpBlock(nn.Module):
    """As a DownBlock, upwards: each residual block also takes a feature map of the way down."""

    def __init__(
        self, width: int, skips: list[int], out: int, level: "_Level", last: bool, config: UNetConfig
    ):
        super().__init__()
        widths = [width] + [out] * (len(skips) - 1)
        self.resnets = nn.ModuleList(_resnet(w + s, out, config) for w, s in zip(widths, skips, strict=True))
        self.attentions = nn.ModuleList(level.transformers(out, len(skips), config))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out)])

    def forward(self, x: Tensor, maps: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        """`maps`, in the order of the way down, loses what is used."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, maps.pop()], dim=1), time)
            x = self.attentions[i](x, context) if self.attentions else x
        for sampler in self.upsamplers:
            x = sampler(x, maps[-1].shape[-2:])  # odd sizes come back as they were
        return x


class MidBlock(nn.Module):
    """Residual block, transformer, residual block, at the lowest resolution."""

    def __init__(self, channels: int, level: "_Level", config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList(replace(level, attention=True).transformers(channels, 1, config))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UNet(DenoisingNetwork):
    """Predicts noise, x0 or v (whatever it was trained for) from noisy latents, timesteps and a text condition."""

    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    block_types = (ResnetBlock, TransformerBlock)
    config: UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__()
        config.check()
        self.config = config
        widths = config.block_out_channels
        down = _levels(config, config.down_block_types, "Down")
        up = _levels(config, config.up_block_types, "Up")[::-1]

        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        if config.addition_embed_type:
            added = config.projection_class_embeddings_input_dim or 0
            self.add_embedding = TimestepEmbedding(added, 4 * widths[0])

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        width, kept = widths[0], [widths[0]]  # the channels of every feature map kept for the way up
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(widths):
            last = i == len(widths) - 1
            self.down_blocks.append(DownBlock(width, out, down[i], last, config))
            kept += [out] * (config.layers_per_block + (0 if last else 1))
            width = out

        self.mid_block = MidBlock(width, down[-1], config)

        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            skips = [kept.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(width, skips, out, up[i], i == 0, config))
            width = out

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self._zero_last_layers()

    @classmethod
    def read_config(cls, mapping: Mapping[str, Any], where: str) -> UNetConfig:
        return UNetConfig.from_diffusers(mapping, where)

    def wants(self, latent_channels: int) -> dict[str, int]:
        """As DenoisingNetwork says: the text, SDXL's pooled text and sizes, inpainting's mask and masked latents."""
        c = self.config
        parts = {"hidden": c.cross_attention_dim, **extra_channels(c.in_channels, latent_channels)}
        if c.addition_embed_type:
            pooled = (c.projection_class_embeddings_input_dim or 0) - 6 * (c.addition_time_embed_dim or 0)
            parts |= {"pooled": pooled, "time_ids": 6}
        return parts

    def take_channels(self, in_channels: int) -> None:
        """As DenoisingNetwork says."""
        old = self.conv_in
        new = nn.Conv2d(in_channels, old.out_channels, 3, padding=1).to(old.weight)
        nn.init.zeros_(new.weight)
        with torch.no_grad():
            new.weight[:, : old.in_channels] = old.weight
        new.bias = old.bias
        self.conv_in, self.config = new, replace(self.config, in_channels=in_channels)

    @property
    def multiple(self) -> int:
        """The levels below the first halve the sides."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Return one prediction, (B, out_channels, h, w).

        sample: (B, C, h, w), unit variance. timestep: (B,), 0..999, may be fractional.
        condition: hidden (B, L, cross_attention_dim); SDXL's pooled (B, P) and time_ids (B, 6); channels (B,
        in_channels - C, h, w), which are joined to the sample.
        """
        hidden = condition.text
        # (B, 4*C0); each block projects the activated one
        time = F.silu(self._embed(sample.dtype, timestep, condition))
        if condition.channels is not None:
            sample = torch.cat([sample, condition.channels], dim=1)
        maps = [self.conv_in(sample)]
        for block in self.down_blocks:
            maps += block(maps[-1], time, hidden)
        x = self.mid_block(maps[-1], time, hidden)
        for block in self.up_blocks:
            x = block(x, maps, time, hidden)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _embed(self, dtype: torch.dtype, timestep: Tensor, condition: Condition) -> Tensor:
        """(B, 4*C0): the timestep, plus SDXL's pooled text and sizes."""
        c = self.config
        features = sinusoidal(timestep, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
        time = self.time_embedding(features.to(dtype))
        if c.addition_embed_type is None:
            return time
        ids, pooled = condition.time_ids, condition.pooled
        if ids is None or pooled is None:
            raise ValueError("this U-Net, SDXL's, needs pooled (B, P) and time_ids (B, 6) in its condition")
        sizes = sinusoidal(ids.flatten(), c.addition_time_embed_dim or 0, c.flip_sin_to_cos, c.freq_shift)
        features = torch.cat([pooled, sizes.reshape(len(ids), -1).to(dtype)], dim=-1)
        return time + self.add_embedding(features)

    def _zero_last_layers(self) -> None:
        """Every residual branch starts as the identity and the output as zero (Dhariwal & Nichol 2021)."""
        last = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        last += [m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)]
        for layer in [*last, self.conv_out]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


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


@dataclass(frozen=True)
class _Level:
    """One resolution: whether it has attention, with how many heads, and how many transformer blocks deep."""

    attention: bool
    heads: int
    depth: int

    def transformers(self, channels: int, count: int, config: UNetConfig) -> list[SpatialTransformer]:
        return [
            SpatialTransformer(
                channels,
                self.heads,
                config.cross_attention_dim,
                depth=self.depth,
                linear_projection=config.use_linear_projection,
                groups=config.norm_num_groups,
                dropout=config.dropout,
            )
            for _ in range(count if self.attention else 0)
        ]


def _levels(config: UNetConfig, types: tuple[str, ...], way: str, where: str = "the U-Net") -> list[_Level]:
    """The levels in the order of `types`, diffusers' block names; those upwards begin at the lowest resolution."""
    known = {f"{way}Block2D": False, f"CrossAttn{way}Block2D": True}
    count = len(config.block_out_channels)
    if len(types) != count:
        raise UserError(
            f"{where}: {way.lower()}_block_types has {len(types)} names for a U-Net of {count} levels"
        )
    if unknown := [name for name in types if name not in known]:
        raise UserError(
            f"{where}: block type {unknown[0]!r} is not supported (supported: {', '.join(known)})"
        )
    heads, depths = (
        diffusers_config.per_level(getattr(config, name), count, name, where)
        for name in ("attention_head_dim", "transformer_layers_per_block")
    )
    order = slice(None, None, -1 if way == "Up" else 1)
    return [_Level(known[t], h, d) for t, h, d in zip(types, heads[order], depths[order], strict=True)]
