"""OpenVINO in torch's place for the denoising network of a system, on a CPU.

    use(system)

replaces what that module does when it is called, and nothing else: its weights, names and hooks stay torch's, so that
all that loads, saves and changes them works as before. What is not computed by OpenVINO is computed by torch, as
if nothing had been replaced: a gradient, an adapter that is no plain LoRA and no IP-Adapter. The autoencoder stays
torch's, whose packed convolutions are as fast (benchmarks/speed.md).

A call's result depends on the call alone, and not on those before it, or on how long they took: there is one graph for
all numbers of rows, sizes and lengths of text.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ldm import processor
from ldm.backends.arguments import Form, taken_apart
from ldm.backends.compiled import PRECISIONS, Compiled
from ldm.backends.graphs import Adapters, Slot, graph, slots
from ldm.errors import UserError
from ldm.models.ip_adapter import DecoupledAttention
from ldm.models.lora import LoRALayer
from ldm.models.lycoris import ChangedLayer
from ldm.models.packed import unpack
from ldm.system import System

_KEPT = 3  # compiled graphs of one network: with a ControlNet, a LoRA, and without


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where OpenVINO is not installed, or is not for this device or precision."""
    if find_spec("openvino") is None:
        raise UserError(
            "OpenVINO is not installed: pip install 'ldm-text-to-image[openvino]', or leave out the backend"
        )
    if device.type != "cpu":
        raise UserError(
            f"the backend openvino computes on the CPU, and the device is {str(device)!r}: give the device cpu, or the "
            "backend torch"
        )
    if processor.vendor() and not processor.has("avx512f"):
        raise UserError(
            "OpenVINO 2026.4 ends the process at some sizes of pictures on processors without AVX512, as this one is: "
            "leave out the backend"
        )
    if dtype not in PRECISIONS:
        raise UserError(
            f"the backend openvino computes in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        )


def use(system: System) -> "Replaced":
    """Compute a system's network by OpenVINO from now on; it is converted and compiled at its first call.

    Raises UserError, see `check`.
    """
    check(system.network.device, system.network.dtype)
    return Replaced(system.network)


class _Untold(Exception):
    """Torch is to compute a call, and there is no reason to tell of."""


class _Unable(Exception):
    """Torch has to compute a call, for a reason to tell."""


class Replaced:
    """A module's `forward`, by OpenVINO where it can be, else as it was."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._reasons: dict[str, None] = {}  # why torch computed calls that one would expect OpenVINO to
        self._torch: Callable[..., Any] = module.forward
        self._compiled: OrderedDict[Any, Compiled] = OrderedDict()
        self._weights: tuple[Any, ...] = ()  # that the compiled ones are of
        self._failed: dict[Any, str] = {}
        module.forward = self

    def notes(self) -> list[str]:
        """Return why torch has computed some of what was asked for since the last time, each reason once."""
        reasons, self._reasons = self._reasons, {}
        return [f"drawn by torch, not by OpenVINO: {reason}" for reason in reasons]

    def remove(self) -> None:
        """Leave the module as it was."""
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
        self._compiled.clear()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Compute what the module's own `forward` does."""
        try:
            if named:
                raise _Untold
            return self._by_openvino(arguments)
        except _Untold:
            pass
        except _Unable as error:
            self._reasons[str(error)] = None
        return self._torch(*arguments, **named)

    def _by_openvino(self, arguments: tuple[Any, ...]) -> Tensor:
        if torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):  # pyright: ignore[reportPrivateImportUsage]
            raise _Untold
        if (apart := taken_apart(arguments)) is None:
            raise _Untold
        form, inputs = apart
        if any(each.device.type != "cpu" or not each.numel() for each in inputs):
            raise _Untold
        unpack(self.module)  # what torch computed in its place
        modules, adapters = _inside(self.module)
        places = slots(modules)
        if torch.is_grad_enabled() and any(
            each.requires_grad for each in (*inputs, *(slot.tensor for slot in places))
        ):
            raise _Untold
        compiled = self._for(places, adapters, form, inputs)
        scales = [torch.tensor([each.scale for each in adapters.loras])] if adapters.loras else []
        return compiled([*scales, *inputs]).to(arguments[0].dtype)

    def _for(self, places: list[Slot], adapters: Adapters, form: Form, inputs: Sequence[Tensor]) -> Compiled:
        """The compiled graph for a call, made where there is none of these weights. Raises _Unable."""
        weights = tuple(_mark(slot.tensor) for slot in places)
        if weights != self._weights:  # changed, merged into, or in another precision
            self._compiled.clear()
            self._failed.clear()
            self._weights = weights
        more = slots([module for hook in adapters.hooks for module in hook.modules()])
        key = (
            form,
            tuple((id(hook), fact) for hook, fact in zip(adapters.hooks, adapters.facts(), strict=True)),
            tuple(_mark(slot.tensor) for slot in more),
            torch.get_num_threads(),
        )
        if key in self._failed:
            raise _Unable(self._failed[key])
        if (found := self._compiled.get(key)) is not None:
            self._compiled.move_to_end(key)
            return found
        while len(self._compiled) >= _KEPT:  # before the next one takes memory
            self._compiled.popitem(last=False)
        try:
            model = graph(self.module, self._torch, places + more, adapters, form, inputs)
            weights = [slot.tensor.detach() for slot in places + more]
            made = Compiled(model, weights, PRECISIONS[places[0].tensor.dtype], adapters.hooks)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._failed[key] = f"it can't convert the {type(self.module).__name__} ({first[:120]})"
            raise _Unable(self._failed[key]) from error
        self._compiled[key] = made
        return made


def _inside(network: nn.Module) -> tuple[list[nn.Module], Adapters]:
    """The modules of a network, and the adapters that change their outputs.

    Adapters of weight 0 change nothing. Hooks of the network itself are called around its forward in any case. Raises
    _Unable for a hook of no kind that is known.
    """
    modules, hooks = list[nn.Module](), list[Any]()
    for module in network.modules():
        modules.append(module)
        if module is network or not (module._forward_hooks or module._forward_pre_hooks):
            continue
        if module._forward_pre_hooks:
            raise _Unable("a layer has a hook that it can't follow")
        for hook in module._forward_hooks.values():
            if isinstance(hook, DecoupledAttention) or (isinstance(hook, LoRALayer) and hook.scale):
                hooks.append(hook)
            elif isinstance(hook, ChangedLayer) and hook.strength:
                raise _Unable(
                    "an adapter that is no plain LoRA changes the layers; merged into the weights (fuse_lora()) it "
                    "would do"
                )
            elif not isinstance(hook, LoRALayer | ChangedLayer):
                raise _Unable("a layer has a hook that it can't follow")
    return modules, Adapters(tuple(hooks))


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """What changes with a tensor: its memory, which a compiled graph keeps from being used again, or its values."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype
