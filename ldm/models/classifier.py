"""A classifier of noisy pictures or latents: half a U-Net with attention pooling (Dhariwal & Nichol 2021, section 4).

The way down and the middle are those of `UNet2D`, under the same names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models import diffusers_config
from ldm.models.attention import attend
from ldm.models.layers import GroupNorm, PositionAttention, ResnetBlock, TimestepEmbedding
from ldm.models.packed import Conv2d, Linear
from ldm.models.unet2d import MidBlock, begin_as_identity, down_blocks, time_projection, zero
from ldm.models.unet2d_config import UNet2DConfig

_CLASS = "NoisyClassifier"


@dataclass(frozen=True)
class ClassifierConfig:
    """The settings of a classifier; those of its half U-Net are named as UNet2D's.

    sample_size: positions of what it sees along a side, which it has to keep to. num_classes: what it tells apart.
    attention_head_dim: the width of a head, also of the pooling's.
    """

    sample_size: int
    in_channels: int
    num_classes: int
    block_out_channels: tuple[int, ...] = (64, 128)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D")
    layers_per_block: int = 1
    attention_head_dim: int | None = 32
    norm_num_groups: int = 16
    norm_eps: float = 1e-5
    dropout: float = 0.0
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "scale_shift"

    @classmethod
    def read(cls, mapping: Mapping[str, Any], where: str = "classifier/config.json") -> "ClassifierConfig":
        """Read a config.json. Raises UserError that names a key of which no network can be built."""
        config = diffusers_config.parse(cls, mapping, {}, _CLASS, where)
        config.check(where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return diffusers_config.to_diffusers(self, _CLASS)

    def check(self, where: str = "the classifier's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        diffusers_config.check_sizes(self, where, "num_classes", least=2)
        diffusers_config.check_sizes(self, where, "sample_size", "in_channels")
        self.half.check(where)
        width = self.block_out_channels[-1]
        if width % (self.attention_head_dim or width):
            raise UserError(
                f"{where}: attention_head_dim {self.attention_head_dim} (the width of a head) does not divide the "
                f"block_out_channels {width}"
            )
        if self.map_size**2 > diffusers_config.LARGEST:
            raise UserError(
                f"{where}: sample_size {self.sample_size} leaves a map too large to pool: add levels"
            )

    @property
    def half(self) -> UNet2DConfig:
        """The settings of the U-Net of which it has the way down and the middle."""
        return UNet2DConfig(
            sample_size=self.sample_size,
            in_channels=self.in_channels,
            block_out_channels=self.block_out_channels,
            down_block_types=self.down_block_types,
            up_block_types=("UpBlock2D",) * len(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            attention_head_dim=self.attention_head_dim,
            norm_num_groups=self.norm_num_groups,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            time_embedding_type=self.time_embedding_type,
            resnet_time_scale_shift=self.resnet_time_scale_shift,
        )

    @property
    def layers(self) -> int:
        """Residual blocks: no file has fewer tensors than a network these."""
        return self.half.layers

    @property
    def map_size(self) -> int:
        """Positions of the last map along a side: each level but the last halves them, rounded up."""
        return -(-self.sample_size // 2 ** (len(self.block_out_channels) - 1))


class AttentionPool(nn.Module):
    """A map (B, C, s, s) to logits (B, K), by what the mean of all positions attends to (Radford et al. 2021, CLIP).

    Only the mean asks, for nothing else of the attention's output is used.
    """

    def __init__(self, size: int, channels: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1 + size**2, channels) / channels**0.5)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2).transpose(1, 2)  # (B, s * s, C)
        tokens = torch.cat([positions.mean(1, keepdim=True), positions], dim=1) + self.positional_embedding
        pooled = attend(self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens), self.heads)
        return self.to_out(pooled[:, 0])


class NoisyClassifier(nn.Module):
    """Tells the class of pictures or latents under noise of any level."""

    block_types = (ResnetBlock, PositionAttention)

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        config.check()
        self.config, half = config, config.half
        widths = config.block_out_channels
        self.time_proj, features = time_projection(half)
        self.time_embedding = TimestepEmbedding(features, half.time_channels)
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = down_blocks(half)
        self.mid_block = MidBlock(widths[-1], half)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], config.norm_eps)
        heads = widths[-1] // (config.attention_head_dim or widths[-1])
        self.pool = AttentionPool(config.map_size, widths[-1], heads, config.num_classes)
        begin_as_identity(self)
        zero(self.pool.to_out)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return logits (B, num_classes).

        sample: (B, in_channels, sample_size, sample_size), scaled as a denoising network is shown it. timestep: (B,);
        where time_embedding_type is "fourier", the sigma.
        """
        time = F.silu(self.time_embedding(self.time_proj(timestep).to(sample.dtype)))
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x = block(x, time)[-1]
        x = self.mid_block(x, time)
        return self.pool(F.silu(self.conv_norm_out(x)))
