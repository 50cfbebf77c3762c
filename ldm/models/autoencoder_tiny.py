"""The tiny autoencoder (TAESD, madebyollin): plain convolutions that encode and decode roughly, and fast.

It is distilled from a first stage's autoencoder and has its latents, as the U-Net sees them. Parameter names are those
of diffusers' AutoencoderTiny, so its weights load without a map.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models import diffusers_config
from ldm.models.packed import Conv2d

_CLASS = "AutoencoderTiny"
_INERT: dict[str, tuple[Any, ...]] = {"act_fn": ("relu",), "upsample_fn": ("nearest",)}
_COLOURS = 3
_BOUND = 3.0  # latents are of unit variance: the decoder bends what is further out back to this


@dataclass(frozen=True)
class TinyConfig:
    """The settings of a tiny autoencoder, named as in diffusers' `config.json`; the defaults are TAESD's.

    num_encoder_blocks, num_decoder_blocks: residual blocks of each resolution, in the order in which they are run.
    latent_magnitude, latent_shift: by which others bring latents into [0, 1], to store them in bytes; not used here.
    scaling_factor, shift_factor: the U-Net sees (z - shift_factor) * scaling_factor; TAESD's latents are such already.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64,) * 4
    decoder_block_out_channels: tuple[int, ...] = (64,) * 4
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @classmethod
    def from_diffusers(cls, mapping: Mapping[str, Any], where: str = "config.json") -> "TinyConfig":
        """Raises UserError that names a key this network cannot honour."""
        # diffusers writes this one too, as a copy of decoder_block_out_channels, and overwrites it where it is read
        own = {key: value for key, value in mapping.items() if key != "block_out_channels"}
        config = diffusers_config.parse(cls, own, _INERT, _CLASS, where)
        config.check(where)
        return config

    def check(self, where: str = "the tiny autoencoder's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        sizes = ("in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor")
        diffusers_config.check_sizes(self, where, *sizes)
        for half in ("encoder", "decoder"):
            widths, blocks = f"{half}_block_out_channels", f"num_{half}_blocks"
            diffusers_config.check_sizes(self, where, widths)
            diffusers_config.check_sizes(self, where, blocks, least=0)
            found: tuple[int, ...] = getattr(self, widths)
            diffusers_config.per_level(getattr(self, blocks), len(found), blocks, where)
            if len(set(found)) > 1:
                raise UserError(
                    f"{where}: {widths} is {list(found)}: the tiny {half} has one width throughout"
                )
        diffusers_config.check_layers(self.layers, where)
        numbers = ("latent_magnitude", "latent_shift", "scaling_factor", "shift_factor")
        diffusers_config.check_finite(self, where, *numbers)
        if not self.scaling_factor:
            raise UserError(f"{where}: scaling_factor is 0, which would lose every latent")

    def check_fits(self, channels: int, factor: int, where: str) -> None:
        """Raise UserError where it decodes other latents than those of so many channels and pixels a side."""
        for what, own, wanted in (
            ("latent channels", self.latent_channels, channels),
            ("pixels a side for each latent", self.factor, factor),
        ):
            if own != wanted:
                raise UserError(
                    f"{where} has {own} {what}, the model's autoencoder {wanted}: it is of another model"
                )
        if self.out_channels != _COLOURS:
            raise UserError(f"{where} gives {self.out_channels} channels, where pictures have {_COLOURS}")

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, _CLASS)

    @property
    def layers(self) -> int:
        """Residual blocks: no file has fewer tensors than a network these."""
        return sum(self.num_encoder_blocks) + sum(self.num_decoder_blocks)

    @property
    def factor(self) -> int:
        """Pixels a latent position is decoded to along each side: 8 for TAESD."""
        return self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)


class TinyBlock(nn.Module):
    """Three 3x3 convolutions and a skip: (B, C, H, W) in and out."""

    def __init__(self, width: int):
        super().__init__()
        convolutions = [Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class AutoencoderTiny(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f), and back."""

    block_types = (TinyBlock,)

    def __init__(self, config: TinyConfig):
        super().__init__()
        config.check()
        self.config = config
        self.encoder = EncoderTiny(config)
        self.decoder = DecoderTiny(config)

    def forward(self, picture: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return what distillation needs: the decoding of a latent, and the latent of a picture, each by itself."""
        return self.decode(latent), self.encode(picture)

    def encode(self, picture: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f), unscaled."""
        return self.encoder(picture)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents (B, C, h, w), unscaled. Returns (B, 3, h*f, w*f), about in [-1, 1], not clamped."""
        return self.decoder(latent)

    def scale(self, latent: Tensor) -> Tensor:
        """Return a latent of this autoencoder as the U-Net sees it: the same, where the config is TAESD's."""
        return (latent - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, latent: Tensor) -> Tensor:
        """Return the inverse of `scale`."""
        return latent / self.config.scaling_factor + self.config.shift_factor


class EncoderTiny(nn.Module):
    """(B, 3, H, W) -> (B, C, H/f, W/f). Each resolution after the first begins with a strided convolution."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        width = config.encoder_block_out_channels[0]
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level:
                layers.append(Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            else:
                layers.append(Conv2d(config.in_channels, width, 3, padding=1))
            layers += [TinyBlock(width) for _ in range(blocks)]
        layers.append(Conv2d(width, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, picture: Tensor) -> Tensor:
        return self.layers((picture + 1) / 2)


class DecoderTiny(nn.Module):
    """(B, C, h, w) -> (B, 3, h*f, w*f). Each resolution but the last ends by being enlarged."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        width = config.decoder_block_out_channels[0]
        layers: list[nn.Module] = [Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.num_decoder_blocks, start=1):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if level < len(config.num_decoder_blocks):
                layers.append(nn.Upsample(scale_factor=config.upsampling_scaling_factor))
                layers.append(Conv2d(width, width, 3, padding=1, bias=False))
            else:
                layers.append(Conv2d(width, config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        bounded = torch.tanh(latent / _BOUND) * _BOUND
        return self.layers(bounded) * 2 - 1
