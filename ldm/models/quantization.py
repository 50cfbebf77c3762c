"""Weights of fewer bits: an approximation that saves memory.

int8, by torchao: the weights of linear layers have one scale an output (symmetric, round to nearest). fp8: the weights
of linear layers and convolutions rest as float8_e4m3fn and are widened while their layer works. Activations stay in the
network's precision; norms and biases stay as they are.
"""

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ldm.errors import UserError, nearest
from ldm.models.resting import rest_in

Quantization = Literal["int8", "fp8"]


def check(kind: str) -> None:
    """Raise UserError for an unknown kind, and where torchao is not installed."""
    if kind not in get_args(Quantization):
        known = f"{nearest(kind, get_args(Quantization))}: give {', '.join(get_args(Quantization))}, or none"
        raise UserError(f"unknown quantization {kind!r:.40}{known}")
    if kind == "int8" and find_spec("torchao") is None:
        raise UserError("quantization needs torchao: install the 'torchao' extra (pip install torchao)")


def quantize(network: nn.Module, kind: Quantization) -> None:
    """Quantize the weights of a network, in place, where they are. Raises UserError."""
    check(kind)
    if kind == "fp8":
        rest_in(network, torch.float8_e4m3fn)
        return
    before = logging.root.manager.disable
    logging.disable(
        logging.WARNING
    )  # of kernels that were built for other versions, none of which int8 needs
    try:
        torchao: Any = import_module("torchao.quantization")
        torchao.quantize_(network, torchao.Int8WeightOnlyConfig())
    except ImportError as error:
        raise UserError(f"torchao can't be used beside this torch: {error}") from error
    finally:
        logging.disable(before)


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is one of torchao's."""
    return type(weight).__module__.partition(".")[0] == "torchao"


def dequantized(weight: Tensor) -> Tensor:
    """Return the values of a weight as an ordinary tensor."""
    return weight.dequantize() if is_quantized(weight) else weight


def weight_bytes(network: nn.Module) -> int:
    """Return how many bytes the weights of a network take, those of quantized ones as they are held."""
    total = 0
    for each in network.parameters():
        parts: list[Tensor] = [each]
        if is_quantized(each):
            names, _ = each.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            parts = [getattr(each, name) for name in names]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total
