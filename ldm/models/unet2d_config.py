"""The settings of a U-Net without text: diffusers' config of a UNet2DModel, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ldm.errors import UserError
from ldm.models import diffusers_config
from ldm.models.denoising import extra_channels

_CLASS = "UNet2DModel"
# Keys of diffusers' config that are built with one value (the first; others mean the same).
_INERT: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "mid_block_scale_factor": (1,),
    "num_train_timesteps": (None,),
}


@dataclass(frozen=True)
class LevelConfig:
    """What stands at a level: attention after each residual block; a residual block where the sides change."""

    attends: bool
    resizes_in_resnets: bool


@dataclass(frozen=True)
class UNet2DConfig:
    """The settings of a U-Net, named as in diffusers' `unet/config.json` of a UNet2DModel, with its defaults.

    attention_head_dim: the WIDTH of a head (in UNet2DConditionModel it is their number); None for one head.
    time_embedding_type: "positional" for sinusoidal features of timesteps; "fourier" for random features of the
    logarithm of sigma, by which the output is divided (Song et al. 2021, NCSN++).
    downsample_type, upsample_type: of levels with attention, "conv" or "resnet"; levels without have their own name
    for the latter, ResnetDownsampleBlock2D.
    downsample_padding: 1, or 0 for a padding at the right and below only, as in DDPM's own networks.
    attn_norm_num_groups: of the norm before the middle block's attention; None for norm_num_groups, or for no norm
    where resnet_time_scale_shift is "scale_shift".
    num_class_embeds: rows of the table of labels. Whoever trains with label dropout has one row more than classes,
    and the last is the null class, as in DiT (Peebles & Xie 2023) and in classifier-free guidance over labels.
    """

    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    num_class_embeds: int | None = None

    @classmethod
    def from_diffusers(cls, mapping: Mapping[str, Any], where: str = "unet/config.json") -> "UNet2DConfig":
        """Raises UserError that names a key this network cannot honour."""
        config = diffusers_config.parse(cls, mapping, _INERT, _CLASS, where)
        config.check(where)
        return config

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, _CLASS)

    def check(self, where: str = "the U-Net's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        sizes = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
        more = ("attention_head_dim", "attn_norm_num_groups", "num_class_embeds", "sample_size")
        diffusers_config.check_sizes(self, where, *sizes, *more, "time_embedding_dim")
        diffusers_config.check_layers(self.layers, where)
        diffusers_config.check_finite(self, where, "norm_eps", "dropout")
        if self.norm_eps < 0:
            raise UserError(f"{where}: norm_eps is {self.norm_eps}, where a number of at least 0 is needed")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{where}: dropout is {self.dropout}, where a share of less than 1 is meant")
        # the frequencies are divided by the rest
        if not abs(self.freq_shift) < max(self.block_out_channels[0] // 2, 1):
            raise UserError(f"{where}: freq_shift is {self.freq_shift!r:.60}: it is 0 or 1 in every network")
        diffusers_config.check_groups(self.block_out_channels, self.norm_num_groups, where)
        if self.mid_groups and self.block_out_channels[-1] % self.mid_groups:
            raise UserError(
                f"{where}: attn_norm_num_groups {self.mid_groups} does not divide the block_out_channels "
                f"{self.block_out_channels[-1]}"
            )
        attended = [False] * (len(self.block_out_channels) - 1)
        attended += [self.mid_block_type is not None and self.add_attention]
        ways = self.levels("Down", where), self.levels("Up", where)[::-1]
        for width, down, up, mid in zip(self.block_out_channels, *ways, attended, strict=True):
            if (down.attends or up.attends or mid) and width % (self.attention_head_dim or width):
                raise UserError(
                    f"{where}: attention_head_dim {self.attention_head_dim} (the width of a head) does not divide "
                    f"the block_out_channels {width}"
                )

    def levels(self, way: Literal["Down", "Up"], where: str = "the U-Net's config") -> list[LevelConfig]:
        """Return what each level has, in the order of the block types' names."""
        types: tuple[str, ...] = getattr(self, f"{way.lower()}_block_types")
        resnets = (self.downsample_type if way == "Down" else self.upsample_type) == "resnet"
        known = {
            f"{way}Block2D": LevelConfig(False, False),
            f"Attn{way}Block2D": LevelConfig(True, resnets),
            f"Resnet{way}sampleBlock2D": LevelConfig(False, True),
        }
        if len(types) != len(self.block_out_channels):
            raise UserError(
                f"{where}: {way.lower()}_block_types has {len(types)} names for a U-Net of "
                f"{len(self.block_out_channels)} levels"
            )
        if unknown := [name for name in types if name not in known]:
            raise UserError(
                f"{where}: block type {unknown[0]!r:.60} is not supported (supported: {', '.join(known)})"
            )
        return [known[name] for name in types]

    @property
    def layers(self) -> int:
        """Residual blocks on the way down: no file has fewer tensors than a network these."""
        return len(self.block_out_channels) * self.layers_per_block

    @property
    def time_channels(self) -> int:
        """The width of the embedding that residual blocks are told timestep and label by."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def mid_groups(self) -> int | None:
        """Groups of the norm before the middle block's attention; None for no norm."""
        own = self.norm_num_groups if self.resnet_time_scale_shift == "default" else None
        return self.attn_norm_num_groups or own

    def wants(self, latent_channels: int) -> dict[str, int]:
        """Return the parts of a condition that a network of these settings wants, as DenoisingNetwork says.

        Of labels it is told how many rows the table has.
        """
        labels = {"labels": self.num_class_embeds} if self.num_class_embeds else {}
        return labels | extra_channels(self.in_channels, latent_channels)
