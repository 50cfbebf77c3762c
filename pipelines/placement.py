"""Where the parts of a system run: Accelerate finds the device, and swaps parts in and out where memory is short."""

import os
from typing import Any, Literal

import torch

from ldm import processor
from ldm.backends import Backend, kinds
from ldm.errors import UserError, nearest
from ldm.models.resting import Resting
from ldm.system import System
from pipelines.recipe import PRECISIONS

LowMemory = bool | Literal["sequential"]
_HEADROOM = 1.5  # activations, as a multiple of the weights; a rule of thumb that errs on the safe side


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device named, else the accelerator that Accelerate finds, else the CPU. Raises UserError."""
    if device is not None:
        return _present(device)
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    from accelerate import PartialState

    return torch.device(PartialState().device or "cpu")


def choose_place(
    device: torch.device | str | None, backend: Backend, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """The device and the precision for a system that this backend computes, where they are None. Raises UserError."""
    where = choose_device("cpu" if device is None and backend == "openvino" else device)
    dtype = choose_dtype(where) if dtype is None else dtype
    kinds.check(backend, where, dtype)
    return where, dtype


def choose_dtype(device: torch.device) -> torch.dtype:
    """The precision to draw in where nobody says: bfloat16 on a CPU that multiplies it, else float32.

    With AVX512-BF16 a picture takes a half to three quarters of float32's time (benchmarks/speed.md); without, and
    without AMX, bfloat16 would be slower. The environment variable LDM_DTYPE, where it is set, decides instead. Raises
    UserError for what it can't be.
    """
    said = os.environ.get("LDM_DTYPE")
    if said:
        if said not in PRECISIONS:
            raise UserError(f"LDM_DTYPE is {said!r}{nearest(said, PRECISIONS)}: give {', '.join(PRECISIONS)}")
        return getattr(torch, said)
    by_bfloat16 = device.type == "cpu" and processor.multiplies_bfloat16()
    return torch.bfloat16 if by_bfloat16 else torch.float32


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
    """Lets each part of a system rest on the CPU and be on `device` only while it works.

    sequential: the network is never there as a whole, but each of its layers by itself.
    """

    def __init__(self, system: System, device: torch.device, sequential: bool = False):
        from accelerate import cpu_offload_with_hook

        self.hooks: list[Any] = []
        self._resting = Resting(system.network, device) if sequential else None
        for module in system.modules().values():
            if sequential and module is system.network:
                continue
            previous = self.hooks[-1] if self.hooks else None
            self.hooks.append(cpu_offload_with_hook(module, device, prev_module_hook=previous)[1])

    def rest(self) -> None:
        """All parts go back: those after whose work no other has begun, too."""
        for hook in self.hooks:
            hook.offload()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if self._resting:
            self._resting.remove()


def offload_where_needed(
    system: System, device: torch.device, low_memory: LowMemory | None
) -> Offload | None:
    """Offload if wanted; None decides by the free memory of a CUDA device."""
    if low_memory is None:
        low_memory = (
            device.type == "cuda" and _weights(system) * _HEADROOM > torch.cuda.mem_get_info(device)[0]
        )
    return Offload(system, device, low_memory == "sequential") if low_memory else None


def check_low_memory(low_memory: LowMemory | None) -> None:
    """Raise UserError for what it can't be."""
    if low_memory not in (None, True, False, "sequential"):
        raise UserError(f'low_memory is {low_memory!r:.60}: give True, False or "sequential"')


def _weights(system: System) -> int:
    """Bytes."""
    return sum(
        p.numel() * p.element_size() for module in system.modules().values() for p in module.parameters()
    )
