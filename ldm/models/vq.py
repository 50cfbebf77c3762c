"""The autoencoder with a codebook (van den Oord et al. 2017; Esser et al. 2021).

Parameter names are those of diffusers' VQModel, so its weights load without a map.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import diffusers_config
from ldm.models.autoencoder import Decoder, Encoder, check_first_stage, embedded
from ldm.models.layers import ResnetBlock

_CLASS = "VQModel"
# `lookup_from_codebook` chooses what diffusers' decode() is given, `force_upcast` is a hint to its pipelines.
_INERT: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
    "lookup_from_codebook": (False, True),
    "force_upcast": (False, True),
}


@dataclass(frozen=True)
class VQConfig:
    """The settings of a VQModel, named as in diffusers' `config.json`; the defaults are VQ-f8's of Rombach et al. 2022.

    num_vq_embeddings: codes in the codebook. vq_embed_dim: a code's width; None is latent_channels.
    scaling_factor: what a diffusion model multiplies latents (not yet quantised) by, for unit variance.
    num_class_embeds: encoder and decoder are conditioned on a label, one of so many; ours, diffusers has none.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 32
    num_vq_embeddings: int = 16384
    vq_embed_dim: int | None = None
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    num_class_embeds: int | None = None

    @classmethod
    def from_diffusers(cls, mapping: Mapping[str, Any], where: str = "vqvae/config.json") -> "VQConfig":
        """Raises UserError that names a key this network cannot honour."""
        config = diffusers_config.parse(cls, mapping, _INERT, _CLASS, where)
        config.check(where)
        return config

    def check(self, where: str = "the autoencoder's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        check_first_stage(self, where)
        diffusers_config.check_sizes(self, where, "num_vq_embeddings", "vq_embed_dim")

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, _CLASS, ours=("num_class_embeds",))

    @property
    def factor(self) -> int:
        """Pixels a latent position covers along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def code_width(self) -> int:
        return self.vq_embed_dim or self.latent_channels


@dataclass(frozen=True)
class Quantized:
    """Latents put to their nearest codes.

    latent: (B, D, h, w), the codes; its gradient goes straight through to what was quantised.
    indices: (B, h, w), each position's code.
    codebook: mean squared distance that pulls the codes to the latents; commitment: the same, pulling the latents to
        the codes (van den Oord et al. 2017, eq. 3, means in place of sums).
    """

    latent: Tensor
    indices: Tensor
    codebook: Tensor
    commitment: Tensor


class VectorQuantizer(nn.Module):
    """Replaces each position's vector by the nearest code."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z, (B, D, h, w). Computed in float32, where near codes can be told apart."""
        with torch.autocast(z.device.type, enabled=False):
            wide, codes = z.float(), self.embedding.weight.float()
            positions = wide.permute(0, 2, 3, 1)  # (B, h, w, D)
            with torch.no_grad():
                nearest = torch.cdist(positions.flatten(0, 2), codes).argmin(1)
            indices = nearest.view(positions.shape[:3])
            chosen = F.embedding(indices, codes).permute(0, 3, 1, 2)  # (B, D, h, w)
            return Quantized(
                latent=(wide + (chosen - wide).detach()).to(z.dtype),
                indices=indices,
                codebook=F.mse_loss(chosen, wide.detach()),
                commitment=F.mse_loss(wide, chosen.detach()),
            )


class VQModel(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to codes at (H/f, W/f) positions, and back."""

    block_types = (ResnetBlock,)

    def __init__(self, config: VQConfig):
        super().__init__()
        config.check()
        self.config = config
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.code_width)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)
        self.decoder = Decoder(config)
        if config.num_class_embeds:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.block_out_channels[-1])

    def forward(self, picture: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """Return the decoding of the picture's codes, and the codes."""
        quantized = self.quantize(self.encode(picture, labels))
        return self.decode(quantized.latent, labels), quantized

    def encode(self, picture: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (B, D, H/f, W/f), not yet quantised, as diffusion models learn them (Rombach et al. 2022, sec. 3.1).

        picture: (B, 3, H, W) in [-1, 1], H and W divisible by the factor; labels: (B,), where it is conditioned.
        """
        return self.quant_conv(self.encoder(picture, embedded(self, labels)))

    def decode(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode a latent (B, D, h, w) of codes: quantise others first. Returns (B, 3, h*f, w*f), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent), embedded(self, labels))


def codebook_use(counts: Tensor) -> dict[str, Tensor]:
    """Return how much of a codebook is used.

    counts: (K,), how often each code was chosen, up to a factor. `perplexity` is the exponential of the choice's
    entropy, K where all are chosen alike, 1 for a single one; `codes_used` the share of codes chosen at all.
    """
    share = counts.float() / counts.sum()
    return {"perplexity": torch.special.entr(share).sum().exp(), "codes_used": (counts > 0).float().mean()}
