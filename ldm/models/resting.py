"""Weights that rest elsewhere, or in fewer bits, and are brought in while their layer works.

On an accelerator that is too small for a network, its weights rest in the CPU's memory, and each layer's come for its
own call (sequential offload). Or they rest in a format of fewer bits (layerwise casting): in 8 bits half of bfloat16's
memory, for what the format rounds. In either case a module's parameters are outside of its calls what they were.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Resting:
    """Brings the weights of a module's layers in, each for its own calls, until `remove`."""

    def __init__(
        self, module: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
    ):
        """device: where layers work, if not where their weights are. dtype: in which they work, if in another."""
        self._device, self._dtype = device, dtype
        self._own: dict[nn.Module, dict[str, Tensor]] = {}
        self._handles: list[Any] = []
        for layer in module.modules():
            if next(_tensors(layer), None) is not None:
                self._handles += [
                    layer.register_forward_pre_hook(self._bring),
                    layer.register_forward_hook(self._leave, always_call=True),
                ]

    def remove(self) -> None:
        """Leave the module as it was."""
        while self._handles:
            self._handles.pop().remove()

    def _bring(self, layer: nn.Module, inputs: Any) -> None:
        # What an interrupted call left there is still its own.
        own = self._own.setdefault(layer, {name: tensor.data for name, tensor in _tensors(layer)})
        for name, tensor in _tensors(layer):
            dtype = self._dtype if tensor.is_floating_point() else None
            kept = own[name]
            tensor.data = kept.to(self._device or kept.device, dtype or kept.dtype, non_blocking=True)

    def _leave(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        own = self._own.pop(layer, {})
        for name, tensor in _tensors(layer):
            if name in own:
                tensor.data = own[name]


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its own parameters and buffers, without those of the modules in it."""
    yield from layer.named_parameters(recurse=False)
    yield from layer.named_buffers(recurse=False)


def rest_in(module: nn.Module, storage: torch.dtype) -> Resting:
    """Keep the weights of linear layers and convolutions in `storage`; they work in the precision that they had.

    Biases, norms and embeddings, which are small, stay as they are. storage: such as torch.float8_e4m3fn, which rounds
    to 3 binary places and ends at 448. What was there before is rounded for good.
    """
    layers = [each for each in module.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError("no layer of this module has weights to keep in fewer bits")
    work = layers[0].weight.dtype
    resting = Resting(nn.ModuleList(layers), dtype=work)
    for each in layers:
        each.weight.data = each.weight.data.to(storage)
    return resting


def computed_in(module: nn.Module) -> torch.dtype:
    """Return the precision that a module computes in: of its biases and norms, since weights may rest in another."""
    own = list(module.parameters())
    return next((each.dtype for each in own if each.ndim == 1), own[0].dtype)
