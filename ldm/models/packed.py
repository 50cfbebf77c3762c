"""Convolutions and linear layers whose weights lie in oneDNN's own order while a CPU draws with them.

torch gives oneDNN a weight in its plain order, and oneDNN brings it into blocks of channels at each call: for the wide
layers of a U-Net that takes as long as the work itself. Here it is done once, for frozen weights, and the plain ones
go, so that it costs no memory. Whoever reads `weight`, moves, copies or saves a layer gets the plain weight back, bit
for bit, and the next call packs it again; who reads `parameters()` of a network that has drawn calls `unpack` first.
Activations leave a convolution with their channels last, as oneDNN likes best.
"""

from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.onednn import linear, mkl_is_slow, multiplies, plain_only

_operators: Any = torch.ops.mkldnn
_packing = RLock()
_CPU = torch.device("cpu")
_ROWS = 32


@dataclass(frozen=True)
class _Held:
    """What a parameter has while it is packed. It lies with the parameter, which several modules may share.

    packed: in oneDNN's order. strides: of the plain weight. stand_in: the parameter's data meanwhile, of the weight's
    shape and in no memory; whoever reads past `weight` by mistake finds no numbers.
    """

    packed: Tensor
    strides: tuple[int, ...]
    stand_in: Tensor

    @classmethod
    def of(cls, weight: nn.Parameter | None) -> "_Held | None":
        """What a parameter has, unless somebody gave it other data since."""
        found: _Held | None = getattr(weight, "_held", None)
        if found is None or weight is None or weight.data_ptr() != found.stand_in.data_ptr():
            return None
        return found


class _Packed:
    """What is common to both: a mixin of `nn.Module`s with a parameter named weight."""

    training: bool
    _parameters: dict[str, nn.Parameter | None]
    _forward_hooks: dict[int, Any]

    @property
    def weight(self) -> nn.Parameter:
        """The plain weight."""
        self.unpack()
        found = self._parameters.get("weight")
        if found is None:
            raise AttributeError("weight")  # the module's own words for what is not there follow
        return found

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:  # nn.Module's __setattr__ takes parameters before this
        raise TypeError(f"the weight of a layer is a parameter, not a {type(value).__name__}")

    def packs(self, x: Tensor) -> bool:
        """Whether x is multiplied by a packed weight: on a CPU, by a frozen one of a module in evaluation mode.

        That depends on nothing that came before: a layer's rounding is the same at each call. A layer is left alone
        where a hook may read its weight at each call; one that does not says so by `reads_weight`.
        """
        if plain_only() or self.training:
            return False
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype is not x.dtype:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return False
        return (
            x.device == weight.device == _CPU
            and multiplies(x.dtype)
            and not torch.is_autocast_enabled("cpu")
            and not any(getattr(hook, "reads_weight", True) for hook in self._forward_hooks.values())
        )

    def pack(self, x: Tensor) -> Tensor:
        """Return the weight in oneDNN's order; it is packed now if it was not."""
        weight: Any = self._parameters["weight"]
        if (held := _Held.of(weight)) is not None:
            return held.packed
        with _packing:
            if (held := _Held.of(weight)) is None:  # another thread was not quicker
                stand_in = weight.new_full((1,) * weight.ndim, float("nan")).expand(weight.shape)
                held = _Held(self.reordered(weight.detach(), x), weight.stride(), stand_in)
                weight._held = held
                weight.data = stand_in
        return held.packed

    def reordered(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the plain weight in the order that oneDNN wants for x."""
        raise NotImplementedError

    def unpack(self) -> None:
        """Put the plain weight back into its parameter."""
        weight: Any = self._parameters.get("weight")
        if getattr(weight, "_held", None) is None:
            return
        with _packing:
            if (held := _Held.of(weight)) is not None:
                plain = torch.empty_strided(weight.shape, held.strides, dtype=weight.dtype)
                weight.data = plain.copy_(held.packed.to_dense())
            weight._held = None

    # Ways in which a module's parameters are read past `weight`

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.unpack()
        return super()._apply(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of the plain weight."""
        self.unpack()
        return self.__dict__.copy()


class Conv2d(_Packed, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """As torch's, with the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H', W')."""
        odd = isinstance(self.padding, str) or self.padding_mode != "zeros" or input.ndim != 4
        if odd or not self.packs(input):
            return super().forward(input)
        x = input.contiguous(memory_format=torch.channels_last)
        how = self.padding, self.stride, self.dilation, self.groups
        return _operators._convolution_pointwise(x, self.pack(x), self.bias, *how, "none", [], "")

    def reordered(self, weight: Tensor, x: Tensor) -> Tensor:
        """As `_Packed` says."""
        how = self.padding, self.stride, self.dilation, self.groups
        return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *how, x.shape)  # pyright: ignore


class Linear(_Packed, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """As torch's, with the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if not self.packs(input) or (input.dtype is torch.float32 and not mkl_is_slow()):
            return linear(input, self.weight, self.bias)
        return _operators._linear_pointwise(input, self.pack(input), self.bias, "none", [], "")

    def reordered(self, weight: Tensor, x: Tensor) -> Tensor:
        """As `_Packed` says."""
        rows = max(x.numel() // x.shape[-1], _ROWS)  # for one row it has another order, and rounding
        return _operators._reorder_linear_weight(weight.contiguous(), rows)


def unpack(network: nn.Module) -> None:
    """Put the plain weights back into all layers of a network."""
    for each in network.modules():
        if isinstance(each, _Packed):
            each.unpack()
