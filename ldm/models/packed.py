"""Convolutions and linear layers whose weights lie in oneDNN's own order while a CPU draws with them.

torch gives oneDNN a weight in its plain order, and oneDNN brings it into blocks of channels at each call: for the wide
layers of a U-Net that takes as long as the work itself. Here it is done once, for frozen weights, and the plain ones
go, so that it costs no memory. Whoever reads `weight`, moves, copies or saves the layer gets the plain weight back, bit
for bit; the next call packs it again. Activations leave a convolution with their channels last, as oneDNN likes best.
"""

from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.onednn import linear, mkl_is_slow, multiplies, plain_only

_operators: Any = torch.ops.mkldnn
_packing = RLock()
_CPU = torch.device("cpu")


class _Packed:
    """What is common to both: a mixin of `nn.Module`s with a parameter named weight."""

    _packed: Tensor | None = None  # the weight in oneDNN's order; the parameter's own data is then a stand-in
    _strides: tuple[int, ...] = ()  # of the plain weight
    _stand_in: Tensor | None = None
    _parameters: dict[str, nn.Parameter | None]
    _forward_hooks: dict[int, Any]

    @property
    def weight(self) -> nn.Parameter:
        """The plain weight."""
        if self._packed is not None:
            self.unpack()
        found = self._parameters.get("weight")
        if found is None:
            raise AttributeError("weight")  # the module's own words for what is not there follow
        return found

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:  # nn.Module's __setattr__ takes parameters before this
        raise TypeError(f"the weight of a layer is a parameter, not a {type(value).__name__}")

    def packs(self, x: Tensor) -> bool:
        """Whether x is multiplied by a packed weight: on a CPU, by a frozen one.

        That depends on nothing that came before: a layer's rounding is the same at each call. A layer is left alone
        where a hook may read its weight at each call; one that does not says so by `reads_weight`.
        """
        if plain_only():
            return False
        weight, bias = self._parameters["weight"], self._parameters["bias"]
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
        packed, weight = self._packed, self._parameters["weight"]
        assert weight is not None
        if packed is not None and self._stands_in(weight):
            return packed
        # Not packed yet, or somebody gave the parameter other data since.
        with _packing:
            self._strides = weight.stride()
            self._packed = packed = self.reordered(weight.detach(), x)
            # Of its shape, in no memory: whoever reads it past `weight` by mistake finds no numbers.
            self._stand_in = weight.new_full((1,) * weight.ndim, float("nan")).expand(weight.shape)
            weight.data = self._stand_in
        return packed

    def _stands_in(self, weight: Tensor) -> bool:
        """Whether a parameter's data are the stand-in, and not what somebody gave it since."""
        return self._stand_in is not None and weight.data_ptr() == self._stand_in.data_ptr()

    def reordered(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the plain weight in the order that oneDNN wants for x."""
        raise NotImplementedError

    def unpack(self) -> None:
        """Put the plain weight back into its parameter."""
        with _packing:
            packed, self._packed = self._packed, None
            weight = self._parameters["weight"]
            if packed is None or weight is None or not self._stands_in(weight):
                return
            plain = torch.empty_strided(weight.shape, self._strides, dtype=weight.dtype)
            weight.data = plain.copy_(packed.to_dense())

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

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self._packed = None
        super().register_parameter(name, param)  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of the plain weight."""
        self.unpack()
        return self.__dict__.copy()


class Conv2d(_Packed, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """As torch's, with the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H', W')."""
        if not self.packs(input) or isinstance(self.padding, str) or self.padding_mode != "zeros":
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
        return _operators._reorder_linear_weight(weight.contiguous(), x.numel() // x.shape[-1])


def unpack(network: nn.Module) -> None:
    """Put the plain weights back into all layers of a network."""
    for each in network.modules():
        if isinstance(each, _Packed):
            each.unpack()
