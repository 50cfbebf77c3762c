"""LoRA files and their relatives, read by any of their spellings, written in diffusers' layout or in kohya's.

`lora_names` knows what layers and parts are called, `peft` what is said beside the tensors, `lycoris` what the parts of
one layer must be. Diffusers', peft's and LyCORIS' own readers and writers are what this is tested against.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import check_finite, read_tensors, write_tensors
from ldm.checkpoints.keymap import KeyMap, Row, row
from ldm.checkpoints.lora_names import (
    FLAT,
    PEFT,
    Layer,
    bare_spellings,
    family,
    layers_of,
    name_of,
    names_in_ldm,
    other_kind,
    passenger,
    shown,
    spellings,
    split_key,
)
from ldm.checkpoints.lycoris import LayerParts, check_parts, is_plain
from ldm.checkpoints.paths import readable
from ldm.checkpoints.peft import METADATA, Settings, config_beside, settings_of
from ldm.errors import UserError

Layout = Literal["diffusers", "kohya"]
# By the layer's path in its network. A plain LoRA: down (r, in[, kh, kw]), up (out, r[, 1, 1]), alpha. Any other kind:
# its tensors by the names of `ldm.models.lycoris`.
Plain = tuple[Tensor, Tensor, float]
Adapter = dict[str, Plain | dict[str, Tensor]]

FILE = "pytorch_lora_weights.safetensors"  # in a folder, as diffusers names it
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FILES = (FILE, "pytorch_lora_weights.bin", *_PEFT_FILES)
_BUNDLED = "bundle_emb."


@dataclass
class LoRAFile:
    """The content of a file or a folder.

    adapters: by component. files: what was read. notes: what was passed over, or assumed, for the user. bundled: the
    tensors of new words that came along, `bundle_emb.` and all (`ldm.conditioning.inversion.bundled_words`).
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bundled: dict[str, Tensor] = field(default_factory=dict)


def read_lora(
    path: str | Path, networks: Mapping[str, nn.Module], unet_config: Mapping[str, Any] | None = None
) -> dict[str, Adapter]:
    """Return the adapters in a LoRA file, by component and by layer; see `read_lora_file`."""
    return read_lora_file(path, networks, unet_config).adapters


def read_lora_file(
    path: str | Path, networks: Mapping[str, nn.Module], unet_config: Mapping[str, Any] | None = None
) -> LoRAFile:
    """Read a LoRA, LoHa, LoKr, DoRA, (IA)^3 or difference of weights, in any spelling that is in use.

    Args:
        path: a `.safetensors` file, or a pickle, read without running its code; or a folder: diffusers', peft's, or one
            with a folder of peft's for each component.
        networks: what the adapter is for, by component: "unet", "text_encoder", "text_encoder_2".
        unet_config: the U-Net's, as diffusers has it; with it LDM's names of its layers are known too.

    Raises:
        UserError: keys of no layer of these networks, half a pair, other shapes, NaN, another kind of adapter, or
            settings of peft's that can't be read or done.
    """
    layers = [layer for component, network in networks.items() for layer in layers_of(component, network)]
    found = LoRAFile()
    for file, component in _sources(Path(path), networks):
        found.files.append(file)
        for part, adapter in _read(file, component, layers, unet_config, found).items():
            found.adapters.setdefault(part, {}).update(adapter)
    return found


def _sources(path: Path, networks: Mapping[str, nn.Module]) -> list[tuple[Path, str | None]]:
    """The files to read, and the component that a file of peft's is for where its folder tells."""
    with readable(path):
        if not path.is_dir():
            return [(path, path.parent.name if path.parent.name in networks else None)]
        folders = {None: path, **{each: path / each for each in networks}}
        files = [
            (next((folder / each for each in _FILES if (folder / each).is_file()), None), component)
            for component, folder in folders.items()
        ]
        others = sorted(path.glob("*.safetensors"))
    found = [(file, component) for file, component in files if file]
    if files[0][0] or (not found and len(others) == 1):
        return [(files[0][0] or others[0], path.name if path.name in networks else None)]
    if not found:
        many = f", but {len(others)} .safetensors files: name the one to be read" if others else ""
        names = " or ".join(_FILES)
        raise UserError(f"{path} has no {names} in it, nor in a folder named {' or '.join(networks)}{many}")
    return found


def _read(
    path: Path,
    component: str | None,
    layers: list[Layer],
    unet_config: Mapping[str, Any] | None,
    found: LoRAFile,
) -> dict[str, Adapter]:
    """One file's adapters; notes and words go into `found`."""
    tensors = read_tensors(path)
    bundled = {key: each for key, each in tensors.items() if key.startswith(_BUNDLED)}
    found.bundled |= bundled
    tensors = {key: each for key, each in tensors.items() if key not in bundled}
    bare = ["unet", _bare_text(path, component, layers, tensors)]
    names = spellings(layers, unet_config, bare)
    parts, keys = _sorted_out(path, tensors, names, found.notes)
    check_parts(keys, path)
    check_finite(keys, path)
    in_peft = any(key.startswith(PEFT) for key in tensors)
    said: dict[str, Settings] = settings_of(path, {layer.component for layer in layers})
    config = config_beside(path) if in_peft or path.name in _PEFT_FILES else None
    if config:
        said = {layer.component: config for layer in layers}
    elif in_peft and not said and not any("alpha" in each for each in parts.values()):
        found.notes.append(f"{path} has no adapter_config.json beside it: its alpha is taken to be its rank")
    adapters: dict[str, Adapter] = {}
    for layer, each in parts.items():
        own = LayerParts(layer, each, said.get(layer.component), path)
        plain = is_plain(each, layer) and not own.said.values.get("use_dora")
        adapters.setdefault(layer.component, {})[layer.path] = own.plain() if plain else own.resolved()
    return adapters


def _sorted_out(
    path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, Layer], notes: list[str]
) -> tuple[dict[Layer, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts by layer, and the tensors that they are by our keys; notes on what is passed over.

    Raises UserError for all other keys, and for a layer that is given twice.
    """
    parts: dict[Layer, dict[str, Tensor]] = {}
    passed: dict[str, list[str]] = {}
    strangers: list[str] = []  # parts of an adapter, of layers that are not there
    odd: list[str] = []
    wholes: dict[Layer, list[str]] = {}  # weights and biases themselves
    for key, tensor in tensors.items():
        split = split_key(key)
        layer = names.get(split[0]) if split else None
        if what := None if layer else passenger(key):
            passed.setdefault(what, []).append(key)
        elif kind := other_kind(key):
            raise UserError(
                f"{path} is {kind} ({shown([key])}): LoRA, LoCon, LoHa, LoKr, DoRA, (IA)^3, norms and differences of "
                "weights can be read"
            )
        elif not split or not layer:
            (strangers if split and split[1] not in ("weight", "bias") else odd).append(key)
        elif parts.setdefault(layer, {}).setdefault(split[1], tensor) is not tensor:
            raise UserError(f"{path} gives some layer twice, in two layouts at once: {shown([key])}")
        elif key == f"{split[0]}.{split[1]}" and split[1] in ("weight", "bias") and PEFT not in key:
            wholes.setdefault(layer, []).append(key)
    components = ", ".join(dict.fromkeys(layer.component for layer in names.values()))
    count = len(tensors)
    if strangers or (odd and not parts):
        lost = strangers or odd
        whose = family(lost)
        raise UserError(
            f"{path}: keys of no layer of this model ({components}), so a LoRA for another one"
            f"{f', by their names {whose}' if whose else ''}: {len(lost)} of {count}: {shown(lost)}"
        )
    if odd:
        raise UserError(
            f"{path}: {len(odd)} of {count} keys are no part of an adapter that can be read: {shown(odd)}; the other "
            f"{count - len(odd)} fit this model"
        )
    if whole := [key for layer, own in wholes.items() if "on_input" not in parts[layer] for key in own]:
        raise UserError(
            f"{path}: {len(whole)} of {count} keys are whole weights of layers, not changes of them: {shown(whole)}; "
            "a whole model is loaded as a model"
        )
    for what, keys in passed.items():
        notes.append(f"{path}: {len(keys)} keys are passed over, {what}: {shown(keys)}")
    return parts, {layer.key(part): each for layer, own in parts.items() for part, each in own.items()}


def _bare_text(path: Path, component: str | None, layers: list[Layer], tensors: Mapping[str, Tensor]) -> str:
    """The text encoder that names of its layers without its own name are for.

    Of two text encoders the folder's name tells, else the shapes. Raises UserError where neither does.
    """
    encoders = list(dict.fromkeys(layer.component for layer in layers if layer.component != "unet"))
    if len(encoders) < 2 or component in encoders:
        return component if component in encoders else "".join(encoders)
    names = {each: bare_spellings(layer for layer in layers if layer.component == each) for each in encoders}
    keys = [
        (key, split)
        for key in tensors
        if (split := split_key(key)) and any(split[0] in n for n in names.values())
    ]
    fitting: list[str] = []
    for encoder, own in names.items():
        parts: dict[Layer, dict[str, Tensor]] = {}
        for key, (stem, part) in keys:
            if stem in own:
                parts.setdefault(own[stem], {})[part] = tensors[key]
        if all(stem in own for _, (stem, _) in keys) and _all_fit(parts, path):
            fitting.append(encoder)
    if keys and len(fitting) > 1:
        raise UserError(
            f"{path} fits {' and '.join(fitting)}: put it into a folder that has the name of the one that it is for"
        )
    return fitting[0] if fitting else encoders[0]


def _all_fit(parts: Mapping[Layer, Mapping[str, Tensor]], path: Path) -> bool:
    try:
        for layer, each in parts.items():
            LayerParts(layer, each, None, path).resolved()
    except UserError:
        return False
    return True


# Writing


def write_lora(
    path: str | Path,
    adapters: Mapping[str, Mapping[str, Plain]],
    layout: Layout = "diffusers",
    unet_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write plain LoRAs to one `.safetensors`, whole or not at all.

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
        Layer(component, where, name_of(where), tuple(up.shape[:1] + down.shape[1:])): (down, up, alpha)
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


def _kohya_rows(layers: list[Layer], unet_config: Mapping[str, Any]) -> list[Row]:
    """The rows that kohya's own trainers write: SDXL's U-Net by LDM's names, everything else by diffusers'."""
    xl = unet_config.get("addition_embed_type") == "text_time"
    ldm = names_in_ldm(layers, unet_config) if xl else {}
    rows: list[Row] = []
    for layer in layers:
        prefix = FLAT[layer.component][-1 if xl and layer.component != "unet" else 0]
        stem = prefix + ldm.get(layer, layer.name).replace(".", "_")
        rows.append(row(layer.key("alpha"), f"{stem}.alpha"))
        for ours, theirs in {"lora_A": "down", "lora_B": "up"}.items():
            rows.append(row(layer.key(f"{ours}.weight"), f"{stem}.lora_{theirs}.weight"))
    return rows


def _settings(adapter: Mapping[str, Plain]) -> dict[str, Any]:
    """Peft's settings for an adapter; names without `text_model.`, which match with it and without."""
    ranks = {name_of(path).removeprefix("text_model."): len(down) for path, (down, _, _) in adapter.items()}
    alphas = {name_of(path).removeprefix("text_model."): alpha for path, (_, _, alpha) in adapter.items()}
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
