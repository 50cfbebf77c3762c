"""Networks that enlarge pictures: RRDBNet (ESRGAN, Wang et al. 2018; Real-ESRGAN, Wang et al. 2021) and a compact one.

Parameter names are those of Real-ESRGAN's files. Both networks take and give (B, 3, H, W), RGB about in [0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.packed import Conv2d

_LEAK = 0.2  # slope of RRDBNet's activations below zero
_RESIDUAL = 0.2  # how much of what a block adds is added (Wang et al. 2018, sec. 3.1, residual scaling)


@dataclass(frozen=True)
class RRDBConfig:
    """The settings of an RRDBNet; the defaults are those of RealESRGAN_x4plus.

    growth: channels that each convolution of a dense block adds. doublings: how often height and width double at the
    end. unshuffle: the side of the squares of pixels that become channels first, 1 for none.
    """

    channels: int = 64
    growth: int = 32
    blocks: int = 23
    doublings: int = 2
    unshuffle: int = 1


@dataclass(frozen=True)
class CompactConfig:
    """The settings of an SRVGGNetCompact; the defaults are those of realesr-animevideov3.

    convolutions: those between the first and the last.
    """

    channels: int = 64
    convolutions: int = 16
    scale: int = 4


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of which sees all before it: (B, C, H, W) in and out."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        for k in range(1, 5):
            self.add_module(f"conv{k}", Conv2d(channels + (k - 1) * growth, growth, 3, padding=1))
        self.conv5 = Conv2d(channels + 4 * growth, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for k in range(1, 5):
            seen = torch.cat([seen, F.leaky_relu(self.get_submodule(f"conv{k}")(seen), _LEAK)], 1)
        return x + _RESIDUAL * self.conv5(seen)


class RRDB(nn.Module):
    """A residual block of three residual dense blocks: (B, C, H, W) in and out."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.rdb1 = DenseBlock(channels, growth)
        self.rdb2 = DenseBlock(channels, growth)
        self.rdb3 = DenseBlock(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + _RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """ESRGAN's generator, and Real-ESRGAN's, which sees squares of pixels as channels at x2 and x1.

    scale: how many times larger the picture becomes. step: the tiles of a picture start at multiples of it.
    radius: how many pixels away, at most, lies what a pixel is computed from.
    """

    def __init__(self, config: RRDBConfig):
        super().__init__()
        self.config = config
        width = config.channels
        self.scale = 2**config.doublings // config.unshuffle
        self.step = config.unshuffle
        # 15 convolutions a block, two around the body; those at larger sizes reach less than two more together.
        self.radius = (15 * config.blocks + 4) * config.unshuffle
        self.conv_first = Conv2d(3 * config.unshuffle**2, width, 3, padding=1)
        self.body = nn.ModuleList(RRDB(width, config.growth) for _ in range(config.blocks))
        self.conv_body = Conv2d(width, width, 3, padding=1)
        for k in range(1, config.doublings + 1):
            self.add_module(f"conv_up{k}", Conv2d(width, width, 3, padding=1))
        self.conv_hr = Conv2d(width, width, 3, padding=1)
        self.conv_last = Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge (B, 3, H, W) -> (B, 3, scale*H, scale*W).

        Sizes that `step` doesn't divide are filled up for the while.
        """
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.step, 0, -height % self.step), mode="replicate")
        x = self.conv_first(F.pixel_unshuffle(x, self.step))
        h = x
        for block in self.body:
            h = block(h)
        x = x + self.conv_body(h)
        for k in range(1, self.config.doublings + 1):
            conv = self.get_submodule(f"conv_up{k}")
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0)), _LEAK)
        x = self.conv_last(F.leaky_relu(self.conv_hr(x), _LEAK))
        return x[..., : height * self.scale, : width * self.scale]


class SRVGGNetCompact(nn.Module):
    """Real-ESRGAN's small network: a chain of convolutions at the size of the input, then the pixels at once.

    scale, step, radius: see `RRDBNet`.
    """

    step = 1

    def __init__(self, config: CompactConfig):
        super().__init__()
        self.config = config
        self.scale = config.scale
        self.radius = config.convolutions + 2
        layers: list[nn.Module] = []
        before = 3
        for _ in range(config.convolutions + 1):
            layers += [Conv2d(before, config.channels, 3, padding=1), nn.PReLU(config.channels)]
            before = config.channels
        layers.append(Conv2d(before, 3 * config.scale**2, 3, padding=1))
        self.body = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge (B, 3, H, W) -> (B, 3, scale*H, scale*W)."""
        h = x
        for layer in self.body:
            h = layer(h)
        return F.pixel_shuffle(h, self.scale) + F.interpolate(x, scale_factor=float(self.scale))


UpscalingNetwork = RRDBNet | SRVGGNetCompact


def build_upscaler(kind: str, config: dict[str, int]) -> UpscalingNetwork:
    """Build the network of a file, as `ldm.checkpoints.upscalers` found it: of the kind "rrdb" or "compact"."""
    if kind == "rrdb":
        return RRDBNet(RRDBConfig(**config))
    return SRVGGNetCompact(CompactConfig(**config))


# Tiles


def in_tiles(
    network: UpscalingNetwork, picture: Tensor, tile: int, halo: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Run a network over a picture (B, 3, H, W), tile by tile, for memory that doesn't grow with the picture.

    picture: in [0, 1], or uint8; it may lie on another device. tile: pixels along the side of what one run gives; halo:
    pixels around it that the run sees too. With a halo of `network.radius` or more the tiles join to what one run over
    all gives, up to rounding. Yields (top, left, enlarged tile), the places in pixels of the enlarged picture.
    """
    height, width = picture.shape[-2:]
    weight = next(network.parameters())
    tile, halo = (-(-each // network.step) * network.step for each in (tile, halo))
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(top - halo, 0), max(left - halo, 0)
            seen = picture[..., y : top + tile + halo, x : left + tile + halo]
            rows, columns = min(tile, height - top), min(tile, width - left)
            s = network.scale
            seen = seen.to(weight) / 255 if seen.dtype == torch.uint8 else seen.to(weight)
            grown = network(seen)[..., (top - y) * s :, (left - x) * s :]
            yield top * s, left * s, grown[..., : rows * s, : columns * s]
