"""ControlNets on disk: the folder of diffusers, and single files in its names or LDM's, whose settings are read off.

A published single file holds tensors and no settings. All that has a shape is taken from the shapes; the number of
heads, and how many features each size is embedded in, are those of the families that there are.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.control_lora import MARK, Encoder, expanded
from ldm.checkpoints.files import a_few, read_metadata, read_tensors, write_tensors
from ldm.checkpoints.folder import MODEL_INDEX, read_component, read_json, whole_folder, write_component
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.layouts import controlnet_rows
from ldm.checkpoints.passengers import other_model, unwrapped
from ldm.checkpoints.paths import readable
from ldm.errors import UserError
from ldm.foreign import json_object

CONFIG = "ldm.controlnet"  # the metadata entry in which our own single files carry what tensors can't say
PREFIX = "control_model."
LAYOUT = "the single-file layout of ControlNets"
_CLASS = "ControlNetModel"
# What the names of other files that steer a network give away, most telling first.
_OTHERS = {
    "difference": "a ControlNet's difference from a model: add that model's encoder to it first",
    "task_embedding": "a ControlNet-Union: many kinds of control in one network",
    "control_add_embedding.": "a ControlNet-Union: many kinds of control in one network",
    "lllite_": "a ControlLLLite",
    "pos_embed_input.": "a ControlNet of Stable Diffusion 3",
    "controlnet_x_embedder.": "a ControlNet of Flux",
    "body.": "a T2I-Adapter",
    "adapter.body.": "a T2I-Adapter",
}
_SIZE_FEATURES = 256  # of each of SDXL's six sizes
_HEAD = 64  # channels a head, in all families but SD 1.x


def read_controlnet(
    path: str | Path, variant: str | None = None, encoder: Encoder | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a ControlNet's config, as diffusers' config.json has it, and its tensors by diffusers' names.

    Args:
        path: a folder of diffusers', also the pipeline's that it is a part of; or a single file, safetensors or a
            pickle, in diffusers' names or LDM's. Of a file with a whole model inside, the ControlNet is taken.
        variant: of a folder's files, "fp16" and the like.
        encoder: of the U-Net that it is for, which a Control-LoRA is a change of.

    Raises:
        UserError: unreadable, not a ControlNet (says what it is), or names that are none of it.
    """
    path = Path(path)
    with readable(path):
        is_folder = path.is_dir()
    return _read_folder(path, variant) if is_folder else _read_file(path, encoder)


def write_controlnet_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a folder that diffusers' ControlNetModel loads, whole or not at all."""
    with whole_folder(folder, _CLASS) as new:
        write_component(new, "", config, tensors)


def write_controlnet_file(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one `.safetensors` in LDM's names, without a prefix, whole or not at all. Its metadata has the config."""
    theirs = KeyMap.over_ours(controlnet_rows(config), tensors, path, LAYOUT).to_theirs(tensors)
    write_tensors(path, theirs, {CONFIG: json.dumps(dict(config))})


def _read_folder(folder: Path, variant: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if (folder / MODEL_INDEX).is_file():
        if not (folder / "controlnet").is_dir():
            raise UserError(f"{folder} is a whole system without a ControlNet: it has no folder controlnet")
        folder = folder / "controlnet"
    if not (folder / "config.json").is_file():
        inside = a_few(sorted(each.name for each in folder.iterdir()), 6) or "nothing"
        raise UserError(f"{folder} is no ControlNet: it has no config.json (it has {inside})")
    named = read_json(folder / "config.json").get("_class_name", _CLASS)
    if named != _CLASS:
        raise UserError(
            f"{folder} holds a {named!r:.60}, and no {_CLASS}: such networks are not supported here"
        )
    return read_component(folder, "", variant)


def _read_file(path: Path, encoder: Encoder | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, _ = unwrapped(read_tensors(path))
    if MARK in tensors:
        if encoder is None:
            raise UserError(
                f"{path} is a Control-LoRA, a change of a model's encoder: load it into a pipeline"
            )
        return expanded(tensors, encoder, path)
    refuse_others(tensors, path)
    inside = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
    tensors = inside or tensors
    said = _said_in(read_metadata(path), path)
    if "input_hint_block.0.weight" in tensors:
        rows = controlnet_rows(said or _outline(tensors))
        complaint = f"names that are unknown in {LAYOUT}:"
        tensors = KeyMap.over_theirs(rows, tensors, path, complaint).to_ours(tensors)
    return said or config_of(tensors, path), tensors


def refuse_others(names: Collection[str], where: object) -> None:
    """Raise UserError, which says what these are the names of, unless they are a ControlNet's."""
    bare = {name.removeprefix(PREFIX) for name in names}
    for sign, title in _OTHERS.items():
        if any(name.startswith(sign) for name in bare):
            raise UserError(f"{where}: this is {title}; such files are not supported here")
    if bare.isdisjoint(("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")):
        other = other_model(names) or f"a file of names like {a_few(list(names), 1)}"
        raise UserError(f"{where}: this is {other} and no ControlNet")


def _said_in(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The config in the metadata of our own single files; None for anybody else's."""
    if CONFIG not in metadata:
        return None
    where = f"{path}: the config in its metadata ({CONFIG})"
    said = json_object(metadata[CONFIG], where)
    kinds, widths = said.get("down_block_types"), said.get("conditioning_embedding_out_channels")
    layers = said.get("layers_per_block", 2)
    for value, kind in ((kinds, str), (widths, int)):
        if (
            not isinstance(value, list)
            or not 0 < len(value) < 100
            or {type(each) for each in value} != {kind}
        ):
            raise UserError(f"{where} can't be read: {value!r:.60} stands where a list is needed")
    if type(layers) is not int or not 0 < layers < 100:
        raise UserError(f"{where} can't be read: layers_per_block is {layers!r:.60}")
    return said


# Settings, read off


def _outline(names: Collection[str]) -> dict[str, Any]:
    """What `controlnet_rows` needs to know, from LDM's names."""
    places = _count(names, r"input_blocks\.(\d+)\.")
    halvings = [i for i in range(places) if f"input_blocks.{i}.0.op.weight" in names]
    ends = [*halvings, places]
    firsts = [1, *(each + 1 for each in halvings)]
    attends = [f"input_blocks.{first}.1.norm.weight" in names for first in firsts]
    return {
        "down_block_types": _kinds(attends),
        "layers_per_block": ends[0] - 1,
        "mid_block_type": _middle("middle_block.1.norm.weight" in names),
        "addition_embed_type": "text_time" if "label_emb.0.0.weight" in names else None,
        # Two convolutions a level, and one at each end; activations are counted too.
        "conditioning_embedding_out_channels": [0] * (_count(names, r"input_hint_block\.(\d+)\.") // 4 + 1),
    }


def config_of(tensors: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    """Return the settings that a ControlNet's tensors, by diffusers' names, show, and what families have beside.

    Whether its residuals are pooled nothing in a file shows but its name: "shuffle", as other programs have it too.
    """
    levels = _count(tensors, r"down_blocks\.(\d+)\.")
    firsts = [tensors.get(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)]
    key = next((each for name, each in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    first, embedded = tensors.get("conv_in.weight"), "controlnet_cond_embedding."
    shown = [
        tensors.get(f"{embedded}conv_in.weight"),
        *(
            tensors.get(f"{embedded}blocks.{i}.weight")
            for i in range(1, _count(tensors, rf"{re.escape(embedded)}blocks\.(\d+)\."), 2)
        ),
    ]
    known = [each for each in [*firsts, *shown, first] if each is not None and each.ndim == 4]
    if first is None or not levels or len(known) < len(firsts) + len(shown) + 1:
        raise UserError(f"{path}: some of this ControlNet's first layers are missing or of another shape")
    context = key.shape[-1] if key is not None and key.ndim == 2 else None
    widths = [each.shape[0] for each in firsts if each is not None]
    depths = [
        _count(tensors, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.")
        for i in range(levels)
    ]
    attends = [f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in range(levels)]
    middle = "mid_block.attentions.0.norm.weight" in tensors
    depths = [depth if there else 1 for depth, there in zip(depths, attends, strict=True)]
    if middle:
        depths[-1] = _count(tensors, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    config: dict[str, Any] = {
        "_class_name": _CLASS,
        "in_channels": first.shape[1],
        "conditioning_channels": known[levels].shape[1],
        "block_out_channels": widths,
        "down_block_types": _kinds(attends),
        "mid_block_type": _middle(middle),
        "layers_per_block": _count(tensors, r"down_blocks\.0\.resnets\.(\d+)\."),
        "transformer_layers_per_block": depths if len({*depths}) > 1 else depths[0],
        "attention_head_dim": 8 if context == 768 else [max(width // _HEAD, 1) for width in widths],
        "cross_attention_dim": context
        or 2048,  # without transformers it says nothing of the text: SDXL's small ones
        "use_linear_projection": _is_linear(tensors),
        "conditioning_embedding_out_channels": [
            each.shape[0] for each in known[levels : levels + len(shown)]
        ],
        "global_pool_conditions": "shuffle" in Path(str(path)).stem.lower(),
    }
    added = tensors.get("add_embedding.linear_1.weight")
    if added is not None and added.ndim == 2:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _SIZE_FEATURES,
            "projection_class_embeddings_input_dim": added.shape[1],
        }
    return config


def _is_linear(tensors: Mapping[str, Tensor]) -> bool:
    found = next((each for name, each in tensors.items() if name.endswith(".proj_in.weight")), None)
    return found is not None and found.ndim == 2


def _count(names: Collection[str], pattern: str) -> int:
    """One more than the largest number in a place of the names, 0 where there is none."""
    found = [match[1] for name in names if (match := re.match(pattern, name))]
    return 1 + max((int(each) for each in found if len(each) < 4), default=-1)


def _kinds(attends: list[bool]) -> list[str]:
    return ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends]


def _middle(attends: bool) -> str:
    return "UNetMidBlock2DCrossAttn" if attends else "UNetMidBlock2D"
