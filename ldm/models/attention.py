"""Scaled dot-product attention: the one place where a backend is chosen.

Every network calls `attend`. The backend is SDPA, or xformers where it is installed and the tensors are on CUDA. Short
bfloat16 sequences on the CPU go through plain matrix products, several times faster there than SDPA, backwards most.
"""

from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError, nearest

Backend = Literal["auto", "sdpa", "xformers"]
_backend: Backend = "auto"
_SHORT = 256  # keys; measured on two cores with AVX512-bf16, 64 to 4096 queries


def set_attention_backend(name: Backend) -> None:
    """Choose the backend of all networks in this process: "auto" (the default), "sdpa" or "xformers".

    Raises UserError for an unknown name, and for "xformers" where it is not installed.
    """
    global _backend
    if name not in get_args(Backend):
        raise UserError(f"unknown attention backend {name!r}{nearest(name, get_args(Backend))}")
    if name == "xformers" and not _has_xformers():
        raise UserError("xformers is not installed; install the 'xformers' extra or use the 'sdpa' backend")
    _backend = name


@cache
def _has_xformers() -> bool:
    if find_spec("xformers") is None:
        return False
    try:  # it is built for one version of torch, and beside another its import fails
        import xformers.ops  # pyright: ignore[reportMissingImports]  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d)) V over `heads` heads (Vaswani et al. 2017, eq. 1).

    query: (B, L, H*d); key, value: (B, S, H*d). Returns (B, L, H*d) in the dtype of `query`.
    """
    batch, length, width = query.shape
    q, k, v = (t.view(batch, -1, heads, width // heads) for t in (query, key, value))  # (B, L, H, d)
    narrow = width // heads <= 256  # what xformers' kernels take
    if _backend == "xformers" or (_backend == "auto" and query.is_cuda and narrow and _has_xformers()):
        out = _xformers(q, k, v)
    else:
        short = key.shape[1] <= _SHORT and query.dtype == torch.bfloat16 and query.device.type == "cpu"
        products = _plain if _backend == "auto" and short else F.scaled_dot_product_attention
        out = products(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return out.reshape(batch, length, width)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, L, d) in and out."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, H, d) in and out. Its kernels exist on CUDA only."""
    if not q.is_cuda:
        raise UserError("the xformers attention backend runs on CUDA only; use set_attention_backend('sdpa')")
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    out: Tensor = memory_efficient_attention(q, k, v)
    return out
