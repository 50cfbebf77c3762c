"""Scaled dot-product attention: the one place where a backend is chosen.

Every network calls `attend`. The backend is SDPA, or xformers where it is installed and the tensors are on CUDA. On the
CPU torch's SDPA multiplies by Intel's MKL: where that is slow, or the processor has AVX512-BF16 and no AMX, which MKL
does not make use of, plain matrix products are faster (see `_on_cpu`).
"""

from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import processor
from ldm.errors import UserError, nearest
from ldm.models.onednn import by_onednn, plain_only, product

Backend = Literal["auto", "sdpa", "xformers"]
_backend: Backend = "auto"
_SHORT = 256  # keys; measured on two cores with AVX512-bf16, 64 to 4096 queries, with their gradient
_BLOCK = 2**21  # scores at a time: with their copies they stay in the processor's caches
_LARGE = 2**22  # multiplications a head from which on a call for each head pays


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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d)) V over `heads` heads (Vaswani et al. 2017, eq. 1).

    query: (B, L, H*d); key, value: (B, S, H*d). mask: (B, 1, L, S), True where a query sees a key. causal: in place of
    a mask, no query sees a later key. dropout: of the softmax. What text encoders ask for by these three, which is
    little work, SDPA does under any backend. Returns (B, L, H*d) in the dtype of `query`.
    """
    batch, length, width = query.shape
    q, k, v = (t.view(batch, -1, heads, width // heads) for t in (query, key, value))  # (B, L, H, d)
    narrow = width // heads <= 256  # what xformers' kernels take
    if mask is not None or causal or dropout:
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2)
    elif _backend == "xformers" or (_backend == "auto" and query.is_cuda and narrow and _has_xformers()):
        out = _xformers(q, k, v)
    else:
        on_cpu = _backend == "auto" and query.device.type == "cpu" and not plain_only()
        products = _on_cpu if on_cpu else F.scaled_dot_product_attention
        out = products(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return out.reshape(batch, length, width)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, L, d) in and out, by what is fastest on this processor for tensors of this kind."""
    if q.dtype is torch.bfloat16:
        if k.shape[2] <= _SHORT:
            return _plain(q, k, v)
        learns = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
        if plain_is_faster() and not learns:  # with a gradient all scores would be held
            return _blocked(q, k, v)
    elif by_onednn(q, k, v) and q.shape[2] * k.shape[2] * q.shape[3] >= _LARGE:
        return _by_heads(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


@cache
def plain_is_faster() -> bool:
    """Whether plain products of bfloat16, by oneDNN, beat SDPA of long sequences here: with AVX512-BF16 and no AMX."""
    return processor.has("avx512_bf16") and not processor.has("amx_bf16")


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, L, d) in and out."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def _blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, some queries at a time, after keys and values were brought into the order of the products."""
    q, k, v = (q * q.shape[-1] ** -0.5).contiguous(), k.transpose(-1, -2).contiguous(), v.contiguous()
    queries = max(1, _BLOCK // (q.shape[0] * q.shape[1] * k.shape[-1]))
    return torch.cat([(some @ k).softmax(-1) @ v for some in q.split(queries, dim=2)], dim=2)


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, some queries of one head at a time, as products of linear layers."""
    heads = list[Tensor]()
    q = q * q.shape[-1] ** -0.5
    for query, key, value in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True):
        key, value = key.contiguous(), value.T.contiguous()
        some = query.contiguous().split(max(1, _BLOCK // 2 // len(key)))
        heads.append(torch.cat([product(product(each, key).softmax(-1), value) for each in some]))
    return torch.stack(heads).unflatten(0, q.shape[:2])


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, H, d) in and out. Its kernels exist on CUDA only."""
    if not q.is_cuda:
        raise UserError("the xformers attention backend runs on CUDA only; use set_attention_backend('sdpa')")
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    out: Tensor = memory_efficient_attention(q, k, v)
    return out
