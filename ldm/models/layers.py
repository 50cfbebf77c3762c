"""Layers that the networks share: residual blocks, transformers, resampling, sinusoidal embeddings."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.condition import Condition
from ldm.models.attention import attend
from ldm.models.packed import Conv2d, Linear

_SMALL_MAP = 1024  # positions, below which torch takes that kernel


def sinusoidal_embedding(
    values: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Tensor:
    """Return sinusoidal features of scalars (Vaswani et al. 2017, sec. 3.5), in float32.

    values: (B,), any scale (timesteps 0..999, pixels). Returns (B, dim): cosines then sines, or sines first
    where `flip_sin_to_cos` is false. An odd `dim` is padded with a zero.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    frequencies = torch.exp(-math.log(10000) * steps / (half - freq_shift))
    angles = values.float()[:, None] * frequencies  # (B, half)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


def guidance_embedding(guidance: Tensor, dim: int) -> Tensor:
    """Return sines, then cosines, of 1000 (guidance - 1), as published latent consistency models learned them.

    Luo et al. 2023, after VDM's code. The order of the arithmetic is that of diffusers' `get_guidance_scale_embedding`:
    of angles of thousands float32 keeps three digits behind the point. guidance: (B,), 1 is none. Returns (B, dim),
    float32; an odd `dim` is padded with a zero.
    """
    half = dim // 2
    slope = torch.tensor(10000.0).log() / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=guidance.device) * -slope)
    angles = ((guidance.float() - 1) * 1000)[:, None] * frequencies  # (B, half)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: (B, in_channels) -> (B, out_channels).

    cond_proj_dim: features of a second thing that it is told, which are projected and added to the first. They begin
    without a say, so that a teacher's weights give the teacher.
    """

    def __init__(self, in_channels: int, out_channels: int, cond_proj_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)  # of a few rows: nothing to gain by packing
        self.linear_2 = nn.Linear(out_channels, out_channels)
        if cond_proj_dim is not None:
            self.take(cond_proj_dim)

    def take(self, cond_proj_dim: int) -> None:
        """Be told of a second thing, by so many features, from now on."""
        weight = self.linear_1.weight
        self.cond_proj = nn.Linear(
            cond_proj_dim, weight.shape[1], bias=False, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.cond_proj.weight)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        """told: (B, cond_proj_dim)."""
        if told is not None:
            x = x + self.cond_proj(told)
        return self.linear_2(F.silu(self.linear_1(x)))


class GroupNorm(nn.GroupNorm):
    """As torch's, with the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W) over the positions and channels of each group (Wu & He 2018)."""
        # With channels last torch's kernel for small maps reads with strides: of bfloat16 ten times slower on a CPU.
        small = input.dtype is torch.bfloat16 and input.shape[2:].numel() < _SMALL_MAP
        return super().forward(input.contiguous() if small and input.device.type == "cpu" else input)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with a shortcut (Ho et al. 2020, app. B).

    `time_channels` adds a projection of the (already SiLU-activated) time embedding between the two halves: as a
    shift, or as scale and shift of the second norm where `scale_shift` (Dhariwal & Nichol 2021, AdaGN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)

    def forward(
        self, x: Tensor, time: Tensor | None = None, resized: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return (B, out_channels, H, W). resized: changes the sides of both branches, before the first convolution."""
        h = F.silu(self.norm1(x))
        if resized is not None:
            h, x = resized(h), resized(x)
        h = self.conv1(h)  # (B, out, H, W)
        if time is None:
            h = self.norm2(h)
        else:
            shift = self.time_emb_proj(time)[:, :, None, None]  # (B, out or 2*out, 1, 1)
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + shift)
        h = self.conv2(self.dropout(F.silu(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nn.Module):
    """3x3 convolution of stride 2. `asymmetric` pads right and below only, as the LDM autoencoder does."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size` (by 2 where it is None), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        grown = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=tuple(size))
        return self.conv(grown)


def with_more_channels(old: Conv2d, in_channels: int) -> Conv2d:
    """Return a 3x3 convolution of more input channels that does as the old one did: what is new weighs nothing."""
    new = Conv2d(in_channels, old.out_channels, 3, padding=1).to(old.weight)
    nn.init.zeros_(new.weight)
    with torch.no_grad():
        new.weight[:, : old.in_channels] = old.weight
    new.bias = old.bias
    return new


class TextAndImages(NamedTuple):
    """The context that a cross-attention attends to where there are image prompts: see `Condition`."""

    text: Tensor
    images: Mapping[str, Tensor]


Context = Tensor | TextAndImages


def context_of(condition: Condition) -> Context:
    """Return what the cross-attentions of a network attend to under a condition."""
    return TextAndImages(condition.text, condition.images) if condition.images else condition.text


class AttentionCore(nn.Module):
    """Attention between the projections: a module without parameters, whose output adapters may add to by a hook.

    images: of the condition; only such adapters use them.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        return attend(query, key, value, self.heads)


class Attention(nn.Module):
    """Multi-head attention of (B, L, query_dim) over itself or over a context (B, S, context_dim)."""

    def __init__(self, query_dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.core = AttentionCore(heads)
        context_dim = context_dim or query_dim
        self.to_q = Linear(query_dim, query_dim, bias=bias)
        self.to_k = Linear(context_dim, query_dim, bias=bias)
        self.to_v = Linear(context_dim, query_dim, bias=bias)
        self.to_out = nn.ModuleList([Linear(query_dim, query_dim)])

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        images: Mapping[str, Tensor] = {}
        if isinstance(context, TextAndImages):
            context, images = context
        context = x if context is None else context
        return self.to_out[0](self.core(self.to_q(x), self.to_k(context), self.to_v(context), images))


class PositionAttention(Attention):
    """Residual self-attention over the positions of a feature map (B, C, H, W).

    groups: of the norm before it; None for no norm.
    """

    def __init__(self, channels: int, groups: int | None, eps: float, heads: int = 1):
        super().__init__(channels, heads, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps) if groups else nn.Identity()

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        positions = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        return x + super().forward(positions).transpose(1, 2).reshape(x.shape)


class GEGLU(nn.Module):
    """(B, L, in) -> (B, L, out): one half gated by the GELU of the other (Shazeer 2020)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.proj = Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to 4x the width and back. The dropout keeps the field's parameter names (`net.0`, `net.2`)."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the condition, feed-forward; pre-norm (Rombach et al. 2022, app. E.2.1)."""

    def __init__(self, dim: int, heads: int, context_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (B, C, H, W), under a context (B, S, context_dim).

    The projections in and out are linear layers (SD 2.x, SDXL) or 1x1 convolutions (SD 1.x).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int,
        *,
        depth: int = 1,
        linear_projection: bool = False,
        groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if linear_projection else Conv2d(channels, channels, 1)
        blocks = [TransformerBlock(channels, heads, context_dim, dropout) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Linear(channels, channels) if linear_projection else Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # (B, HW, C)
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2)  # (B, C, H, W)
        if not self.linear_projection:
            h = self.proj_out(h)
        return x + h


def blocks_of(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return the kinds of blocks that the networks inside a model declare: what works on one of them at a time."""
    return tuple({kind: None for each in model.modules() for kind in getattr(type(each), "block_types", ())})


def recompute_activations(model: nn.Module) -> None:
    """Have the blocks of its networks compute their activations again for the backward pass (Chen et al. 2016).

    In place. The memory of a training step falls, its time rises by about a third, its result stays the same.
    """
    kinds = blocks_of(model)
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
