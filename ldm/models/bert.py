"""BERT (Devlin et al. 2018): a transformer that sees the whole text, with its norms after each part.

Shapes: N texts of S tokens, D features.
"""

from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True, kw_only=True)
class BertConfig(TextConfig):
    """The settings of BERT."""

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)


class BertModel(TextNetwork):
    """BERT without a head."""

    config_type = BertConfig
    table = "embeddings.word_embeddings"

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> TextOutput:
        """Read token ids (N, S), with the mask (N, S) that is 0 for padding, and types of tokens (N, S), else all 0.

        return_dict: the output has names anyway. Raises ValueError for more tokens than there are positions.
        """
        states = [self.embeddings(input_ids, token_type_ids)]
        mask = seen(attention_mask)
        for layer in self.encoder.layer:
            states = [*(states if output_hidden_states else ()), layer(states[-1], mask)]
        return TextOutput(
            states[-1], self.pooler(states[-1]), tuple(states) if output_hidden_states else None
        )


class BertEmbeddings(nn.Module):
    """Tokens, their types and their places."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = blank_embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = blank_embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = blank_embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        """Embed ids (N, S) -> (N, S, D)."""
        length, most = ids.shape[1], self.position_embeddings.num_embeddings
        if length > most:
            raise ValueError(f"{length} tokens are more than the {most} that this text encoder reads")
        x = self.word_embeddings(ids) + self.token_type_embeddings(
            torch.zeros_like(ids) if types is None else types
        )
        x = x + self.position_embeddings(torch.arange(length, device=ids.device))
        return self.dropout(self.LayerNorm(x))


class BertEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertLayer(nn.Module):
    """Attention and an MLP, each around a shortcut and before a norm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (N, S, D) to the same shape, under `seen`'s mask."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class BertAttention(nn.Module):
    """Self-attention, around a shortcut and before a norm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (N, S, D) to the same shape."""
        return self.output(self.self(x, mask), x)


class BertSelfAttention(nn.Module):
    """Self-attention of several heads, without the projection after it."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (N, S, D) to the same shape."""
        dropped = self.dropout if self.training else 0.0
        return attend(self.query(x), self.key(x), self.value(x), self.heads, mask, dropout=dropped)


class BertIntermediate(nn.Module):
    """The first layer of the MLP, with its activation."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, D) to (N, S, intermediate_size)."""
        return self.activation(self.dense(x))


class BertOutput(nn.Module):
    """The last layer of a part, its shortcut and its norm."""

    def __init__(self, width: int, config: BertConfig):
        super().__init__()
        self.dense = Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Map (N, S, width) to (N, S, D)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + shortcut)


class BertPooler(nn.Module):
    """The text's one vector, of its first token."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, D) to (N, D)."""
        return torch.tanh(self.dense(x[:, 0]))


BertModel.block_types = (BertLayer,)
