"""The autoencoder on pictures that are too large for memory: computed in strips of rows, exact up to rounding.

A convolution needs a few rows above and below (a halo), which are computed again for each strip. A group norm needs the
mean and variance of a whole map, so all strips of what comes before it are computed once for these two numbers, and
once more for what comes after. To keep that from growing layer by layer, the output of each residual block is stored,
in strips that go as soon as the next block has read them: of a picture, one map is in memory, the widest of the
narrowest channels (SD's decoder: 128 numbers a pixel), where computing at once holds several, up to twice as wide.
What lies within a residual block, and enlarged maps, are never stored. Attention has all keys, and queries in slices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import attend
from ldm.models.autoencoder import (
    AutoencoderKL,
    AutoencoderMidBlock,
    DiagonalGaussian,
    Stage,
    embedded,
)
from ldm.models.layers import Downsample, GroupNorm, PositionAttention, ResnetBlock, Upsample

_FEWEST = 8  # rows of a strip: with fewer, halos would be most of the work
_SCORES = 2**26  # of queries with keys, held at once by the attention of backends that hold any


class Map(Protocol):
    """A map (B, channels, height, width) whose rows are computed, or read, when they are asked for.

    channels: also counts what is computed on the way, for the size of strips.
    """

    @property
    def channels(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def rows(self, top: int, end: int) -> Tensor:
        """Return the rows, (B, C, end - top, W)."""
        ...

    def release(self, top: int) -> None:
        """Forget rows above `top`: none will be asked for any more."""
        ...


class Stored:
    """A map in memory, in strips; those that were released are gone."""

    def __init__(self, strips: Sequence[Tensor], device: torch.device):
        self._strips = list(strips)
        self._top, self._device = 0, device
        self.height = sum(each.shape[2] for each in strips)
        self.channels, self.width = strips[0].shape[1], strips[0].shape[3]

    def rows(self, top: int, end: int) -> Tensor:
        found: list[Tensor] = []
        at = self._top
        for strip in self._strips:
            if at < end and at + strip.shape[2] > top:
                found.append(strip[:, :, max(top - at, 0) : end - at].to(self._device))
            at += strip.shape[2]
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def release(self, top: int) -> None:
        while self._strips and self._top + self._strips[0].shape[2] <= top:
            self._top += self._strips.pop(0).shape[2]


@dataclass
class Local:
    """A map that layers make of another, each row of it from rows at most `reach` away.

    The layers fill up with zeros at the ends of what they are given. At the ends of the map that is what they do when
    all is computed at once; elsewhere it makes `reach` rows wrong, which are cut off.
    """

    source: Map
    layers: Callable[[Tensor], Tensor]
    reach: int
    channels: int

    @property
    def height(self) -> int:
        return self.source.height

    @property
    def width(self) -> int:
        return self.source.width

    def rows(self, top: int, end: int) -> Tensor:
        first, last = max(top - self.reach, 0), min(end + self.reach, self.height)
        return self.layers(self.source.rows(first, last))[:, :, top - first : end - first]

    def release(self, top: int) -> None:
        self.source.release(top - self.reach)


class Enlarged:
    """A map at twice its height and width.

    The convolution after the enlargement sees each pixel up to four times: the weights for equal pixels are summed
    first, to a 2x2 kernel for each of the four places in a square, for 4/9 of the work (it is done three times).
    """

    def __init__(self, source: Map, layer: Upsample):
        self.source = source
        self.channels, self.height, self.width = source.channels, 2 * source.height, 2 * source.width
        self._bias = layer.conv.bias
        weight = _wide(layer.conv.weight)
        down = (_halved(weight, 2, late) for late in (0, 1))
        kernels = [[_halved(each, 3, late) for late in (0, 1)] for each in down]
        self._kernels = [[each.to(layer.conv.weight.dtype) for each in row] for row in kernels]

    def rows(self, top: int, end: int) -> Tensor:
        first, last = max(top // 2 - 1, 0), min((end + 1) // 2 + 1, self.source.height)
        seen = F.pad(self.source.rows(first, last), (1, 1, 1, 1))
        height, width = seen.shape[2] - 2, seen.shape[3] - 2
        grown = seen.new_empty(len(seen), self.channels, 2 * height, 2 * width)
        for y in (0, 1):
            for x in (0, 1):
                part = seen[:, :, y : y + height + 1, x : x + width + 1]
                grown[:, :, y::2, x::2] = F.conv2d(part, self._kernels[y][x], self._bias)
        return grown[:, :, top - 2 * first : end - 2 * first]

    def release(self, top: int) -> None:
        self.source.release(top // 2 - 1)


def _halved(weight: Tensor, dim: int, late: int) -> Tensor:
    """Three weights along a dimension as two: the first or (late) the second pixel of a pair sees two pairs."""
    one, two, three = weight.unbind(dim)
    return torch.stack([one + two, three] if late else [one, two + three], dim)


@dataclass
class Reduced:
    """A map at half its height and width. A row is made of three, the last of which may lie below the map."""

    source: Map
    layer: Downsample

    @property
    def channels(self) -> int:
        return 4 * self.source.channels  # what it is made of has four times the positions

    @property
    def height(self) -> int:
        return self.source.height // 2

    @property
    def width(self) -> int:
        return self.source.width // 2

    def rows(self, top: int, end: int) -> Tensor:
        last = min(2 * end + 1, self.source.height)
        # The layer adds a row of zeros below; where rows follow, it makes one row too many, or none.
        return self.layer(self.source.rows(2 * top, last))[:, :, : end - top]

    def release(self, top: int) -> None:
        self.source.release(2 * top)


@dataclass(frozen=True)
class Strips:
    """The way maps are cut. size: numbers of a strip, of one picture."""

    size: int

    def of(self, source: Map) -> Iterator[tuple[int, int]]:
        """Yield (top, end) of each strip of a map."""
        rows = max(self.size // (source.width * source.channels), _FEWEST)
        for top in range(0, source.height, rows):
            yield top, min(top + rows, source.height)

    def each(self, source: Map) -> Iterator[Tensor]:
        """Yield the strips of a map, which is released on the way."""
        for top, end in self.of(source):
            strip = source.rows(top, end)
            source.release(end)
            yield strip

    def stored(self, source: Map, device: torch.device) -> Stored:
        """Compute and store a map, in the place of the one that it is made of."""
        return Stored([_kept(each) for each in self.each(source)], device)


def _kept(strip: Tensor) -> Tensor:
    """A strip on its own, in the CPU's memory, until the next layer reads it."""
    return strip.cpu().contiguous()


# Layers


def _normalization(norm: nn.GroupNorm, source: Map, strips: Strips) -> Callable[[Tensor], Tensor]:
    """The group norm of a whole map as a function of any rows of it.

    Means and variances of strips are put together as in Chan, Golub & LeVeque 1983, eq. 2.1, in float64.
    """
    count = 0
    mean = deviations = torch.zeros(())
    for top, end in strips.of(source):
        values = _wide(source.rows(top, end))
        values = values.reshape(len(values), norm.num_groups, -1)  # (B, G, n)
        variance, own = (each.double() for each in torch.var_mean(values, 2, correction=0))
        n = values.shape[2]
        apart = own - mean
        mean = mean + apart * n / (count + n)
        deviations = deviations + variance * n + apart.square() * count * n / (count + n)
        count += n
    per_channel = norm.num_channels // norm.num_groups
    mean, spread = (
        each.repeat_interleave(per_channel, 1) for each in (mean, (deviations / count + norm.eps).sqrt())
    )
    scale = (norm.weight / spread)[:, :, None, None]  # (B, C, 1, 1)
    shift = norm.bias[:, None, None] - mean[:, :, None, None] * scale

    def normed(x: Tensor) -> Tensor:
        wide = _wide(x)
        return torch.addcmul(shift.to(wide.dtype), wide, scale.to(wide.dtype)).to(x.dtype)

    return normed


def _wide(x: Tensor) -> Tensor:
    """In float32 at the least, in which group norms compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _resnet(block: ResnetBlock, source: Map, label: Tensor | None, strips: Strips) -> Local:
    """A `ResnetBlock` (without scale and shift of AdaGN) over a map."""
    added = None if label is None else block.time_emb_proj(label)[:, :, None, None]
    norm1 = _normalization(block.norm1, source, strips)

    def first(x: Tensor) -> Tensor:
        h = block.conv1(F.silu(norm1(x), inplace=True))
        return h if added is None else h + added

    width = max(source.channels, block.conv1.out_channels)
    norm2 = _normalization(block.norm2, Local(source, first, 1, width), strips)

    def both(x: Tensor) -> Tensor:
        h = block.conv2(F.silu(norm2(first(x)), inplace=True))
        return h.add_(block.conv_shortcut(x) if hasattr(block, "conv_shortcut") else x)

    return Local(source, both, 2, width)


def _attention(layer: PositionAttention, source: Stored, device: torch.device, strips: Strips) -> Stored:
    """`PositionAttention` over a map: keys and values of all positions are held, queries are few at a time."""
    norm = _normalization(cast(GroupNorm, layer.group_norm), source, strips)

    def positions(top: int, end: int) -> Tensor:
        return norm(source.rows(top, end)).flatten(2).transpose(1, 2)  # (B, n, C)

    cuts = list(strips.of(source))
    keys = torch.cat([layer.to_k(positions(*cut)) for cut in cuts], 1)
    values = torch.cat([layer.to_v(positions(*cut)) for cut in cuts], 1)
    few = max(_SCORES // (len(keys) * keys.shape[1]), 1)
    found: list[Tensor] = []
    for top, end in cuts:
        queries = layer.to_q(positions(top, end)).split(few, 1)
        seen = torch.cat([attend(each, keys, values, layer.core.heads) for each in queries], 1)
        x = source.rows(top, end)
        found.append(_kept(x + layer.to_out[0](seen).transpose(1, 2).reshape(x.shape)))
        source.release(end)
    return Stored(found, device)


def _middle(
    block: AutoencoderMidBlock, source: Map, label: Tensor | None, strips: Strips, device: torch.device
) -> Stored:
    before, after = cast(list[ResnetBlock], list(block.resnets))
    x = strips.stored(_resnet(before, source, label, strips), device)
    for attention in cast(list[PositionAttention], list(getattr(block, "attentions", ()))):
        x = _attention(attention, x, device, strips)
    return strips.stored(_resnet(after, x, label, strips), device)


def _stage(stage: Stage, source: Map, label: Tensor | None, strips: Strips, device: torch.device) -> Map:
    for resnet in cast(list[ResnetBlock], list(stage.resnets)):
        source = strips.stored(_resnet(resnet, source, label, strips), device)
    samplers = getattr(stage, stage.sampler_name, None)
    if samplers is None:
        return source
    return (
        Enlarged(source, samplers[0]) if isinstance(samplers[0], Upsample) else Reduced(source, samplers[0])
    )


def _conv(layer: nn.Conv2d, source: Map) -> Local:
    """A 3x3 convolution over a map."""
    return Local(source, layer, 1, max(layer.in_channels, layer.out_channels))


def _ending(norm: nn.GroupNorm, conv: nn.Conv2d, source: Map, strips: Strips) -> Local:
    """The last norm, SiLU and convolution."""
    normed = _normalization(norm, source, strips)
    return Local(source, lambda x: conv(F.silu(normed(x), inplace=True)), 1, conv.in_channels)


# The autoencoder


@torch.no_grad()
def decode_in_strips(
    autoencoder: AutoencoderKL, latent: Tensor, tile: int, labels: Tensor | None = None
) -> Tensor:
    """Return what `autoencoder.decode` gives, without a gradient: (B, 3, h*f, w*f).

    tile: strips have about the pixels of a square of this side. On an accelerator, maps wait in the CPU's memory.
    """
    decoder, label = autoencoder.decoder, embedded(autoencoder, labels)
    strips, device = Strips(tile**2 * min(autoencoder.config.block_out_channels)), latent.device
    if autoencoder.config.use_post_quant_conv:
        latent = autoencoder.post_quant_conv(latent)
    x: Map = _middle(
        decoder.mid_block, _conv(decoder.conv_in, Stored([latent], device)), label, strips, device
    )
    for stage in cast(list[Stage], list(decoder.up_blocks)):
        x = _stage(stage, x, label, strips, device)
    ending = _ending(decoder.conv_norm_out, decoder.conv_out, x, strips)
    return _joined(ending, strips, latent, decoder.conv_out.out_channels)


@torch.no_grad()
def encode_in_strips(
    autoencoder: AutoencoderKL, picture: Tensor, tile: int, labels: Tensor | None = None
) -> DiagonalGaussian:
    """Return what `autoencoder.encode` gives, without a gradient; tile: as for `decode_in_strips`."""
    encoder, label = autoencoder.encoder, embedded(autoencoder, labels)
    strips, device = Strips(tile**2 * min(autoencoder.config.block_out_channels)), picture.device
    x: Map = _conv(encoder.conv_in, Stored([picture], device))
    for stage in cast(list[Stage], list(encoder.down_blocks)):
        x = _stage(stage, x, label, strips, device)
    x = _middle(encoder.mid_block, x, label, strips, device)
    ending = _ending(encoder.conv_norm_out, encoder.conv_out, x, strips)
    return autoencoder.posterior(_joined(ending, strips, picture, encoder.conv_out.out_channels))


def _joined(source: Map, strips: Strips, like: Tensor, channels: int) -> Tensor:
    """A map as one tensor (B, C, H, W), where `like` is."""
    found = like.new_empty(len(like), channels, source.height, source.width)
    at = 0
    for strip in strips.each(source):
        found[:, :, at : at + strip.shape[2]] = strip
        at += strip.shape[2]
    return found
