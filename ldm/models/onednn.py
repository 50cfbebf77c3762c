"""Which of torch's two libraries of matrix products a CPU is fast with: Intel's MKL or oneDNN.

torch multiplies float32 matrices on a CPU by MKL, which on processors of others than Intel takes a path two to three
times slower than oneDNN, which torch brings too. Convolutions, and bfloat16, go through oneDNN in any case.
"""

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ldm.processor import vendor

_ROWS = 32  # of a product; below it, what a call costs besides counts for more


def plain_only() -> bool:
    """Whether torch's own operators are wanted: what traces, compiles or transforms a network knows no others."""
    if torch.compiler.is_compiling():
        return True
    transforms: Any = torch._C
    transforming = (
        transforms._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
    return transforming or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b of x (..., in), W (out, in) and b (out,)."""
    if x.numel() < _ROWS * x.shape[-1] or not _fit(x, weight):
        return F.linear(x, weight, bias)
    if _learn(x, weight) or (bias is not None and _learn(bias)):
        return _Product.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return product(x, weight, bias)


def by_onednn(*factors: Tensor) -> bool:
    """Whether `product` is for these tensors, and faster than torch's own: in float32, and without a gradient."""
    return _fit(*factors) and not _learn(*factors)


def _fit(*factors: Tensor) -> bool:
    return (
        not plain_only()
        and all(each.dtype is torch.float32 and each.device.type == "cpu" for each in factors)
        and all(type(each) in (Tensor, nn.Parameter) for each in factors)  # torchao's multiply their own way
        and mkl_is_slow()
        and not torch.is_autocast_enabled("cpu")
    )


def _learn(*factors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in factors)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `linear` does, by oneDNN. It has no gradient."""
    operator: Any = torch.ops.mkldnn._linear_pointwise
    return operator(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`product` with its gradient, which is two more products. It has no gradient of second order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (N, out)
        return (
            product(rows, weight.T).view(x.shape) if of_x else None,
            product(rows.T, x.reshape(-1, x.shape[-1]).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


@cache
def mkl_is_slow() -> bool:
    """Whether oneDNN multiplies float32 matrices faster here than MKL: on x86 processors that aren't Intel's."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and platform.machine().lower() in ("x86_64", "amd64") and vendor() not in ("", "GenuineIntel")


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies and convolves in this dtype here: float32, and bfloat16 where there is AVX512."""
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    known: Any = torch.ops.mkldnn
    return dtype is torch.float32 or (dtype is torch.bfloat16 and known._is_mkldnn_bf16_supported())
