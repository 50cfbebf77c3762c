"""The autoencoder with KL regularisation (Kingma & Welling 2013; Rombach et al. 2022, sec. 3.1).

Parameter names are those of diffusers' AutoencoderKL, so its weights load without a map.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models import diffusers_config
from ldm.models.layers import Downsample, GroupNorm, PositionAttention, ResnetBlock, Upsample
from ldm.models.packed import Conv2d

_EPS = 1e-6
_CLASS = "AutoencoderKL"
_INERT: dict[str, tuple[Any, ...]] = {"act_fn": ("silu", "swish")}


class FirstStageConfig(Protocol):
    """The settings of encoders and decoders that first stages with KL and with a codebook share."""

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def block_out_channels(self) -> tuple[int, ...]: ...

    @property
    def down_block_types(self) -> tuple[str, ...]: ...

    @property
    def up_block_types(self) -> tuple[str, ...]: ...

    @property
    def layers_per_block(self) -> int: ...

    @property
    def norm_num_groups(self) -> int: ...

    @property
    def scaling_factor(self) -> float: ...

    @property
    def mid_block_add_attention(self) -> bool: ...

    @property
    def num_class_embeds(self) -> int | None: ...


@dataclass(frozen=True)
class AutoencoderConfig:
    """The settings of an autoencoder, named as in diffusers' `vae/config.json`; the defaults are Stable Diffusion's.

    scaling_factor, shift_factor: the U-Net sees (z - shift_factor) * scaling_factor.
    force_upcast: the decoder overflows in float16 and must run in float32 there (SDXL's).
    num_class_embeds: encoder and decoder are conditioned on a label, one of so many; ours, diffusers has none.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    num_class_embeds: int | None = None

    @classmethod
    def from_diffusers(
        cls, mapping: Mapping[str, Any], where: str = "vae/config.json"
    ) -> "AutoencoderConfig":
        """Raises UserError that names a key this network cannot honour."""
        config = diffusers_config.parse(cls, mapping, _INERT, _CLASS, where)
        config.check(where)
        return config

    def check(self, where: str = "the autoencoder's config") -> None:
        """Raise UserError that names a setting of which no network can be built, or that loses every latent."""
        check_first_stage(self, where)
        diffusers_config.check_finite(self, where, "shift_factor", "latents_mean", "latents_std")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise UserError(
                    f"{where}: {name} has {len(values)} values for {self.latent_channels} latent_channels"
                )
        if not all(self.latents_std or (1,)):
            raise UserError(f"{where}: latents_std holds a 0, by which nothing can be divided")

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, _CLASS, ours=("num_class_embeds",))

    @property
    def layers(self) -> int:
        """Residual blocks on the way down: no file has fewer tensors than a network these."""
        return len(self.block_out_channels) * self.layers_per_block

    @property
    def factor(self) -> int:
        """Pixels a latent position covers along each side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A posterior q(z|x): mean and log-variance, both (B, C, h, w); the log-variance is clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return the latent for this unit `noise` of the mean's shape (the reparameterisation trick)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Return the KL divergence from the unit Gaussian, summed over a latent: (B,), in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f) and back."""

    block_types = (ResnetBlock,)

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        config.check()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config, 2 * c)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(2 * c, 2 * c, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(c, c, 1)
        if config.num_class_embeds:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.block_out_channels[-1])

    def forward(
        self, picture: Tensor, noise: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Return what training needs: the decoding of a latent, and the posterior.

        The latent is drawn with `noise` (shaped like it); without, it is the posterior's mean.
        """
        posterior = self.encode(picture, labels)
        latent = posterior.mean if noise is None else posterior.sample(noise)
        return self.decode(latent, labels), posterior

    def encode(self, picture: Tensor, labels: Tensor | None = None) -> DiagonalGaussian:
        """Encode pictures (B, 3, H, W) in [-1, 1], H and W divisible by the factor; labels: (B,), if conditioned."""
        return self.posterior(self.encoder(picture, embedded(self, labels)))

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """Return what the encoder gave, (B, 2C, h, w), as the distribution that it stands for."""
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode a latent (B, C, h, w), unscaled. Returns (B, 3, h*f, w*f), about in [-1, 1], not clamped."""
        if self.config.use_post_quant_conv:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent, embedded(self, labels))

    def scale(self, latent: Tensor) -> Tensor:
        """Return a latent of the autoencoder as the U-Net sees it: about unit variance."""
        mean, std = self._moments(latent)
        return (latent - mean) / std

    def unscale(self, latent: Tensor) -> Tensor:
        """Return the inverse of `scale`."""
        mean, std = self._moments(latent)
        return latent * std + mean

    def _moments(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Per-channel mean and deviation where the config has them (Playground 2.5's way), else the scalars."""
        c = self.config
        if c.latents_mean is None or c.latents_std is None:
            return c.shift_factor or 0.0, 1 / c.scaling_factor
        mean, std = (like.new_tensor(v).view(1, -1, 1, 1) for v in (c.latents_mean, c.latents_std))
        return mean, std / c.scaling_factor


def check_first_stage(config: "FirstStageConfig", where: str) -> None:
    """Raise UserError for sizes that don't go together, and blocks other than one each way for each width."""
    sizes = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block")
    diffusers_config.check_sizes(config, where, *sizes, "norm_num_groups", "sample_size", "num_class_embeds")
    diffusers_config.check_layers(len(config.block_out_channels) * config.layers_per_block, where)
    diffusers_config.check_groups(config.block_out_channels, config.norm_num_groups, where)
    if not (math.isfinite(config.scaling_factor) and config.scaling_factor):
        raise UserError(f"{where}: scaling_factor is {config.scaling_factor}, which would lose every latent")
    levels = len(config.block_out_channels)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if tuple(given := getattr(config, name)) != (kind,) * levels:
            raise UserError(
                f"{where}: the autoencoder of {levels} block_out_channels has {levels} times {kind} for {name}, not "
                f"{', '.join(given) or 'none'}"
            )


def embedded(network: nn.Module, labels: Tensor | None) -> Tensor | None:
    """Return what conditions the residual blocks of a network with a `class_embedding`: (B, D), SiLU-activated.

    labels: (B,) whole numbers. Raises UserError where they are missing, or the network knows none.
    """
    table = getattr(network, "class_embedding", None)
    if table is None and labels is None:
        return None
    if table is None or labels is None:
        raise UserError(
            "this autoencoder is conditioned on labels (num_class_embeds): give each picture its label"
            if labels is None
            else "this autoencoder is not conditioned on labels (num_class_embeds): give none"
        )
    return F.silu(table(labels))


def _label_width(config: "FirstStageConfig") -> int | None:
    return config.block_out_channels[-1] if config.num_class_embeds else None


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, out_channels, H/f, W/f): before `quant_conv`, mean and log-variance or codes to be.

    label: (B, D), None in a network without labels.
    """

    def __init__(self, config: "FirstStageConfig", out_channels: int):
        super().__init__()
        widths, groups, label_width = config.block_out_channels, config.norm_num_groups, _label_width(config)
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (width, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            sampler = Downsample(out, asymmetric=True) if i < len(widths) - 1 else None
            self.down_blocks.append(
                Stage(width, out, config.layers_per_block, groups, "downsamplers", sampler, label_width)
            )
        self.mid_block = AutoencoderMidBlock(widths[-1], groups, config.mid_block_add_attention, label_width)
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x, label)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x, label))))


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, 3, h*f, w*f). label: (B, D), None in a network without labels."""

    def __init__(self, config: "FirstStageConfig"):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        label_width = _label_width(config)
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = AutoencoderMidBlock(widths[0], groups, config.mid_block_add_attention, label_width)
        self.up_blocks = nn.ModuleList()
        for i, (width, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            sampler = Upsample(out) if i < len(widths) - 1 else None
            self.up_blocks.append(
                Stage(width, out, config.layers_per_block + 1, groups, "upsamplers", sampler, label_width)
            )
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.mid_block(self.conv_in(z), label)
        for stage in self.up_blocks:
            x = stage(x, label)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Stage(nn.Module):
    """Residual blocks of one resolution, then a resampling layer, kept under diffusers' name for it."""

    def __init__(
        self,
        width: int,
        out: int,
        layers: int,
        groups: int,
        name: str,
        sampler: nn.Module | None,
        label_width: int | None,
    ):
        super().__init__()
        channels = [(width if j == 0 else out) for j in range(layers)]
        self.resnets = nn.ModuleList(
            ResnetBlock(c, out, time_channels=label_width, groups=groups, eps=_EPS) for c in channels
        )
        self.sampler_name = name
        if sampler is not None:
            self.add_module(name, nn.ModuleList([sampler]))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, label)
        samplers = getattr(self, self.sampler_name, None)
        return x if samplers is None else samplers[0](x)


class AutoencoderMidBlock(nn.Module):
    """Residual block, one-head self-attention over all positions, residual block."""

    def __init__(self, channels: int, groups: int, attention: bool, label_width: int | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, time_channels=label_width, groups=groups, eps=_EPS)
            for _ in range(2)
        )
        if attention:
            self.attentions = nn.ModuleList([PositionAttention(channels, groups, _EPS)])

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, label)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x, label)
