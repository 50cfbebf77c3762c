"""A small CLIP over latents, clean or noised (Radford et al. 2021; noised as GLIDE's, Nichol et al. 2022, sec. 2.4).

Two towers lead into one space, in which the cosine of a picture's vector and a text's says how well they go together.
The picture's tower is half a U-Net under attention pooling, told of the noise level; the text's reads the hidden states
of a frozen text encoder.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import from_dict
from ldm.errors import UserError
from ldm.models.diffusers_config import check_sizes
from ldm.models.layers import Attention, Downsample, GroupNorm, ResnetBlock, TimestepEmbedding
from ldm.models.layers import sinusoidal_embedding as sinusoidal
from ldm.models.packed import Conv2d, Linear

CLASS = "LatentCLIPModel"
_MOST_SCALE = math.log(100)  # Radford et al. 2021, sec. 2.5


@dataclass(frozen=True)
class CLIPConfig:
    """The settings of `CLIP`, as its `config.json` has them.

    in_channels, sample_size: of the latents. text_hidden_size: of the frozen text encoder's states.
    block_out_channels, layers_per_block, norm_num_groups: of the picture's tower; each level but the first halves the
    sides. text_width: inside the text's tower. heads: of both attention poolings. projection_dim: D, of the common
    space. autoencoder, text_encoder: how those that it was trained over are known again, see `ldm.conditioning.clip`.
    """

    in_channels: int = 4
    sample_size: int = 64
    text_hidden_size: int = 768
    block_out_channels: tuple[int, ...] = (64, 128, 256)
    layers_per_block: int = 2
    norm_num_groups: int = 16
    text_width: int = 256
    heads: int = 4
    projection_dim: int = 256
    dropout: float = 0.0
    autoencoder: tuple[float, ...] = ()
    text_encoder: tuple[float, ...] = ()

    @classmethod
    def read(cls, mapping: Mapping[str, Any], where: str) -> "CLIPConfig":
        """Raises UserError for another network's config."""
        if mapping.get("architectures") != [CLASS]:
            raise UserError(f"{where}: architectures is {mapping.get('architectures')!r:.60}, and no {CLASS}")
        config = from_dict(cls, {k: v for k, v in mapping.items() if k != "architectures"}, where)
        config.check(where)
        return config

    def write(self) -> dict[str, Any]:
        """Return the `config.json`."""
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"architectures": [CLASS], **listed}

    def check(self, where: str) -> None:
        """Raise UserError for sizes of which no network can be built."""
        sizes = ("in_channels", "sample_size", "text_hidden_size", "block_out_channels", "layers_per_block")
        check_sizes(self, where, *sizes, "norm_num_groups", "text_width", "heads", "projection_dim")
        if odd := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            raise UserError(
                f"{where}: block_out_channels {odd[0]} is no multiple of norm_num_groups {self.norm_num_groups}"
            )
        for name, width in (
            ("text_width", self.text_width),
            ("block_out_channels", self.block_out_channels[-1]),
        ):
            if width % self.heads:
                raise UserError(f"{where}: {name} {width} is no multiple of heads {self.heads}")
        if self.sample_size % 2 ** (len(self.block_out_channels) - 1):
            raise UserError(f"{where}: sample_size {self.sample_size} can't be halved at every level")


class CLIP(nn.Module):
    """Features of latents (B, C, h, w) at any noise level, and of texts, in one space of D dimensions."""

    block_types = (ResnetBlock,)

    def __init__(self, config: CLIPConfig):
        super().__init__()
        config.check("the CLIP's config")
        self.config = config
        self.image_model = ImageTower(config)
        self.text_model = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image_features(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return (B, D), unnormalised, of `x` = x0 + sigma * noise; sigma: (B,), 0 for clean latents."""
        return self.image_model(x, sigma)

    def text_features(self, hidden: Tensor) -> Tensor:
        """Return (B, D), unnormalised, of the text encoder's states (B, L, text_hidden_size)."""
        return self.text_model(hidden)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by to become logits: 1 / temperature, learned, at most 100."""
        return self.logit_scale.clamp(max=_MOST_SCALE).exp()

    def forward(self, x: Tensor, sigma: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits (B, B) of every picture (a row) with every text (a column)."""
        image, text = self.image_features(x, sigma), self.text_features(hidden)
        return self.scale * cosines(image, text)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each of `a` (N, D) with each of `b` (M, D): (N, M), in float32 under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


class ImageTower(nn.Module):
    """Half a U-Net: residual blocks under the noise level, halvings, then attention pooling (Radford et al., sec. 2.4).

    The noise level is told as an angle, arctan(sigma) in [0, pi/2], and the latents are seen at unit variance: levels
    of any schedule, clean latents (0) and pure noise among them, are of one kind.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.resnets, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            for number in range(config.layers_per_block):
                self.resnets.append(
                    ResnetBlock(
                        before if number == 0 else width,
                        width,
                        time_channels=4 * widths[0],
                        groups=groups,
                        dropout=config.dropout,
                        scale_shift=True,
                    )
                )
            self.downsamplers.append(nn.Identity() if level == len(widths) - 1 else Downsample(width))
        self.layers_per_block = config.layers_per_block
        self.norm = GroupNorm(groups, widths[-1])
        side = config.sample_size // 2 ** (len(widths) - 1)
        self.position = nn.Parameter(torch.randn(1, widths[-1], side, side) * widths[-1] ** -0.5)
        self.pool = Attention(widths[-1], config.heads, bias=True)
        self.visual_projection = Linear(widths[-1], config.projection_dim, bias=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `CLIP.image_features`."""
        level = sigma.to(x.dtype)[:, None, None, None]
        angle = sigma.float().atan() * (1000 / (math.pi / 2))  # (B,), of the size that timesteps have
        time = F.silu(self.time_embedding(sinusoidal(angle, self.conv_in.out_channels).to(x.dtype)))
        h = self.conv_in(x / (1 + level**2).sqrt())  # (B, C0, h, w)
        for number, resnet in enumerate(self.resnets):
            h = resnet(h, time)
            if number % self.layers_per_block == self.layers_per_block - 1:
                h = self.downsamplers[number // self.layers_per_block](h)
        h = F.silu(self.norm(h))
        h = h + _resized(self.position, h)
        tokens = h.flatten(2).transpose(1, 2)  # (B, h*w, C)
        mean = tokens.mean(1, keepdim=True)  # what asks
        return self.visual_projection((mean + self.pool(mean, tokens))[:, 0])


class TextTower(nn.Module):
    """A layer for each token, then attention pooling by a learned query, over the states of a frozen text encoder."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.text_width
        self.norm_in = nn.LayerNorm(config.text_hidden_size)
        self.proj_in = Linear(config.text_hidden_size, width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.pool = Attention(width, config.heads, bias=True)
        self.norm_out = nn.LayerNorm(width)
        self.text_projection = Linear(width, config.projection_dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """See `CLIP.text_features`."""
        tokens = F.gelu(self.proj_in(self.norm_in(hidden)))  # (B, L, width)
        pooled = self.pool(self.query.expand(len(tokens), -1, -1).to(tokens.dtype), tokens)
        return self.text_projection(F.gelu(self.norm_out(pooled[:, 0])))


def _resized(position: Tensor, like: Tensor) -> Tensor:
    """The table of positions (1, C, s, s) for a map of other sides."""
    if position.shape[2:] == like.shape[2:]:
        return position
    return F.interpolate(position, size=like.shape[2:], mode="bicubic", align_corners=False)
