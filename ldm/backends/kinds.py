"""The backends by their names."""

from typing import Any, Protocol, get_args

import torch

from ldm.backends import Backend, cuda_graphs, openvino
from ldm.errors import UserError, nearest
from ldm.system import System


class InPlace(Protocol):
    """What a backend has put in torch's place."""

    def notes(self) -> list[str]:
        """Return what the user should know of the calls since the last time."""
        ...

    def remove(self) -> None:
        """Have torch compute everything again."""
        ...


# Each has `check(device, dtype)` and `use(system)`.
KINDS: dict[str, Any] = {"openvino": openvino, "cuda_graphs": cuda_graphs}


def check(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError for an unknown backend, and for one that is not for this device or precision."""
    if backend not in get_args(Backend):
        raise UserError(f"the backend {backend!r:.60} is unknown{nearest(str(backend), get_args(Backend))}")
    if backend != "torch":
        KINDS[backend].check(device, dtype)


def use(backend: Backend, system: System) -> InPlace | None:
    """Compute a system by a backend from now on; None where that is torch. Raises UserError."""
    return None if backend == "torch" else KINDS[backend].use(system)
