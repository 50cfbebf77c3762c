"""IP-Adapters on disk, in the published layout: `image_proj` and `ip_adapter`, whose layers are numbered 1, 3, 5, ...

The numbers are those of all attentions of a U-Net, of which every other one attends to the text: down, up, middle. Our
names are diffusers' for the projection, and the layers' own paths (with / for a dot) for the cross-attentions.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.files import a_few, check_plain, read_tensors, write_tensors
from ldm.checkpoints.keymap import STACKED, KeyMap, Row, row
from ldm.checkpoints.kinds import weights_kind
from ldm.checkpoints.passengers import other_model
from ldm.checkpoints.pickles import read_pickle
from ldm.errors import UserError

LAYOUT = "the layout of IP-Adapters"
PROJECTION, LAYERS = "image_proj.", "ip_adapter."
# What the projection's names give away, most telling first; of other kinds what they would need.
_KINDS = {"proj.weight": "base", "proj.3.weight": "full", "latents": "plus"}
_OTHERS = {
    "perceiver_resampler.proj_in.weight": "IP-Adapter FaceID Plus, which needs a face recognition network",
    "norm.weight": "IP-Adapter FaceID, which needs a face recognition network",
    "time_embedding.linear_1.weight": "IP-Adapter of Stable Diffusion 3",
}


def read_ip_adapter(path: str | Path, attentions: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's settings (see `ldm.models.ip_adapter.IPAdapterConfig`) and its tensors by our names.

    Args:
        path: safetensors with prefixes, or a pickle of {image_proj, ip_adapter}.
        attentions: the paths of the network's cross-attentions, in the published order.

    Raises:
        UserError: unreadable, another kind of file (says which), another number of layers, or names that are unknown.
    """
    path = Path(path)
    tensors = _read(path)
    inside = [name.removeprefix(PROJECTION) for name in tensors if name.startswith(PROJECTION)]
    kind = _kind_of(inside, tensors, path)
    _check_stacked(tensors, path)
    layers = sorted(
        int(name.split(".")[1])
        for name in tensors
        if re.fullmatch(r"ip_adapter\.\d{1,4}\.to_k_ip\.weight", name)
    )
    if layers != list(range(1, 2 * len(layers), 2)):
        raise UserError(
            f"{path}: its layers are not numbered 1, 3, 5, ...: it is no IP-Adapter, or not a whole one"
        )
    if len(layers) != len(attentions):
        raise UserError(
            f"{path} is an IP-Adapter for a network of another family: it joins {len(layers)} cross-attentions, where "
            f"this one has {len(attentions)}"
        )
    depth = 1 + max(
        (int(name.split(".")[1]) for name in inside if re.match(r"layers\.\d{1,3}\.", name)), default=-1
    )
    rows = ip_adapter_rows(kind, depth, attentions)
    complaint = f"names that are unknown in {LAYOUT}:"
    ours = KeyMap.over_theirs(rows, tensors, path, complaint).to_ours(tensors)
    return _settings(kind, depth, ours, attentions, path), ours


def write_ip_adapter(
    path: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], attentions: Sequence[str]
) -> None:
    """Write a `.safetensors` that diffusers' load_ip_adapter reads, whole or not at all. Raises UserError."""
    rows = ip_adapter_rows(settings["kind"], settings["depth"], attentions)
    write_tensors(path, KeyMap.over_ours(rows, tensors, path, LAYOUT).to_theirs(tensors))


def ip_adapter_rows(kind: str, depth: int, attentions: Sequence[str]) -> list[Row]:
    """Return an adapter's rows: of the projection of its kind, with `depth` layers, and of the cross-attentions."""
    layers = [
        row(f"layers.{path.replace('.', '/')}.", f"{LAYERS}{2 * i + 1}.") for i, path in enumerate(attentions)
    ]
    if kind == "base":
        pairs = {"image_embeds.": "proj.", "norm.": "norm."}
    elif kind == "full":
        pairs = {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2.", "norm.": "proj.3."}
    else:
        pairs = {each: each for each in ("latents", "proj_in.", "proj_out.", "norm_out.")}
    own = [row(PROJECTION + ours, PROJECTION + theirs) for ours, theirs in pairs.items()]
    return own + [each for i in range(depth) for each in _resampler_rows(f"{PROJECTION}layers.{i}.")] + layers


def _resampler_rows(layer: str) -> list[Row]:
    pairs = {
        "ln0.": "0.norm1.",
        "ln1.": "0.norm2.",
        "attn.to_q.": "0.to_q.",
        "attn.to_out.0.": "0.to_out.",
        "ff.0.": "1.0.",
        "ff.1.net.0.proj.": "1.1.",
        "ff.1.net.2.": "1.3.",
    }
    keys = (f"{layer}attn.to_k.", f"{layer}attn.to_v.")
    return [row(layer + ours, layer + theirs) for ours, theirs in pairs.items()] + [
        row(keys, f"{layer}0.to_kv.", STACKED)
    ]


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors by their full names; a pickle keeps them in two dictionaries."""
    if weights_kind(path) == "safetensors":
        return read_tensors(path)
    found = read_pickle(path)
    parts = found if isinstance(found, dict) else {}
    if not {"image_proj", "ip_adapter"} <= set(parts):
        return read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for part in ("image_proj", "ip_adapter"):
        inside = parts[part]
        if not isinstance(inside, dict) or not all(isinstance(each, Tensor) for each in inside.values()):
            raise UserError(f"{path}: its {part} is no dictionary of tensors by name")
        tensors |= {f"{part}.{name}": each.detach() for name, each in inside.items()}
    check_plain(tensors, path)
    return tensors


def _kind_of(inside: Collection[str], names: Collection[str], path: Path) -> str:
    """The kind that the names show. Raises UserError, which says what they are of, for others."""
    if any(name.startswith(("image_proj_model.", "adapter_modules.")) for name in names):
        raise UserError(
            f"{path} is a state of IP-Adapter's training: name its image_proj_model as image_proj and its "
            "adapter_modules as ip_adapter first"
        )
    if not inside:
        other = other_model(names) or f"a file of names like {a_few(list(names), 1)}"
        raise UserError(f"{path}: this is {other} and no IP-Adapter")
    for sign, kind in _KINDS.items():
        if sign in inside:
            return kind
    for sign, title in _OTHERS.items():
        if sign in inside:
            raise UserError(f"{path}: this is {title}; such files are not supported here")
    raise UserError(f"{path}: an IP-Adapter of an unknown kind ({a_few(sorted(inside))})")


def _check_stacked(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError for keys and values that no two halves can be made of."""
    for name, each in tensors.items():
        if name.endswith(".to_kv.weight") and (each.ndim != 2 or not len(each) or len(each) % 2):
            raise UserError(
                f"{path}: {name} has the shape {tuple(each.shape)}, and no two halves, keys and values"
            )


def _settings(
    kind: str, depth: int, tensors: Mapping[str, Tensor], attentions: Sequence[str], path: Path
) -> dict[str, Any]:
    """What the shapes show; a network of these settings has these shapes and no others."""

    def size(name: str, axis: int) -> int:
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim <= axis or not tensor.shape[axis]:
            raise UserError(f"{path}: its {name} is missing, or of another shape than an IP-Adapter's")
        return tensor.shape[axis]

    widths = tuple(size(f"layers.{each.replace('.', '/')}.to_k_ip.weight", 0) for each in attentions)
    context = size(f"layers.{attentions[0].replace('.', '/')}.to_k_ip.weight", 1)
    settings: dict[str, Any] = {
        "kind": kind,
        "context_dim": context,
        "widths": widths,
        "tokens": 0,
        "depth": depth,
    }
    own = PROJECTION
    if kind == "base":
        settings |= {
            "features": size(f"{own}image_embeds.weight", 1),
            "tokens": max(size(f"{own}image_embeds.weight", 0) // context, 1),
        }
    elif kind == "full":
        settings["features"] = size(f"{own}ff.net.0.proj.weight", 1)
    else:
        first = f"{own}layers.0."
        settings |= {
            "features": size(f"{own}proj_in.weight", 1),
            "tokens": size(f"{own}latents", 1),
            "hidden": size(f"{own}latents", 2),
            "inner": size(f"{first}attn.to_q.weight", 0),
            "ff": size(f"{first}ff.1.net.0.proj.weight", 0),
        }
    return settings
