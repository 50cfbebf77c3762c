"""Control-LoRA: a ControlNet as a small change of a U-Net's own encoder, in the file that Stability AI published.

For a layer X of LDM's names, X.up (O, r, ...) and X.down (r, I, ...) are added to the U-Net's weight as their product.
What the U-Net doesn't have (the hint's convolutions, the zero convolutions) stands in the file whole, and so may any
other tensor of it, such as biases. An empty tensor, "lora_controlnet", is the mark.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.files import a_few, write_tensors
from ldm.checkpoints.keymap import KeyMap, Row
from ldm.checkpoints.layouts import controlnet_rows
from ldm.errors import UserError

MARK = "lora_controlnet"
_LAYOUT = "the layout of Control-LoRA"
_HINT = "conditioning_embedding_out_channels"
_MOST_CONVOLUTIONS = 30  # of a hint


@dataclass(frozen=True)
class Encoder:
    """The part of a U-Net that a ControlNet has too: tensors by diffusers' names, and a ControlNet's config for it."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def theirs(self, rows: Sequence[Row], where: object) -> dict[str, Tensor]:
        """Return the tensors under LDM's names, in its shapes."""
        return KeyMap.over_ours(rows, self.tensors, where, _LAYOUT).to_theirs(self.tensors)


def expanded(
    tensors: Mapping[str, Tensor], encoder: Encoder, path: object
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors, by diffusers' names, of the ControlNet that a Control-LoRA makes.

    tensors: of the file. Raises UserError where they don't fit the encoder, which is then of another family.
    """
    config = {**encoder.config, **_hint(tensors, path)}
    rows = controlnet_rows(config)
    whole = encoder.theirs(rows, path)
    for name, each in tensors.items():
        layer, dot, kind = name.rpartition(".")
        if name == MARK or kind == "down":
            continue
        if kind != "up":
            whole[name] = each
            continue
        base, down = whole.get(f"{layer}.weight"), tensors.get(f"{layer}.down")
        if base is None or down is None or not dot:
            raise UserError(f"{path}: {name} has no {'layer in the model' if base is None else 'half .down'}")
        shapes = each.ndim >= 2 and down.ndim >= 2 and each.shape[0] == base.shape[0]
        if not shapes or each[0].numel() != down.shape[0] or down[0].numel() != base[0].numel():
            raise UserError(
                f"{path}: {layer} has the shapes {tuple(each.shape)} and {tuple(down.shape)}, which is no change of "
                f"{tuple(base.shape)}: it is for another family than the model"
            )
        product = each.float().flatten(1) @ down.float().flatten(1)
        whole[f"{layer}.weight"] = base.float() + product.view(base.shape).to(base.device)
    complaint = f"names that are unknown in {_LAYOUT}:"
    return config, KeyMap.over_theirs(rows, whole, path, complaint).to_ours(whole)


def write_control_lora(
    path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], encoder: Encoder, rank: int
) -> None:
    """Write a ControlNet as what it changes of a U-Net's encoder, in float16, whole or not at all.

    Of each weight's change the part of this rank that is nearest (Eckart and Young 1936) is kept; biases, norms and
    what only a ControlNet has are written as they are. config, tensors: of the ControlNet, by diffusers' names.
    """
    rows = controlnet_rows(config)
    theirs = KeyMap.over_ours(rows, tensors, path, _LAYOUT).to_theirs(tensors)
    base = encoder.theirs(rows, path)
    kept: dict[str, Tensor] = {MARK: torch.zeros(0)}
    for name, each in theirs.items():
        own = base.get(name)
        if own is not None and torch.equal(own.to(each), each):
            continue
        if own is None or each.ndim < 2 or rank >= min(each.shape[0], each[0].numel()):
            kept[name] = each.half()
            continue
        up, down = _halves((each.float() - own.float()).flatten(1), rank)
        layer = name.removesuffix(".weight")
        kept[f"{layer}.up"] = up.view(*up.shape, *[1] * (each.ndim - 2)).half()
        kept[f"{layer}.down"] = down.view(rank, *each.shape[1:]).half()
    write_tensors(path, {name: each.contiguous() for name, each in kept.items()})


def _halves(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of (O, r) and (r, I), both of one size, which suits half precision."""
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _hint(tensors: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    """What the hint's convolutions say of a ControlNet: two a level, and one at each end."""
    found = {
        int(match[1]): each
        for name, each in tensors.items()
        if (match := re.fullmatch(r"input_hint_block\.(\d{1,3})\.weight", name)) and each.ndim == 4
    }
    layers = [found[place] for place in sorted(found)]
    if len(layers) % 2 or not 2 <= len(layers) <= _MOST_CONVOLUTIONS:
        names = a_few(list(tensors), 2)
        raise UserError(f"{path} is marked as a Control-LoRA, and has no input_hint_block: it has {names}")
    return {
        "conditioning_channels": layers[0].shape[1],
        _HINT: [each.shape[0] for each in layers[:-1:2]],
    }
