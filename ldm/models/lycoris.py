"""Adapters that are no plain pair of matrices: LoCon's Tucker cores, LoHa, LoKr, DoRA, (IA)^3, differences, norms.

They share one idea. Linear layers, convolutions and norms are linear in their weight and bias taken together, so the
change of an output is the layer with the change of its weight and bias in their place. An adapter only has to know
that change; merging adds the very same one. It is worked out anew in every call, for it would take as much memory as
the network: merge adapters that are to be fast.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.quantization import dequantized

# A layer that these can change.
Changeable = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm


class ChangedLayer(nn.Module):
    """Adds what a change of a layer's weight and bias adds to its output, as its forward hook.

    Attributes:
        scale: of the matrices' product: alpha / rank. strength: the adapter's weight, which scales the whole change.
        gives_bias: it changes the bias by itself, so that a layer without one would get one.
        parts: frozen tensors, of which each kind has its own. LoRA: down (r, in[, kh, kw]), up (out, r[, 1, 1]), and
            with a Tucker core mid (R, r, kh, kw) down and up are 1x1. LoHa and LoKr: `hada_*` and `lokr_*`, as LyCORIS
            names them. magnitude: a DoRA's, (out, 1[, 1, 1]) or (1, in[, 1, 1]). diff, diff_b: differences.
            weight, bias: new values. weight_factor, bias_factor: (IA)^3's, 0 for no change. up_bias: scaled as the
            matrices are.
    """

    def __init__(self, parts: Mapping[str, Tensor]):
        super().__init__()
        self.scale = float(parts["scale"]) if "scale" in parts else 1.0
        self.strength = 1.0
        self.gives_bias = "diff_b" in parts or "up_bias" in parts
        frozen = {
            name: nn.Parameter(each, requires_grad=False) for name, each in parts.items() if name != "scale"
        }
        self.parts = nn.ParameterDict(frozen)

    @property
    def reads_weight(self) -> bool:
        """Whether a call reads the weight of the layer that it changes: see `ldm.models.packed`."""
        return self.strength != 0

    def weigh(self, weight: float) -> None:
        """Use this much of the change."""
        self.strength = weight

    def forward(self, base: Changeable, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of `base` with the change, in the dtype it had."""
        if self.strength == 0:
            return output
        return (output + _applied(base, inputs[0], *self.change(*own_values(base)))).to(output.dtype)

    def change(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the changes of a layer's own weight and bias, in float32; None for no change.

        A DoRA's is m * (W + d) / ||W + d|| - W, with the product d of its matrices and the norm of each row or column,
        to which float32's epsilon is added against rows of zeros. This is peft's and LyCORIS' at a strength of 1; other
        strengths scale the difference, as ComfyUI has it.
        """
        part = {name: each.detach().float() for name, each in self.parts.items()}
        # Weights may rest elsewhere than where the adapter is: see `ldm.models.resting`.
        there = next(iter(part.values())).device
        weight, bias = weight.detach().float().to(there), None if bias is None else bias.to(there)
        changes: list[Tensor] = []
        product = _product(part, weight.shape)
        if product is not None:
            product = self.scale * product
            if "magnitude" in part:
                changed = weight + product
                axes = tuple(axis for axis in range(weight.ndim) if axis != _axis(part["magnitude"], weight))
                norm = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
                product = part["magnitude"] / (norm + torch.finfo(torch.float32).eps) * changed - weight
            changes.append(product)
        if "diff" in part:
            changes.append(part["diff"])
        if "weight" in part:
            changes.append(part["weight"] - weight)
        if "weight_factor" in part:
            changes.append(part["weight_factor"] * weight)
        return _total(changes, self.strength), _total(self._bias_changes(part, bias), self.strength)

    def _bias_changes(self, part: Mapping[str, Tensor], bias: Tensor | None) -> list[Tensor]:
        changes = [part["diff_b"]] if "diff_b" in part else []
        if "up_bias" in part:
            changes.append(self.scale * part["up_bias"])
        if bias is not None:
            bias = bias.detach().float()
            if "bias" in part:
                changes.append(part["bias"] - bias)
            if "bias_factor" in part:
                changes.append(part["bias_factor"] * bias)
        return changes


def own_values(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a layer's own weight and bias: those from before any adapter was merged into them.

    So changes that depend on them, such as a DoRA's, are the same whatever else is loaded, and in any order.
    """
    merged = getattr(base, MERGED, None)
    weight, bias = (merged.weight, merged.bias) if merged else (base.weight, base.bias)
    there = base.weight.device  # the network may have moved since
    return dequantized(weight).to(there), None if bias is None else bias.to(there)  # pyright: ignore


MERGED = "_merged_lora"  # where a layer keeps what it was before adapters were merged into it


def _total(changes: list[Tensor], strength: float) -> Tensor | None:
    return strength * sum(changes[1:], start=changes[0]) if changes else None


def _axis(magnitude: Tensor, weight: Tensor) -> int:
    """The axis along which there is a length for each place: 0 of rows, 1 of columns."""
    return 0 if magnitude.shape[0] == weight.shape[0] else 1


def _product(part: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """What the matrices of one kind make, in the weight's shape."""
    if "up" in part:
        down, up = part["down"], part["up"]
        if "mid" not in part:
            return (up.flatten(1) @ down.flatten(1)).reshape(shape)
        return torch.einsum("mn...,im,nj->ij...", part["mid"], up.flatten(1), down.flatten(1)).reshape(shape)
    if "hada_w1_a" in part:
        return (_half(part, "hada", "1") * _half(part, "hada", "2")).reshape(shape)
    if any(name.startswith("lokr_") for name in part):
        small, large = _half(part, "lokr", "1"), _half(part, "lokr", "2")
        return torch.kron(small[(..., *[None] * (large.ndim - 2))], large.contiguous()).reshape(shape)
    return None


def _half(part: Mapping[str, Tensor], kind: str, side: str) -> Tensor:
    """One factor of a LoHa or a LoKr: whole, of two matrices, or with a Tucker core between them."""
    if f"{kind}_w{side}" in part:
        return part[f"{kind}_w{side}"]
    a, b = part[f"{kind}_w{side}_a"], part[f"{kind}_w{side}_b"]
    if f"{kind}_t{side}" not in part:
        return a @ b
    return torch.einsum("ij...,ip,jq->pq...", part[f"{kind}_t{side}"], a, b)


def _applied(base: Changeable, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The layer's output with this weight and bias in place of its own; None stands for zeros."""
    if base.weight.dtype.itemsize > 1:  # in 8 bits it only rests
        x = x.to(base.weight.dtype)
    weight = torch.zeros_like(base.weight, dtype=x.dtype, device=x.device) if weight is None else weight
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(base, nn.Conv2d):
        return base._conv_forward(x, weight, bias)
    if isinstance(base, nn.GroupNorm):
        return F.group_norm(x, base.num_groups, weight, bias, base.eps)
    return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
