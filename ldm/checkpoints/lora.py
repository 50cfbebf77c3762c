"""LoRA files, in diffusers' and in kohya's layout: read by any of their spellings, written by the current one.

The names of both layouts are computed from the layers' own names, row by row, as for whole models (`keymap`). Sources:
diffusers' `loaders.lora_pipeline` and its training scripts of all ages, peft, and kohya's sd-scripts, which name the
layers of SDXL's U-Net as the LDM code does. Diffusers' own readers and writers are what this is tested against.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import a_few, check_finite, file_in, read_metadata, read_tensors, write_tensors
from ldm.checkpoints.keymap import KeyMap, Row, row
from ldm.checkpoints.layouts import canonical_clip, unet_rows
from ldm.errors import UserError

Layout = Literal["diffusers", "kohya"]
# By the layer's path in its network: down (r, in[, kh, kw]), up (out, r[, 1, 1]), alpha.
Adapter = dict[str, tuple[Tensor, Tensor, float]]

FILE = "pytorch_lora_weights.safetensors"  # in a folder, as diffusers names it
METADATA = (
    "lora_adapter_metadata"  # diffusers' entry for peft's settings, as JSON: "unet.r", "unet.lora_alpha", ...
)
_HALVES = {"lora_A": "down", "lora_B": "up"}
_KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
# Adapters that a plain pair of matrices can't stand for, by a part of their keys.
_OTHER_KINDS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.oft_",
    "GLoRA": r"\.[ab][12]\.weight$",
    "(IA)^3": r"\.on_input$",
    "full difference": r"\.diff(_b)?$",
    "LoCon with Tucker decomposition": r"\.lora_mid\.",
    "LoRA with biases": r"\.lora_(B|up)\.bias$",
    "LoRA of embeddings": r"\.lora_embedding_[AB]",
}


def read_lora(
    path: str | Path, networks: Mapping[str, nn.Module], unet_config: Mapping[str, Any] | None = None
) -> dict[str, Adapter]:
    """Return the adapters in a LoRA file, by component and by the path of the layer that each pair belongs to.

    Args:
        path: a `.safetensors` file (or a pickle, read without running its code), or a folder with diffusers' file.
        networks: what the LoRA is for, by component: "unet", "text_encoder", "text_encoder_2".
        unet_config: the U-Net's, as diffusers has it; with it LDM's names of its layers are known too.

    Raises:
        UserError: keys of no layer of these networks, half a pair, other shapes, NaN, or another kind of adapter.
    """
    path = file_in(path, FILE)
    tensors = read_tensors(path)
    for kind, pattern in _OTHER_KINDS.items():
        if found := [name for name in tensors if re.search(pattern, name)]:
            raise UserError(
                f"{path} is a {kind} ({a_few(found, 1)}): only plain LoRA can be read, which has a down and an up "
                "matrix for each linear layer or convolution"
            )
    layers = [layer for component, network in networks.items() for layer in _layers(component, network)]
    rows = [each for layer in layers for each in _spellings(layer)] + _ldm_rows(layers, unet_config)
    known = ", ".join(networks)
    complaint = f"keys of no layer of this model ({known}), so a LoRA for another one:"
    try:
        ours = KeyMap.over_theirs(rows, tensors, path, complaint).to_ours(tensors)
    except ValueError as error:
        raise UserError(f"{path} gives some layer twice, in two layouts at once: {error}") from error
    check_finite(ours, path)
    said = _said(path, networks)
    adapters: dict[str, Adapter] = {}
    for layer in layers:
        if pair := _pair(layer, ours, said.get(layer.component, {}), path):
            adapters.setdefault(layer.component, {})[layer.path] = pair
    return adapters


def write_lora(
    path: str | Path,
    adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor, float]]],
    layout: Layout = "diffusers",
    unet_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters to one `.safetensors`, whole or not at all.

    Args:
        path: where to; diffusers looks for FILE in a folder.
        adapters: as `read_lora` returns them.
        layout: "diffusers" keeps ranks and alphas in the file's metadata, "kohya" the alphas as tensors.
        unet_config: the U-Net's, as diffusers has it: "kohya" needs it, since SDXL's layers have LDM's names there.
        metadata: more text for the file's header, such as the resolved config.

    Raises:
        UserError: the place can't be written to, or the layout has no place for some layer.
    """
    layers = {
        _Layer(component, where, _name(where), tuple(up.shape[:1] + down.shape[1:])): (down, up, alpha)
        for component, adapter in adapters.items()
        for where, (down, up, alpha) in adapter.items()
    }
    tensors: dict[str, Tensor] = {}
    for layer, (down, up, alpha) in layers.items():
        tensors |= {layer.key("lora_A.weight"): down, layer.key("lora_B.weight"): up}
        if layout == "kohya":
            tensors[layer.key("alpha")] = torch.tensor(float(alpha))
    said = dict(metadata or {})
    if layout == "diffusers":
        settings = {
            f"{component}.{key}": value
            for component, adapter in adapters.items()
            for key, value in _settings(adapter).items()
        }
        said[METADATA] = json.dumps(settings, indent=2, sort_keys=True)
    else:
        if unet_config is None:
            raise ValueError("kohya's layout needs the U-Net's config")
        rows = _kohya_rows(list(layers), unet_config)
        tensors = KeyMap.over_ours(rows, tensors, path, "kohya's layout").to_theirs(tensors)
    write_tensors(path, tensors, said)


# The layers and their names


@dataclass(frozen=True)
class _Layer:
    """A layer of a component's network.

    path: in the network. name: as files spell it. shape: of its weight.
    """

    component: str
    path: str
    name: str
    shape: tuple[int, ...]

    def key(self, part: str) -> str:
        """A name in diffusers' layout, which is ours."""
        return f"{self.component}.{self.name}.{part}"


def _layers(component: str, network: nn.Module) -> list[_Layer]:
    return [
        _Layer(component, path, _name(path), tuple(module.weight.shape))
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


def _name(path: str) -> str:
    """The layer's name in files: CLIP's begin with `text_model.`, whatever this version of transformers calls them."""
    (name,) = canonical_clip({path: torch.empty(0)})
    return name


def _spellings(layer: _Layer) -> Iterator[Row]:
    """The rows of all the names that a layer has been given, but LDM's."""
    prefixes = [f"{layer.component}.", ""] if layer.component == "unet" else [f"{layer.component}."]
    names = [layer.name] + [layer.path] * (layer.path != layer.name)
    for stem in (prefix + name for prefix in prefixes for name in names):
        parts = ("lora_{}", "lora.{}", "lora_linear_layer.{}")
        yield from _rows(layer, stem, *(f"{stem}.{part}" for part in parts))
        attention, _, projection = stem.rpartition(".to_out.0" if stem.endswith(".to_out.0") else ".")
        old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "": "to_out"}
        old_name = old.get(projection, projection)
        if old_name in ("to_q", "to_k", "to_v", "to_out"):
            for parent in (attention, f"{attention}.processor"):
                yield from _rows(layer, f"{parent}.{old_name}_lora", f"{parent}.{old_name}_lora.{{}}")
    for prefix in _KOHYA.get(layer.component, ()):
        yield from _kohya_row(layer, prefix, layer.name)


def _rows(layer: _Layer, stem: str, *patterns: str) -> Iterator[Row]:
    """The rows of both halves under each pattern, and of the alpha under the stem."""
    yield row(layer.key("alpha"), f"{stem}.alpha")
    for pattern in patterns:
        for ours, theirs in _HALVES.items():
            half = ours[-1] if pattern.endswith("lora_{}") else theirs
            yield row(layer.key(f"{ours}.weight"), f"{pattern.format(half)}.weight")


def _kohya_row(layer: _Layer, prefix: str, name: str) -> Iterator[Row]:
    stem = prefix + name.replace(".", "_")
    yield row(layer.key("alpha"), f"{stem}.alpha")
    for ours, theirs in _HALVES.items():
        yield row(layer.key(f"{ours}.weight"), f"{stem}.lora_{theirs}.weight")


def _ldm_rows(layers: list[_Layer], unet_config: Mapping[str, Any] | None) -> list[Row]:
    """Kohya's rows of the U-Net's layers by LDM's names; none where the config is not known."""
    unet = {f"{layer.name}.weight": layer for layer in layers if layer.component == "unet"}
    if unet_config is None or not unet:
        return []
    ldm = KeyMap.over_ours(unet_rows(unet_config), unet, "unet").names()
    return [
        each
        for (ours,), theirs in ldm.items()
        for each in _kohya_row(unet[ours], "lora_unet_", theirs.removesuffix(".weight"))
    ]


def _kohya_rows(layers: list[_Layer], unet_config: Mapping[str, Any]) -> list[Row]:
    """The rows that kohya's own trainers write: SDXL's U-Net by LDM's names, everything else by diffusers'."""
    if unet_config.get("addition_embed_type") != "text_time":
        return [
            each for layer in layers for each in _kohya_row(layer, _KOHYA[layer.component][0], layer.name)
        ]
    text = [layer for layer in layers if layer.component != "unet"]
    rows = [each for layer in text for each in _kohya_row(layer, _KOHYA[layer.component][-1], layer.name)]
    return rows + _ldm_rows(layers, unet_config)


# Pairs, and what is said of them


def _pair(
    layer: _Layer, tensors: Mapping[str, Tensor], said: Mapping[str, Any], path: Path
) -> tuple[Tensor, Tensor, float] | None:
    """A layer's two matrices in the layer's own dimensions, and alpha; None where the file leaves the layer alone."""
    keys = [layer.key(part) for part in ("lora_A.weight", "lora_B.weight", "alpha")]
    down, up, alpha = (tensors.get(key) for key in keys)
    if down is None and up is None and alpha is None:
        return None
    if down is None or up is None:
        raise UserError(f"{path}: {keys[down is not None]} is missing, the other half of a pair")
    rank = len(down)
    wanted = (rank, *layer.shape[1:]), (layer.shape[0], rank, *(1 for _ in layer.shape[2:]))
    pair = [_fitted(tensor, shape) for tensor, shape in zip((down, up), wanted, strict=True)]
    if pair[0] is None or pair[1] is None:
        raise UserError(
            f"{path}: {keys[0]} is {tuple(down.shape)} and lora_B {tuple(up.shape)}, where the layer is {layer.shape}: "
            "a LoRA for another model"
        )
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"{path}: {keys[2]} is {tuple(alpha.shape)}, where a single number was expected")
    return pair[0], pair[1], _alpha(layer.name, rank, said, path) if alpha is None else float(alpha)


def _fitted(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in a shape that differs by ones at the end: some keep a linear layer as a 1x1 convolution."""
    long, short = sorted((tuple(tensor.shape), shape), key=len, reverse=True)
    fits = long[: len(short)] == short and set(long[len(short) :]) <= {1}
    return tensor.reshape(shape) if fits else None


def _said(path: Path, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Peft's settings for each component, from the metadata; {} where there are none."""
    text = read_metadata(path).get(METADATA)
    try:
        settings: dict[str, Any] = dict(json.loads(text)) if text else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its metadata {METADATA} can't be read: {error}") from error
    bare = {key: value for key, value in settings.items() if "." not in key}  # a U-Net's, saved alone
    said = {"unet": bare} if bare else {}
    for component in networks:
        prefix = f"{component}."
        own = {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}
        said |= {component: own} if own else {}
    return said


def _alpha(name: str, rank: int, said: Mapping[str, Any], path: Path) -> float:
    """Alpha as peft's settings give it, or the rank where there are none: a scale of one, in either layout."""
    try:
        patterns = dict(said.get("alpha_pattern") or {})
        found = next(
            (each for each in patterns if re.match(rf"(.*\.)?({each})$", name)), None
        )  # as peft does
        alpha = float(said.get("lora_alpha", rank) if found is None else patterns[found])
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f"{path}: the alphas in its metadata {METADATA} can't be read: {error}") from error
    # Rank-stabilised LoRA (Kalajdzievski 2023) scales by alpha / sqrt(rank).
    return alpha * rank**0.5 if said.get("use_rslora") else alpha


def _settings(adapter: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Any]:
    """Peft's settings for an adapter; names without `text_model.`, which match with it and without."""
    ranks = {_name(path).removeprefix("text_model."): len(down) for path, (down, _, _) in adapter.items()}
    alphas = {_name(path).removeprefix("text_model."): alpha for path, (_, _, alpha) in adapter.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
