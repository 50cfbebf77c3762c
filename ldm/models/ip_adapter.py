"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): pictures as prompts, beside the text's.

A projection makes tokens of what an image encoder says of a picture. Each cross-attention of the network attends to
them too, with keys and values of their own ("decoupled cross-attention", eq. 5), and adds what it finds to what it
found in the text. As in `ldm.models.lora` the network keeps its parameters: these layers are forward hooks. Parameter
names of the projections are diffusers'.
"""

from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.errors import UserError
from ldm.models.attention import attend
from ldm.models.denoising import DenoisingNetwork
from ldm.models.layers import AttentionCore, TransformerBlock

Kind = Literal["base", "plus", "full"]
HEAD = 64  # channels a head of the resampler, in all published ones
_KEYS = count(1)


@dataclass(frozen=True)
class IPAdapterConfig:
    """The settings of an adapter, as its tensors show them.

    kind: "base" takes the encoder's one vector of a picture, (P,); "plus" and "full" the states before its last layer,
    (L, C), which "plus" resamples and "full" projects one by one. features: P or C. context_dim: of its tokens, and of
    the network's text. tokens: that a picture becomes; 0 for "full", where the encoder has so many states. widths: of
    the cross-attentions. hidden, inner, ff, depth: the resampler's width, that of its heads together, that of its
    feed-forward, and its layers.
    """

    kind: Kind
    features: int
    context_dim: int
    tokens: int
    widths: tuple[int, ...]
    hidden: int = 0
    inner: int = 0
    ff: int = 0
    depth: int = 0


class ImageProjection(nn.Module):
    """One vector (N, P) to T tokens (N, T, D): a linear layer and a norm (Ye et al. 2023, sec. 3.2.1)."""

    def __init__(self, features: int, context_dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.image_embeds = nn.Linear(features, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.image_embeds(x).unflatten(-1, (self.tokens, -1)))


class GELUProjection(nn.Module):
    """A linear layer and GELU."""

    def __init__(self, width: int, out: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(width, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class GELUFeedForward(nn.Module):
    """GELU's projection and a linear layer; the numbers in `net` are the field's, of which 1 is a dropout."""

    def __init__(self, width: int, inner: int, out: int, bias: bool):
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(width, inner, bias), nn.Identity(), nn.Linear(inner, out, bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class FullProjection(nn.Module):
    """Each of the encoder's states (N, L, C) to a token (N, L, D): the "full face" adapter's."""

    def __init__(self, features: int, context_dim: int):
        super().__init__()
        self.ff = GELUFeedForward(features, features, context_dim, bias=True)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.ff(x))


class ResamplerAttention(nn.Module):
    """Attention of latents (N, T, hidden) to features (N, S, hidden); no biases."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.heads = inner // HEAD
        self.to_q, self.to_k, self.to_v = (nn.Linear(hidden, inner, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, hidden, bias=False)])

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        return self.to_out[0](
            attend(self.to_q(latents), self.to_k(features), self.to_v(features), self.heads)
        )


class ResamplerLayer(nn.Module):
    """Latents attend to the features and to themselves at once, then a feed-forward (Alayrac et al. 2022, Flamingo)."""

    def __init__(self, hidden: int, inner: int, ff: int):
        super().__init__()
        self.ln0, self.ln1 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = ResamplerAttention(hidden, inner)
        self.ff = nn.Sequential(nn.LayerNorm(hidden), GELUFeedForward(hidden, ff, hidden, bias=False))

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        normed = self.ln1(latents)
        latents = self.attn(normed, torch.cat([self.ln0(x), normed], dim=1)) + latents
        return self.ff(latents) + latents


class Resampler(nn.Module):
    """The encoder's states (N, L, C) to T tokens (N, T, D): the Plus adapter's perceiver resampler."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, config.tokens, config.hidden) / config.hidden**0.5)
        self.proj_in = nn.Linear(config.features, config.hidden)
        self.proj_out = nn.Linear(config.hidden, config.context_dim)
        self.norm_out = nn.LayerNorm(config.context_dim)
        layers = [ResamplerLayer(config.hidden, config.inner, config.ff) for _ in range(config.depth)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


class DecoupledAttention(nn.Module):
    """Adds the attention to a picture's tokens to that of the text, as the forward hook of an AttentionCore."""

    def __init__(self, key: str, context_dim: int, width: int):
        super().__init__()
        self.key = key
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)

    def forward(self, core: AttentionCore, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output (B, L, width) of `core` and, scaled, that for this adapter's tokens, if it has any."""
        query, _, _, images = inputs
        tokens = images.get(f"{self.key}.tokens")
        if tokens is None:
            return output
        found = attend(query, self.to_k_ip(tokens), self.to_v_ip(tokens), core.heads)
        return (output + images[f"{self.key}.scale"].view(-1, 1, 1) * found).to(output.dtype)


class IPAdapter(nn.Module):
    """One adapter over one network. It is attached as soon as it is made, and idle where a condition has no tokens.

    Attributes:
        config: what it is.
        key: by which it finds its tokens in a condition's images.
        image_proj: pictures' features to tokens.
    """

    def __init__(self, network: DenoisingNetwork, config: IPAdapterConfig):
        """Make an adapter of random weights. Raises UserError where it isn't one for this network."""
        super().__init__()
        bases = cross_attentions(network)
        check_fit(network, config, "the IP-Adapter")
        self.config, self.key = config, f"ip-adapter-{next(_KEYS)}"
        self.image_proj = _projection(config)
        layers = [DecoupledAttention(self.key, config.context_dim, width) for width in config.widths]
        self._cores = [each.attn2.core for each in bases.values()]  # a list of modules is no part of this one
        # A dot has its own meaning in the names of modules.
        self.layers = nn.ModuleDict(
            {path.replace(".", "/"): layer for path, layer in zip(bases, layers, strict=True)}
        )
        self._handles: list[RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """Let the network's cross-attentions see this adapter's tokens from now on."""
        self.detach()
        for core, layer in zip(self._cores, self.layers.values(), strict=True):
            self._handles.append(core.register_forward_hook(layer))

    def detach(self) -> None:
        """Leave the network as it was without this adapter."""
        while self._handles:
            self._handles.pop().remove()

    def is_attached_to(self, network: nn.Module) -> bool:
        """Return whether the network, and no copy or other one, sees its tokens."""
        return bool(self._handles) and any(each is self._cores[0] for each in network.modules())

    def tokens(self, features: Tensor) -> Tensor:
        """Make the tokens (R, n * T, D) of n pictures for each of R rows, which are attended to together.

        features: (R, n, P) or (R, n, L, C), as the kind has it.
        """
        rows, pictures = features.shape[:2]
        weight = next(self.parameters())
        made = self.image_proj(features.flatten(0, 1).to(weight))  # (R * n, T, D)
        return made.reshape(rows, pictures * made.shape[1], -1)


def cross_attentions(network: nn.Module) -> dict[str, TransformerBlock]:
    """Return the transformer blocks that attend to the text, by path, in the published order: down, up, middle."""
    found = {path: each for path, each in network.named_modules() if isinstance(each, TransformerBlock)}
    return dict(sorted(found.items(), key=lambda pair: pair[0].startswith("mid_block")))


def check_fit(network: nn.Module, config: IPAdapterConfig, where: object) -> None:
    """Raise UserError unless this is an adapter for this network's family."""
    blocks = list(cross_attentions(network).values())
    if not blocks:
        raise UserError(f"a {type(network).__name__} has no cross-attentions that an IP-Adapter could join")
    widths = tuple(each.attn2.to_q.out_features for each in blocks)
    context = blocks[0].attn2.to_k.in_features
    if (config.context_dim, config.widths) != (context, widths):
        raise UserError(
            f"{where} is for a network of another family: it joins {len(config.widths)} cross-attentions to "
            f"{config.context_dim} features, where this one has {len(widths)} to {context}"
            + (
                ""
                if len(widths) != len(config.widths) or config.context_dim != context
                else " of other widths"
            )
        )


def _projection(config: IPAdapterConfig) -> nn.Module:
    if config.kind == "base":
        return ImageProjection(config.features, config.context_dim, config.tokens)
    return Resampler(config) if config.kind == "plus" else FullProjection(config.features, config.context_dim)
