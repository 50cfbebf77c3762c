"""CUDA graphs in place of single launches, for the denoising network of a system on one GPU.

A small network, or a fast GPU, waits for Python to launch hundreds of kernels a step. Here a call of some shapes is
captured at its second time, and its later ones are one launch. What is computed stays the same; a network whose layers
have adapters beside them is computed as it was, until these are merged into the weights.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.backends.arguments import Form, taken_apart
from ldm.backends.graphs import slots
from ldm.errors import UserError
from ldm.system import System

_KEPT = 4  # shapes of one network


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise UserError(
            f"the backend cuda_graphs is for CUDA GPUs, and the device is {str(device)!r}: leave it out"
        )


def use(system: System) -> "CUDAGraphs":
    """Capture the calls of a system's network from now on. Raises UserError, see `check`."""
    check(system.network.device, system.network.dtype)
    return CUDAGraphs(system.network)


class CUDAGraphs:
    """A module's `forward`, by captured calls where it can be, else as it was."""

    def __init__(self, module: nn.Module):
        self._module, self._own = module, module.forward
        self._captured: OrderedDict[Any, Captured] = OrderedDict()
        self._seen: set[Any] = set()
        self._weights: tuple[int, ...] = ()  # where those lie that captured calls read
        self._hooked = False
        self._broken = ""  # why a capture failed
        self._pool: Any = None
        module.forward = self

    def notes(self) -> list[str]:
        """Return why calls were launched kernel by kernel since the last time."""
        hooked, self._hooked = self._hooked, False
        why = "something is beside the layers, such as a LoRA, which merged into the weights (fuse_lora()) would do"
        reasons = [why] if hooked else []
        if self._broken:
            reasons.append(f"a capture failed ({self._broken})")
        return [f"drawn without CUDA graphs: {each}" for each in reasons]

    def remove(self) -> None:
        """Leave the module as it was."""
        if self._module.__dict__.get("forward") is self:
            del self._module.forward
        self._captured.clear()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Compute what the module's own `forward` does."""
        apart = None if named or torch.is_grad_enabled() else taken_apart(arguments)
        if apart is None or self._broken or torch.is_autocast_enabled("cuda"):
            return self._own(*arguments, **named)
        form, inputs = apart
        if not all(each.is_cuda for each in inputs) or torch.cuda.is_current_stream_capturing():
            return self._own(*arguments)
        modules = list(self._module.modules())
        if any(each._forward_hooks or each._forward_pre_hooks for each in modules[1:]):
            self._hooked = True
            return self._own(*arguments)
        weights = tuple(slot.tensor.data_ptr() for slot in slots(modules))
        if weights != self._weights:  # merged into, moved, or in another precision
            self._captured.clear()
            self._pool, self._weights = None, weights
        key = (form, tuple(each.shape for each in inputs))
        found = self._captured.get(key)
        if found is None:
            if key not in self._seen:  # for one call a capture does not pay
                self._seen.add(key)
                return self._own(*arguments)
            found = self._capture(key, form, inputs)
            if found is None:
                return self._own(*arguments)
        self._captured.move_to_end(key)
        return found(inputs)

    def _capture(self, key: Any, form: Form, inputs: Sequence[Tensor]) -> "Captured | None":
        """Capture a call; None, and no further try, where that fails."""
        while len(self._captured) >= _KEPT:
            self._captured.popitem(last=False)
        with torch.cuda.device(inputs[0].device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                found = self._captured[key] = Captured(self._own, form, inputs, self._pool)
            except RuntimeError as error:
                self._broken = str(error).splitlines()[0][:120]
                return None
        return found


class Captured:
    """A call for inputs of fixed shapes."""

    def __init__(self, call: Callable[..., Tensor], form: Form, inputs: Sequence[Tensor], pool: Any):
        self._inputs = [each.clone() for each in inputs]
        arguments = form.arguments(self._inputs)
        now, apart = torch.cuda.current_stream(), torch.cuda.Stream()
        apart.wait_stream(now)
        with torch.cuda.stream(apart):  # libraries choose their kernels, and take memory, before the capture
            for _ in range(2):
                call(*arguments)
        now.wait_stream(apart)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = call(*arguments)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the output for these inputs, in a memory of its own."""
        with torch.cuda.device(self._output.device):
            for own, each in zip(self._inputs, inputs, strict=True):
                own.copy_(each)
            self._graph.replay()
            return self._output.clone()
