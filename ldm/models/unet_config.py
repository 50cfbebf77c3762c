"""The settings of a U-Net with cross-attention: diffusers' config, checked, and what it says of each resolution."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ldm.errors import UserError
from ldm.models import diffusers_config
from ldm.models.denoising import extra_channels

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
    "only_cross_attention": (False, [False] * 4, [False] * 3),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
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
    time_cond_proj_dim: features of the guidance scale, for a network that is told it (Meng et al. 2023), 256 in Luo et
        al. 2023; None for one that is not.
    num_class_embeds: classes that it is told beside the text, by a table of so many rows; None for none.
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
    num_class_embeds: int | None = None
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_diffusers(cls, mapping: Mapping[str, Any], where: str = "unet/config.json") -> "UNetConfig":
        """Raises UserError that names a key this network cannot honour."""
        config = diffusers_config.parse(cls, mapping, _INERT, _CLASS, where)
        config.check(where)
        return config

    def check(self, where: str = "the U-Net's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        sizes = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
        more = ("attention_head_dim", "cross_attention_dim", "sample_size", "num_class_embeds", *_ADDED)
        diffusers_config.check_sizes(self, where, *sizes, *more)
        diffusers_config.check_sizes(self, where, "transformer_layers_per_block", least=0)
        diffusers_config.check_sizes(self, where, "time_cond_proj_dim", least=4)  # two frequencies
        diffusers_config.check_layers(self.layers, where)
        diffusers_config.check_finite(self, where, "norm_eps", "dropout")
        if self.norm_eps < 0:
            raise UserError(f"{where}: norm_eps is {self.norm_eps}, where a number of at least 0 is needed")
        if (
            not abs(self.freq_shift) < self.block_out_channels[0] // 2
        ):  # the frequencies are divided by the rest
            raise UserError(f"{where}: freq_shift is {self.freq_shift!r:.60}: it is 0 or 1 in every network")
        diffusers_config.check_groups(self.block_out_channels, self.norm_num_groups, where)
        down = levels(self, self.down_block_types, "Down", where)
        up = levels(self, self.up_block_types, "Up", where)[::-1]
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

    def wants(self, latent_channels: int, sizes: int = 6) -> dict[str, int]:
        """Return the parts of a condition that a network of these settings wants, as DenoisingNetwork says.

        sizes: how many numbers it is told beside the text; the settings only say how wide they and the pooled text are
        together.
        """
        parts = {"hidden": self.cross_attention_dim, **extra_channels(self.in_channels, latent_channels)}
        if self.addition_embed_type:
            told = sizes * (self.addition_time_embed_dim or 0)
            pooled = (self.projection_class_embeddings_input_dim or 0) - told
            parts |= {"pooled": pooled, "time_ids": sizes}
        parts |= {"guidance": 1} if self.time_cond_proj_dim else {}
        return parts | ({"labels": self.num_class_embeds} if self.num_class_embeds else {})

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, _CLASS)


@dataclass(frozen=True)
class Level:
    """One resolution: whether it has attention, with how many heads, and how many transformer blocks deep."""

    attention: bool
    heads: int
    depth: int


def levels(config: UNetConfig, types: tuple[str, ...], way: str, where: str = "the U-Net") -> list[Level]:
    """Return the levels in the order of `types`, diffusers' block names; upwards the lowest resolution is first."""
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
    return [Level(known[t], h, d) for t, h, d in zip(types, heads[order], depths[order], strict=True)]
