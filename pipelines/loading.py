"""How a model comes from the disk to where it draws: its precision, its device, and what computes it there."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.backends import Backend, kinds
from ldm.errors import UserError
from ldm.models.quantization import Quantization
from ldm.models.quantization import check as check_quantization
from ldm.system import System
from pipelines.placement import LowMemory, Offload, check_low_memory, choose_place, offload_where_needed

_ROUNDED = (
    "drawn in bfloat16, which this processor is fastest with; torch_dtype=torch.float32 (--dtype float32) is the "
    "slower, finer way"
)


@dataclass(frozen=True)
class Placed:
    """A system where it draws.

    compiled: what computes it in torch's place, if anything does. notes: what the user should know. rounded: the
    weights were, into a precision that nobody asked for.
    """

    system: System
    device: torch.device
    offload: Offload | None = None
    compiled: kinds.InPlace | None = None
    backend: Backend = "torch"
    notes: tuple[str, ...] = ()
    rounded: bool = False

    def check_move(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Raise UserError where it can't go to another device, or into another precision, None for its own."""
        now = self.system.network.dtype
        if dtype not in (None, now):
            if self.system.quantization is not None:
                raise UserError(
                    "a quantized network stays in its precision: load it in another, by torch_dtype"
                )
            self.check_unrounded(f"to have them in {dtype}")
        kinds.check(self.backend, device, dtype or now)

    def check_unrounded(self, wanted: str) -> None:
        """Raise UserError where the weights lost what nobody said they may lose. wanted: what for, as in "to save"."""
        if self.rounded:
            raise UserError(
                "the weights were rounded to bfloat16 as they were loaded, which this processor is fastest with: "
                f"{wanted}, load them with torch_dtype=torch.float32, or another that you choose"
            )


def load(
    name: str | Path | None,
    torch_dtype: torch.dtype | None,
    device: torch.device | str | None,
    variant: str | None,
    prediction_type: str | None,
    fast: bool,
    low_memory: LowMemory | None,
    backend: Backend,
    quantization: Quantization | None,
) -> Placed:
    """Load a model and place its parts: see `TextToImagePipeline.from_pretrained`. Raises UserError."""
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise UserError(f"torch_dtype is {torch_dtype!r}: give one of torch's own, such as torch.bfloat16")
    check_low_memory(low_memory)
    if quantization is not None:
        check_quantization(quantization)
    unlike = {"quantization": quantization, "low_memory": low_memory, "backend": backend != "torch"}
    if backend == "openvino" and quantization is None:
        del unlike["backend"]  # it is for the CPU, where low_memory moves nothing
    if len(given := [name for name, value in unlike.items() if value]) > 1:
        raise UserError(f"{' and '.join(given)} don't go together: give one of them")
    where, dtype = choose_place(device, backend, torch_dtype)
    how: dict[str, Any] = {"variant": variant, "prediction_type": prediction_type, "fast": fast}
    system = System.load(name, torch_dtype=dtype, **how)
    offload = offload_where_needed(system, where, False if quantization or backend != "torch" else low_memory)
    if not offload:
        system.to(where, dtype)
    if quantization is not None:
        system.quantize(quantization)
    chosen = torch_dtype is None and dtype is torch.bfloat16 and not os.environ.get("LDM_DTYPE")
    return Placed(
        system,
        where,
        offload,
        kinds.use(backend, system),
        backend,
        (_ROUNDED,) if chosen else (),
        chosen and any(system.precision.get(part) is not dtype for part in system.modules()),
    )
