"""OpenVINO in torch's place for the denoising network and the autoencoder of a system, on a CPU.

    use(system)

replaces what these modules do when they are called, and nothing else: their weights, names and hooks stay torch's, so
that all that loads, saves and changes them works as before. What is not computed by OpenVINO is computed by torch, as
if nothing had been replaced: a gradient, an adapter that is no plain LoRA and no IP-Adapter, a layer that is called by
itself as `ldm.models.tiling` does.

A call's result depends on the call alone, and not on those before it, or on how long they took: there is one graph for
all numbers of rows, sizes and lengths of text.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ldm.backends.arguments import Form, taken_apart
from ldm.backends.graphs import Adapters, Slot, element_type, graph, slots
from ldm.errors import UserError
from ldm.models.ip_adapter import DecoupledAttention
from ldm.models.lora import LoRALayer
from ldm.models.lycoris import ChangedLayer
from ldm.system import System

_KEPT = 3  # compiled graphs of one network: with a ControlNet, a LoRA, and without
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


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
    if dtype not in _PRECISIONS:
        raise UserError(
            f"the backend openvino computes in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        )


def use(system: System) -> "OpenVINO":
    """Compute a system's network, and the encoder and decoder of its autoencoder, by OpenVINO from now on.

    They are converted and compiled at their first call. Raises UserError, see `check`.
    """
    check(system.network.device, system.network.dtype)
    halves = system.autoencoder
    return OpenVINO(
        [
            Replaced(system.network),
            Replaced(halves.encoder, rarely=True),
            Replaced(halves.decoder, rarely=True),
        ]
    )


class OpenVINO:
    """What `use` has put in place."""

    def __init__(self, replaced: "Sequence[Replaced]"):
        self._replaced = list(replaced)

    def notes(self) -> list[str]:
        """Return why torch has computed some of what was asked for since the last time, each reason once."""
        reasons = dict.fromkeys(reason for each in self._replaced for reason in each.reasons)
        for each in self._replaced:
            each.reasons.clear()
        return [f"drawn by torch, not by OpenVINO: {reason}" for reason in reasons]

    def remove(self) -> None:
        """Have torch compute everything again."""
        for each in self._replaced:
            each.remove()


@dataclass(frozen=True)
class _Compiled:
    """A compiled graph, and what must live as long: the memory of weights that it shares, hooks it is known by."""

    request: Any
    model: Any
    held: tuple[Any, ...]


class _Untold(Exception):
    """Torch is to compute a call, and there is no reason to tell of."""


class _Unable(Exception):
    """Torch has to compute a call, for a reason to tell."""


class Replaced:
    """A module's `forward`, by OpenVINO where it can be, else as it was.

    Attributes:
        reasons: why torch computed calls that one would expect OpenVINO to.
    """

    def __init__(self, module: nn.Module, rarely: bool = False):
        """rarely: it is called a few times a picture, and lets go of its memory after each call."""
        self.module, self.rarely = module, rarely
        self.reasons: dict[str, None] = {}
        self._torch: Callable[..., Any] = module.forward
        self._compiled: OrderedDict[Any, _Compiled] = OrderedDict()
        self._weights: tuple[Any, ...] = ()  # that the compiled ones are of
        self._failed: dict[Any, str] = {}
        module.forward = self

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
            self.reasons[str(error)] = None
        return self._torch(*arguments, **named)

    def _by_openvino(self, arguments: tuple[Any, ...]) -> Tensor:
        if torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
            raise _Untold
        if (apart := taken_apart(arguments)) is None:
            raise _Untold
        form, inputs = apart
        if any(each.device.type != "cpu" or not each.numel() for each in inputs):
            raise _Untold
        modules, adapters = _inside(self.module)
        places = slots(modules)
        if torch.is_grad_enabled() and any(
            each.requires_grad for each in (*inputs, *(slot.tensor for slot in places))
        ):
            raise _Untold
        compiled = self._for(places, adapters, form, inputs)
        scales = [torch.tensor([each.scale for each in adapters.loras])] if adapters.loras else []
        given = [each.detach().contiguous() for each in (*scales, *inputs)]
        for k, each in enumerate(given):
            compiled.request.set_input_tensor(k, _shared(each))
        compiled.request.infer()
        output = _copied(compiled.request.get_output_tensor(0), arguments[0].dtype)
        if self.rarely:
            compiled.model.release_memory()
        return output

    def _for(self, places: list[Slot], adapters: Adapters, form: Form, inputs: Sequence[Tensor]) -> _Compiled:
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
            made = _compiled(self.module, self._torch, places + more, adapters, form, inputs)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._failed[key] = f"it can't convert the {type(self.module).__name__} ({first[:120]})"
            raise _Unable(self._failed[key]) from error
        self._compiled[key] = made
        return made


def _inside(network: nn.Module) -> tuple[list[nn.Module], Adapters]:
    """The modules of a network, and the adapters that change their outputs. Raises _Unable where one is of no kind known.

    Adapters of weight 0 change nothing. Hooks of the network itself are called around its forward in any case.
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
    """What changes when a tensor does: its memory, which a compiled graph keeps from being used again, or its values."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype


def _compiled(
    module: nn.Module,
    call: Callable[..., Any],
    places: list[Slot],
    adapters: Adapters,
    form: Form,
    inputs: Sequence[Tensor],
) -> _Compiled:
    """Put the weights into the graph of a call, and compile it."""
    from openvino import op

    model = graph(module, call, places, adapters, form, inputs)
    weights = [slot.tensor.detach() for slot in places]
    memory = [each.contiguous() for each in weights]  # a copy of what is in channels last
    for each, node in zip(memory, model.get_parameters(), strict=False):
        constant = op.Constant(_shared(each), shared_memory=True)
        node.output(0).replace(constant.output(0))
        model.remove_parameter(node)
    model.validate_nodes_and_infer_types()
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[places[0].tensor.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # several processes would sit on the same cores
        "PERFORMANCE_HINT": "LATENCY",
    }
    # Never with fixed shapes: in float32 OpenVINO 2026.4.1 then crashes, in bfloat16 rounding would differ by shape.
    compiled = _core().compile_model(model, "CPU", settings)
    return _Compiled(compiled.create_infer_request(), compiled, (adapters.hooks, weights, memory))


@cache
def _core() -> Any:
    from openvino import Core

    return Core()


def _shared(tensor: Tensor) -> Any:
    """An openvino.Tensor in the memory of a contiguous torch one, which must live as long."""
    from openvino import Shape
    from openvino import Tensor as Shared

    if tensor.dtype is torch.bfloat16:  # which numpy doesn't know
        return Shared(tensor.view(torch.int16).numpy(), Shape(list(tensor.shape)), element_type(tensor.dtype))
    return Shared(tensor.numpy(), shared_memory=True)


def _copied(output: Any, dtype: torch.dtype) -> Tensor:
    """A torch tensor of what a request gave, which the next call overwrites."""
    from openvino import Type

    data = output.data
    if output.element_type == Type.bf16:
        return torch.from_numpy(data.view("int16")).view(torch.bfloat16).to(dtype, copy=True)
    return torch.from_numpy(data).to(dtype, copy=True)
