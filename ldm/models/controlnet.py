"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): a second encoder that sees a picture, and steers a U-Net by it.

Parameter names are those of diffusers' ControlNetModel, so its weights load without a map. The blocks are the U-Net's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models import diffusers_config
from ldm.models.denoising import Residuals
from ldm.models.layers import ResnetBlock, TimestepEmbedding, TransformerBlock
from ldm.models.packed import Conv2d
from ldm.models.unet import UNet, UNetMidBlock, down_blocks, embed_time, map_channels, size_embedding
from ldm.models.unet_config import UNetConfig, levels

CLASS = "ControlNetModel"
# Keys of diffusers' config that Stable Diffusion's ControlNets leave at one value (the first; others mean the same).
_INERT: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False, [False] * 4, [False] * 3),
}


@dataclass(frozen=True)
class ControlNetConfig:
    """The settings of a ControlNet, named as in diffusers' `controlnet/config.json`, with diffusers' defaults.

    Those that a U-Net has too mean the same there, see `UNetConfig`. conditioning_channels: of the control picture.
    conditioning_embedding_out_channels: of what the picture goes through; each after the first halves its sides, down
    to the latents'. controlnet_conditioning_channel_order: in which the network was shown a picture's colours.
    global_pool_conditions: the residuals are means over all positions, and steer by the style alone ("shuffle").
    """

    in_channels: int = 4
    conditioning_channels: int = 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] = "UNetMidBlock2DCrossAttn"
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    upcast_attention: bool = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: bool = False

    @classmethod
    def from_diffusers(
        cls, mapping: Mapping[str, Any], where: str = "controlnet/config.json"
    ) -> "ControlNetConfig":
        """Raises UserError that names a key this network cannot honour."""
        config = diffusers_config.parse(cls, mapping, _INERT, CLASS, where)
        config.check(where)
        return config

    @classmethod
    def from_unet(cls, unet: UNetConfig, **own: Any) -> "ControlNetConfig":
        """Return the settings of a ControlNet for this U-Net. own: those that a U-Net doesn't have."""
        return cls(**{name: getattr(unet, name) for name in _SHARED}, **own)

    def check(self, where: str = "the ControlNet's config") -> None:
        """Raise UserError that names a setting of which no network can be built."""
        names = ("conditioning_channels", "conditioning_embedding_out_channels")
        diffusers_config.check_sizes(self, where, *names)
        self.encoder.check(where)

    @property
    def encoder(self) -> UNetConfig:
        """The settings of a U-Net whose way down this network has."""
        up = tuple(each.replace("Down", "Up") for each in reversed(self.down_block_types))
        shared = {name: getattr(self, name) for name in _SHARED}
        return UNetConfig(**shared, out_channels=self.in_channels, up_block_types=up)

    @property
    def layers(self) -> int:
        """As UNetConfig's."""
        return self.encoder.layers + len(self.conditioning_embedding_out_channels)

    @property
    def factor(self) -> int:
        """How many pixels of the control picture, along a side, one position of the latents stands for."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def to_diffusers(self) -> dict[str, Any]:
        return diffusers_config.to_diffusers(self, CLASS)


_SHARED = tuple({each.name for each in fields(ControlNetConfig)} & {each.name for each in fields(UNetConfig)})


_SILU_GAIN = 1.68  # 1 / sqrt(E[silu(z)^2]), z ~ N(0, 1): keeps the size of what goes through


class ConditioningEmbedding(nn.Module):
    """Convolutions from a picture (B, 3, H, W) to the size and channels of the U-Net's first map, (B, C0, h, w).

    They begin so that what differs between pictures keeps its size. PyTorch's own beginning makes it a two-thousandth
    after eight activations, and training has to find it first ("sudden convergence" in the paper).
    """

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, out in pairwise(widths):
            self.blocks.append(Conv2d(width, width, 3, padding=1))
            self.blocks.append(Conv2d(width, out, 3, padding=1, stride=2))
        self.conv_out = _zero(Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1))
        for each in (self.conv_in, *self.blocks):
            assert isinstance(each, nn.Conv2d) and each.bias is not None
            nn.init.normal_(each.weight, std=_SILU_GAIN * each.weight[0].numel() ** -0.5)
            nn.init.zeros_(each.bias)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """The encoder of a U-Net, shown a control picture; a convolution that begins at zero ends each feature map."""

    block_types: ClassVar[tuple[type[nn.Module], ...]] = (ResnetBlock, TransformerBlock)

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        config.check()
        self.config = config
        encoder, widths = config.encoder, config.block_out_channels
        self._encoder = encoder
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.add_embedding = size_embedding(encoder)
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.controlnet_cond_embedding = ConditioningEmbedding(config)
        self.down_blocks = down_blocks(encoder)
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        lowest = levels(encoder, config.down_block_types, "Down")[-1]
        self.mid_block = UNetMidBlock(widths[-1], replace(lowest, attention=attends), encoder)
        self.controlnet_down_blocks = nn.ModuleList(
            _zero(Conv2d(channels, channels, 1)) for channels in map_channels(encoder)
        )
        self.controlnet_mid_block = _zero(Conv2d(widths[-1], widths[-1], 1))

    @classmethod
    def from_unet(cls, unet: UNet, **own: Any) -> "ControlNet":
        """Return a ControlNet that begins as a copy of the U-Net's encoder, and changes nothing of what it draws.

        own: settings that a U-Net doesn't have, such as conditioning_embedding_out_channels. The new network is where
        the U-Net is, in its precision, and trains.
        """
        network = cls(ControlNetConfig.from_unet(unet.config, **own)).to(unet.device, unet.dtype)
        own_weights = network.state_dict()
        copied = {name: each for name, each in unet.state_dict().items() if name in own_weights}
        network.load_state_dict(own_weights | copied)
        return network

    def wants(self, latent_channels: int) -> dict[str, int]:
        """See `DenoisingNetwork`: what it takes of the U-Net's condition."""
        return self._encoder.wants(latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def embed(self, picture: Tensor) -> Tensor:
        """Embed control pictures (B, 3, H, W) in [0, 1], RGB: (B, C0, h, w), the same for all steps."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture.flip(1)
        return self.controlnet_cond_embedding(picture.to(self.device, self.dtype))

    def forward(self, sample: Tensor, timestep: Tensor, condition: Condition, hint: Tensor) -> Residuals:
        """Return what is added to the U-Net's feature maps, at full strength.

        sample, timestep, condition: as the U-Net's own; channels are joined to the sample where this network was made
        for a U-Net that takes them. hint: (B, C0, h, w), of `embed`.
        """
        hidden, more = condition.text, condition.channels
        # (B, 4*C0); each block projects the activated one
        time = F.silu(
            embed_time(
                self._encoder, self.time_embedding, self.add_embedding, sample.dtype, timestep, condition
            )
        )
        if more is not None and self.config.in_channels > sample.shape[1]:
            sample = torch.cat([sample, more], dim=1)
        maps = [self.conv_in(sample) + hint]
        for block in self.down_blocks:
            maps += block(maps[-1], time, hidden)
        mid = self.mid_block(maps[-1], time, hidden)
        down = [end(each) for end, each in zip(self.controlnet_down_blocks, maps, strict=True)]
        found = Residuals(tuple(down), self.controlnet_mid_block(mid))
        if self.config.global_pool_conditions:
            return found.map(lambda _, each: each.mean((2, 3), keepdim=True))
        return found


def check_fit(network: nn.Module, control: ControlNet, latent_channels: int, factor: int, where: str) -> None:
    """Raise UserError unless `control` was made for networks like this one. factor: the autoencoder's."""
    if not isinstance(network, UNet):
        raise UserError(f"{where} is for a U-Net, and this model's network is a {type(network).__name__}")
    own, theirs = control.config, network.config
    told, known = control.wants(latent_channels), network.wants(latent_channels)
    if own.in_channels == latent_channels:  # it is not shown what an inpainting U-Net is
        known.pop("channels", None)
    pairs = {
        "attends to {} features of text": (told.get("hidden"), known.get("hidden")),
        "has block_out_channels {}": (list(own.block_out_channels), list(theirs.block_out_channels)),
        "has layers_per_block {}": (own.layers_per_block, theirs.layers_per_block),
        "takes {} features of a pooled text": (told.get("pooled", "no"), known.get("pooled", "no")),
        "takes {} channels beside the latents'": (told.get("channels", 0), known.get("channels", 0)),
        "has pictures of {} times its latents' sides": (own.factor, factor),
    }
    for what, (here, there) in pairs.items():
        if here != there:
            raise UserError(
                f"{where} is of another family than the model: it {what.format(here)}, the model has {there}"
            )


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
