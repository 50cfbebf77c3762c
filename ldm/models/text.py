"""What the networks of text encoders share: their settings, their output, their table of tokens, their activations.

Names of parameters and settings are those of transformers, which reads what is saved of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The settings of a text network, each with the default that transformers' config of the same `model_type` has.

    use_attention_mask: whether padding is masked; the network itself does as its caller says, diffusers asks here.
    others: settings that change nothing of what is computed, and go on into what is saved.
    """

    model_type: ClassVar[str]

    use_attention_mask: bool = False
    others: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self:
        """Return the config of these settings of a config.json. Raises ValueError for what can't be built."""
        own = {each.name for each in fields(cls)} - {"others"}
        others = {key: each for key, each in settings.items() if key not in own and not key.startswith("_")}
        return cls(**{key: each for key, each in settings.items() if key in own}, others=others)

    def to_dict(self) -> dict[str, Any]:
        """Return what a config.json says of the network."""
        own = asdict(self)
        return own.pop("others") | own | {"model_type": self.model_type}


class TextOutput(NamedTuple):
    """What a text network makes of token ids (N, S).

    last_hidden_state: (N, S, D). pooler_output: (N, D), the text's one vector, where the network has one.
    hidden_states: those of the embedding and of each layer, where they were asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None


class TextNetwork(nn.Module):
    """A network that reads token ids (N, S).

    config_type: of its settings. table: the path of its embedding of tokens. block_types: the modules whose activations
    are recomputed, and whose weights are gathered, one at a time.
    """

    config_type: ClassVar[type[TextConfig]]
    table: ClassVar[str]
    block_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    config: Any  # a `config_type`

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of its tokens."""
        found = self.get_submodule(self.table)
        assert isinstance(found, nn.Embedding)
        return found

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Look tokens up in another table."""
        parent, _, name = self.table.rpartition(".")
        setattr(self.get_submodule(parent), name, value)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its table."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device


def blank_embedding(count: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """Return an embedding whose values are still to be loaded.

    nn.Embedding draws them, and on the meta device, where networks are built, torch takes a second to import what it
    draws them with.
    """
    return nn.Embedding(count, width, padding_idx, _weight=torch.empty(count, width))


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    if width % heads:
        raise ValueError(f"its hidden_size {width} is no multiple of num_attention_heads {heads}")


def seen(mask: Tensor | None, causal: bool = False) -> Tensor | None:
    """Return which keys each query sees: (N, 1, S, S), True where it does; None where `mask` is None.

    mask: (N, S), 1 for what is seen and 0 for padding. causal: no token sees a later one.
    """
    if mask is None:
        return None
    found = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return found.tril() if causal else found


def activation(name: str) -> Activation:
    """Return the activation that transformers calls so. Raises ValueError for another name."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {name!r:.60}, where one of {', '.join(_ACTIVATIONS)} is known")
    return _ACTIVATIONS[name]


def _linear(x: Tensor) -> Tensor:
    return x


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_new(x: Tensor) -> Tensor:
    """By tanh (Hendrycks and Gimpel 2016, sec. 2), in the order of operations that Google's BERT has."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_new,
    "gelu_new": _gelu_new,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
