"""Linear layers, by the library of matrix products that the processor is fast with.

On a CPU torch multiplies float32 matrices by Intel's MKL, which on processors of others takes a path two to three times
slower than oneDNN, which torch brings too. Convolutions, and bfloat16, go through oneDNN in any case.
"""

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.processor import vendor

_ROWS = 32  # of a product; below it, what a call costs besides counts for more


class Linear(nn.Linear):
    """As torch's, with the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b of x (..., in), W (out, in) and b (out,)."""
    if x.numel() >= _ROWS * x.shape[-1] and by_onednn(x, weight):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)


def by_onednn(*factors: Tensor) -> bool:
    """Whether `product` is for these tensors, and faster than torch's own: in float32, and without a gradient."""
    return (
        all(each.dtype is torch.float32 and each.device.type == "cpu" for each in factors)
        and all(type(each) in (Tensor, nn.Parameter) for each in factors)  # torchao's multiply their own way
        and not torch.compiler.is_compiling()  # inductor takes this operator with frozen weights only
        and mkl_is_slow()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in factors))
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `linear` does, by oneDNN. It has no gradient."""
    operator: Any = torch.ops.mkldnn._linear_pointwise
    return operator(x, weight, bias, "none", [], "")


@cache
def mkl_is_slow() -> bool:
    """Whether oneDNN multiplies float32 matrices faster here than MKL: on x86 processors that aren't Intel's."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and platform.machine().lower() in ("x86_64", "amd64") and vendor() not in ("", "GenuineIntel")
