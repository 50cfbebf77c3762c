"""Where the parts of a system run: Accelerate finds the device, and swaps parts in and out where memory is short."""

import torch
from torch import nn

from ldm.system import System

_HEADROOM = 1.5  # activations, as a multiple of the weights; a rule of thumb that errs on the safe side


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device named, else the accelerator that Accelerate finds, else the CPU."""
    if device is not None:
        return torch.device(device)
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    from accelerate import PartialState

    return torch.device(PartialState().device or "cpu")


def offload(system: System, device: torch.device, low_memory: bool | None) -> bool:
    """Let each part rest on the CPU and move to `device` while it works, where that is wanted or needed.

    low_memory: None decides by the free memory of a CUDA device. Returns whether it was done.
    """
    if low_memory is None:
        low_memory = (
            device.type == "cuda" and _weights(system) * _HEADROOM > torch.cuda.mem_get_info(device)[0]
        )
    if not low_memory:
        return False
    from accelerate import cpu_offload_with_hook

    previous = None
    for module in system.modules().values():
        _, previous = cpu_offload_with_hook(module, device, prev_module_hook=previous)
    return True


def wake(module: nn.Module) -> None:
    """Bring an offloaded part to its device before a method other than `forward` is called; else nothing."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def _weights(system: System) -> int:
    """Bytes."""
    return sum(
        p.numel() * p.element_size() for module in system.modules().values() for p in module.parameters()
    )
