"""Where the parts of a system run: Accelerate finds the device, and swaps parts in and out where memory is short."""

from typing import Any, get_args

import torch

from ldm.backends import Backend, openvino
from ldm.errors import UserError, nearest
from ldm.system import System

_HEADROOM = 1.5  # activations, as a multiple of the weights; a rule of thumb that errs on the safe side


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device named, else the accelerator that Accelerate finds, else the CPU. Raises UserError."""
    if device is not None:
        return _present(device)
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    from accelerate import PartialState

    return torch.device(PartialState().device or "cpu")


def choose_place(device: torch.device | str | None, backend: Backend, dtype: torch.dtype) -> torch.device:
    """The device for a system of this precision that this backend computes: `choose_device`'s. Raises UserError."""
    if backend not in get_args(Backend):
        raise UserError(f"the backend {backend!r} is unknown{nearest(str(backend), get_args(Backend))}")
    if backend == "torch":
        return choose_device(device)
    where = torch.device("cpu") if device is None else choose_device(device)
    openvino.check(where, dtype)
    return where


def _present(device: torch.device | str) -> torch.device:
    try:
        found = torch.empty(1, device=device).device
        if found.type == "meta":
            raise RuntimeError("no picture comes out of it")
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's words for a device that is not there
        why = str(error).splitlines()[0].partition(": ")[0][:120]
        raise UserError(f"the device {str(device)!r} can't be used: {why}") from error
    return torch.device(device)


class Offload:
    """Lets each part of a system rest on the CPU and be on `device` only while it works."""

    def __init__(self, system: System, device: torch.device):
        from accelerate import cpu_offload_with_hook

        self.hooks: list[Any] = []
        for module in system.modules().values():
            previous = self.hooks[-1] if self.hooks else None
            self.hooks.append(cpu_offload_with_hook(module, device, prev_module_hook=previous)[1])

    def rest(self) -> None:
        """All parts go back: those after whose work no other has begun, too."""
        for hook in self.hooks:
            hook.offload()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def offload_where_needed(system: System, device: torch.device, low_memory: bool | None) -> Offload | None:
    """Offload if wanted; None decides by the free memory of a CUDA device."""
    if low_memory is None:
        low_memory = (
            device.type == "cuda" and _weights(system) * _HEADROOM > torch.cuda.mem_get_info(device)[0]
        )
    return Offload(system, device) if low_memory else None


def _weights(system: System) -> int:
    """Bytes."""
    return sum(
        p.numel() * p.element_size() for module in system.modules().values() for p in module.parameters()
    )
