"""LoRA (Hu et al. 2021): low-rank changes of a network's layers, kept beside the network.

An adapter is a forward hook on each layer that it changes. So the network keeps its parameters under their own names,
its checkpoints know nothing of adapters, and several adapters add up. For speed, or to write a changed network, they
merge into the weights, and come out again without a trace.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.errors import UserError, nearest
from ldm.models.lycoris import MERGED, Changeable, ChangedLayer, own_values
from ldm.models.packed import Conv2d, Linear

# A layer that can be adapted.
Base = nn.Linear | nn.Conv2d
# By its path in its network: down (r, in[, kh, kw]), up (out, r[, 1, 1]), alpha; or the parts of another kind.
Weights = Mapping[str, tuple[Tensor, Tensor, float] | Mapping[str, Tensor]]

# The projections of an attention: of U-Nets and autoencoders, of CLIP, BERT and T5.
_ATTENTION = re.compile(
    r"(.+\.)?(to_[qkv]|to_out\.0|[qkv]_proj|out_proj|attention\.self\.(query|key|value)"
    r"|attention\.output\.dense|SelfAttention\.[qkvo])"
)
_PRESETS: dict[str, Callable[[str, nn.Module], bool]] = {
    "attention": lambda path, layer: bool(_ATTENTION.fullmatch(path)),
    # All but the first and the last convolution, which stand at the network's top.
    "attention+conv": lambda path, layer: (
        bool(_ATTENTION.fullmatch(path)) or (isinstance(layer, nn.Conv2d) and "." in path)
    ),
    "all-linear": lambda path, layer: isinstance(layer, nn.Linear),
    # All that is inside of the numbered blocks, and so nothing that embeds, first or last.
    "blocks": lambda path, layer: bool(re.search(r"\.\d+\.", path)),
}


class LoRALayer(nn.Module):
    """Adds scale * up(down(dropout(x))) to a layer's output, as its forward hook (Hu et al. 2021, sec. 4.1).

    scale: alpha / rank, times the adapter's weight. It starts as no change: `up` is zero, and `down` keeps torch's
    own start (Kaiming uniform), as in peft. Beside a convolution `down` has its kernel, and `up` is 1x1.
    """

    reads_weight = False  # of the layer that it changes: see `ldm.models.packed`

    def __init__(self, base: Base, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.gives_bias = False
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down: Base
        self.up: Base
        if isinstance(base, nn.Conv2d):
            shape: Any = (base.in_channels, rank, base.kernel_size, base.stride, base.padding, base.dilation)
            self.down = nn.Conv2d(*shape, bias=False, padding_mode=base.padding_mode)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def weigh(self, weight: float) -> None:
        """Use this much of the change."""
        self.scale = weight * self.alpha / self.rank

    def forward(self, base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of `base` with the change, in the dtype it had."""
        if self.scale == 0:
            return output
        x = self.dropout(inputs[0].to(self.down.weight.dtype))
        return (output + self.scale * self.up(self.down(x))).to(output.dtype)

    def delta(self) -> Tensor:
        """Return the change of the base's weight, in its shape and in float32."""
        down, up = self.down.weight.detach().float(), self.up.weight.detach().float()
        return self.scale * (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])

    def change(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the changes of the base's weight and bias, as `ChangedLayer` does."""
        return self.delta(), None


AdapterLayer = LoRALayer | ChangedLayer


class LoRA(nn.Module):
    """The layers of one adapter over one network. It is attached as soon as it is made.

    Its parameters are its own layers', never the network's; a deepcopy of a module that holds both is of both.

    Attributes:
        paths: of the network's layers that it changes.
        merged: whether it is part of the network's weights now.
    """

    def __init__(
        self,
        network: nn.Module,
        targets: str | Iterable[str] = "attention",
        rank: int | Mapping[str, int] = 4,
        alpha: float | Mapping[str, float] | None = None,
        dropout: float = 0.0,
    ):
        """Make an adapter that changes nothing yet.

        Args:
            network: it stays as it is, but for the hooks on its layers.
            targets: see `select`.
            rank, alpha: for all layers, or for each by its path. The change is scaled by alpha / rank; None is rank.
            dropout: of the layers' inputs in training, in [0, 1).

        Raises:
            UserError: no such layers, or a rank or a dropout that can't be.
        """
        super().__init__()
        bases = select(network, targets)
        ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(bases, rank)
        if alpha is None:
            alphas: dict[str, float] = {path: float(each) for path, each in ranks.items()}
        else:
            alphas = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(bases, float(alpha))
        if (largest := max(ranks.values())) > _LARGEST_RANK:
            raise UserError(f"a LoRA of rank {largest!r:.30} can't be: the most is {_LARGEST_RANK:,}")
        if min(ranks.values()) < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"a LoRA of rank {min(ranks.values())} and dropout {dropout} can't be: "
                "the rank is 1 or more, the dropout from 0 to below 1"
            )
        self._begin(
            bases, {path: LoRALayer(b, ranks[path], alphas[path], dropout) for path, b in bases.items()}
        )

    def _begin(self, bases: Mapping[str, Changeable], layers: Mapping[str, AdapterLayer]) -> None:
        self._bases = dict(bases)
        # A dot has its own meaning in the names of modules.
        self.layers = nn.ModuleDict({path.replace(".", "/"): layer for path, layer in layers.items()})
        self._handles: list[RemovableHandle] = []
        self._weight = 1.0
        self.merged = False
        self.attach()

    @classmethod
    def from_weights(cls, network: nn.Module, weights: Weights) -> "LoRA":
        """Make an adapter of given weights, frozen, as `ldm.checkpoints.lora` reads them. Raises UserError."""
        norms = {
            path: each
            for path, each in network.named_modules()
            if isinstance(each, nn.GroupNorm | nn.LayerNorm)
        }
        bases: dict[str, Changeable] = {**select(network, [path for path in weights if path not in norms])}
        bases |= {path: norms[path] for path in weights if path in norms}
        layers: dict[str, AdapterLayer] = {}
        for path, each in weights.items():
            if isinstance(each, Mapping):
                layers[path] = ChangedLayer(each)
                continue
            down, up, alpha = each
            with torch.device("meta"):
                layer = layers[path] = LoRALayer(bases[path], len(down), alpha)  # pyright: ignore[reportArgumentType]
            layer.down.weight = nn.Parameter(down, requires_grad=False)
            layer.up.weight = nn.Parameter(up, requires_grad=False)
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter._begin({path: bases[path] for path in weights}, layers)
        return adapter.eval()

    @property
    def paths(self) -> list[str]:
        return list(self._bases)

    @property
    def weight(self) -> float:
        """How much of the adapter is used: 1 is as it was trained, 0 is nothing."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = float(value)
        for layer in self._layers().values():
            layer.weigh(self._weight)
        if self.merged:
            for base in self._bases.values():
                _rewrite(base)

    def weights(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return a plain LoRA's own tensors (not scaled by `weight`) and alphas, to be written."""
        return {
            path: (layer.down.weight.detach(), layer.up.weight.detach(), layer.alpha)
            for path, layer in self._layers().items()
            if isinstance(layer, LoRALayer)
        }

    def attach(self) -> None:
        """Change the outputs of the network's layers from now on; what was merged comes out of the weights."""
        self.detach()
        for path, layer in self._layers().items():
            self._handles.append(self._bases[path].register_forward_hook(layer))

    def detach(self) -> None:
        """Leave the network as it was without this adapter, bit for bit."""
        while self._handles:
            self._handles.pop().remove()
        if self.merged:
            for path, layer in self._layers().items():
                getattr(self._bases[path], MERGED).layers.remove(layer)
                _rewrite(self._bases[path])
            self.merged = False

    def merge(self) -> None:
        """Add the change to the network's weights: in float32, with that of others merged there, rounded once.

        Each layer keeps the weights that it had. Don't train a network into which something is merged. Raises UserError
        where a layer without a bias would get one; the adapter then stays beside the network.
        """
        for path, layer in self._layers().items():
            base = self._bases[path]
            if base.bias is None and layer.gives_bias:
                raise UserError(
                    f"{path} has no bias, and its adapter gives it one: that can't be merged, use it unmerged"
                )
        self.detach()
        for path, layer in self._layers().items():
            base = self._bases[path]
            if not hasattr(base, MERGED):
                bias = None if base.bias is None else base.bias.detach()
                setattr(base, MERGED, _Merged(base.weight.detach(), bias))
            getattr(base, MERGED).layers.append(layer)
            _rewrite(base)
        self.merged = True

    def fuse(self) -> None:
        """Add the change to the network's weights for good: they are the network's own from now on. Raises UserError.

        Nothing else may be merged there.
        """
        self.merge()
        for base in self._bases.values():
            delattr(base, MERGED)

    def unmerge(self) -> None:
        """Take the change out of the weights, which are then the very ones from before, and attach it instead."""
        self.attach()

    def _layers(self) -> dict[str, AdapterLayer]:
        """The layers by their paths."""
        return dict(zip(self._bases, self.layers.values(), strict=True))  # pyright: ignore[reportReturnType]


def select(network: nn.Module, targets: str | Iterable[str]) -> dict[str, Base]:
    """Return the linear layers and convolutions that an adapter is to change, by path.

    Args:
        network: its grouped convolutions, and layers that others only take the weights of, are left out.
        targets: "attention" (queries, keys, values, outputs), "attention+conv", "all-linear", "blocks" (all linear
            layers and convolutions inside of blocks, as LCM-LoRA has them), a regular expression that must match a
            whole path, or the paths themselves.

    Raises:
        UserError: no layer is meant, or a path is none of the network's.
    """
    layers = {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        # Subclasses, such as the output of torch's MultiheadAttention, are not called, so a hook would be in vain.
        and type(module) in (nn.Linear, nn.Conv2d, Linear, Conv2d)
        and getattr(module, "groups", 1) == 1
    }
    kind = type(network).__name__
    if not isinstance(targets, str):
        paths = list(targets)
        if unknown := [path for path in paths if path not in layers]:
            raise UserError(f"this {kind} has no layer {unknown[0]!r} to adapt{nearest(unknown[0], layers)}")
        return {path: layers[path] for path in paths}
    if targets in _PRESETS:
        chosen = {path: layer for path, layer in layers.items() if _PRESETS[targets](path, layer)}
    else:
        try:
            chosen = {path: layer for path, layer in layers.items() if re.fullmatch(targets, path)}
        except re.error as error:
            raise UserError(f"the LoRA's targets {targets!r} are no regular expression: {error}") from error
    if not chosen:
        raise UserError(
            f"the LoRA's targets {targets!r} match no layer of this {kind}{nearest(targets, _PRESETS)}: give "
            f"{', '.join(_PRESETS)}, or a regular expression for whole paths such as {next(iter(layers), 'none')}"
        )
    return chosen


_LARGEST_RANK = 2**16  # no layer is as wide


@dataclass
class _Merged:
    """What a layer's weight and bias were, and what is merged into them now."""

    weight: Tensor
    bias: Tensor | None
    layers: list[AdapterLayer] = field(default_factory=list)


def _rewrite(base: Changeable) -> None:
    """Set weight and bias to what they were plus what is merged into them; where that is nothing, their very selves."""
    merged: _Merged = getattr(base, MERGED)
    weight, bias = own_values(base)
    changes = [layer.change(weight, bias) for layer in merged.layers]
    if not merged.layers:
        delattr(base, MERGED)
    for parameter, own, each in (
        (base.weight, weight, [change for change, _ in changes]),
        (base.bias, bias, [change for _, change in changes]),
    ):
        if parameter is None or own is None:
            continue
        if found := [change for change in each if change is not None]:
            total = own.float()
            for change in found:
                total = total + change.to(parameter.device)
            own = total
        parameter.data = own.to(parameter.dtype)
