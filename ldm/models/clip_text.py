"""CLIP's text tower (Radford et al. 2021, sec. 2.4): a causal transformer with its norms before each part.

Shapes: N texts of S tokens, D features.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.attention import attend
from ldm.models.packed import Linear
from ldm.models.text import (
    TextConfig,
    TextNetwork,
    TextOutput,
    activation,
    blank_embedding,
    check_heads,
    seen,
)

_HIGHEST = 2


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(TextConfig):
    """The settings of CLIP's text tower.

    eos_token_id: the token that stands for the whole text, where it stands first; 2, in the configs that were published
    with a wrong one, means the token of the highest id.
    """

    model_type: ClassVar[str] = "clip_text_model"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        if not isinstance(self.eos_token_id, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"its eos_token_id is {self.eos_token_id!r:.60}, where one token is needed")


class ProjectedOutput(NamedTuple):
    """What CLIPTextModelWithProjection makes of token ids.

    text_embeds: (N, P), the texts' vectors in the space that texts and pictures share. Others: as of `TextOutput`.
    """

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


class CLIPTextModel(TextNetwork):
    """CLIP's text tower."""

    config_type = CLIPTextConfig
    table = "text_model.embeddings.token_embedding"

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> TextOutput:
        """Read token ids (N, S), with the mask (N, S) that is 0 for padding. return_dict: the output has names anyway.

        Raises ValueError for more tokens than there are positions.
        """
        return self.text_model(input_ids, attention_mask, output_hidden_states)


class CLIPTextModelWithProjection(TextNetwork):
    """CLIP's text tower, and its way into the space that texts and pictures share."""

    config_type = CLIPTextConfig
    table = "text_model.embeddings.token_embedding"

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> ProjectedOutput:
        """Read token ids (N, S), as `CLIPTextModel.forward` does."""
        output = self.text_model(input_ids, attention_mask, output_hidden_states)
        embeds = self.text_projection(output.pooler_output)  # (N, P)
        return ProjectedOutput(embeds, output.last_hidden_state, output.hidden_states)


class CLIPTextTransformer(nn.Module):
    """The tower: embeddings, layers, and a norm after the last."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor | None, keep: bool) -> TextOutput:
        """Read token ids (N, S) under a mask (N, S). keep: give the hidden states."""
        states = self.encoder(self.embeddings(ids), seen(mask, causal=True), keep)
        last = self.final_layer_norm(states[-1])  # (N, S, D)
        where = ids if self.eos_token_id == _HIGHEST else (ids == self.eos_token_id).int()
        pooled = last[torch.arange(len(ids), device=last.device), where.argmax(dim=-1).to(last.device)]
        return TextOutput(last, pooled, tuple(states) if keep else None)


class CLIPTextEmbeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = blank_embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = blank_embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids (N, S) -> (N, S, D)."""
        length, most = ids.shape[1], self.position_embedding.num_embeddings
        if length > most:
            raise ValueError(f"{length} tokens are more than the {most} that this text encoder reads")
        return self.token_embedding(ids) + self.position_embedding(torch.arange(length, device=ids.device))


class CLIPEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None, keep: bool) -> list[Tensor]:
        """Map (N, S, D) to what the last layer makes of it; keep: the input and each layer's output before it."""
        states = [x]
        for layer in self.layers:
            states = [*(states if keep else ()), layer(states[-1], mask)]
        return states


class CLIPEncoderLayer(nn.Module):
    """Attention and an MLP, each after a norm and around a shortcut."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (N, S, D) to the same shape, under `seen`'s mask; None: no token sees a later one."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (N, S, D) to the same shape."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        dropped = self.dropout if self.training else 0.0
        return self.out_proj(attend(q, k, v, self.heads, mask, causal=mask is None, dropout=dropped))


class CLIPMLP(nn.Module):
    """Two layers and the activation between them."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.activation = activation(config.hidden_act)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, D) to the same shape."""
        return self.fc2(self.activation(self.fc1(x)))


CLIPTextModel.block_types = CLIPTextModelWithProjection.block_types = (CLIPEncoderLayer,)
