"""The single-file LDM layout: the U-Net, autoencoder and text encoders of SD 1.x, 2.x, XL or its refiner."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.families import (
    FAMILIES,
    GUIDANCE,
    UNET,
    VAE,
    detect_family,
    family_configs,
    family_of_configs,
    pipeline_class,
)
from ldm.checkpoints.files import a_few, read_metadata, read_tensors, write_tensors
from ldm.checkpoints.keymap import KeyMap, Row, below
from ldm.checkpoints.layouts import canonical_clip, clip_rows, open_clip_rows, unet_rows, vae_rows
from ldm.checkpoints.passengers import other_model, refuse_relatives, set_aside, unwrapped
from ldm.checkpoints.stated import stated
from ldm.errors import UserError
from ldm.foreign import json_object

_GUIDANCE_IN_LDM = (
    UNET + "time_embed.cond_proj.weight"
)  # as it is where all of the layout's names are followed
CONFIGS = "ldm.configs"  # the metadata entry in which our own single files carry what tensors can't say


def read_single_file(path: str | Path, prediction_type: str | None = None) -> Checkpoint:
    """Return the system in a single-file checkpoint.

    The configs come from the file's own metadata where we wrote it, otherwise from the table of its family and from
    what the file says of itself (see `stated`). What wrappers of training put into the names is taken off.

    Args:
        path: safetensors, or a pickle (read without running its code), whatever its name.
        prediction_type: "epsilon" or "v_prediction", in place of what the file says (see `family_configs`).

    Raises:
        UserError: unreadable, another family, unknown names.
    """
    tensors, notes = unwrapped(read_tensors(path))
    if _GUIDANCE_IN_LDM in tensors:
        tensors[GUIDANCE] = tensors.pop(_GUIDANCE_IN_LDM)
    found = from_tensors(tensors, read_metadata(path), path, prediction_type)
    found.notes[:0] = notes
    return found


def from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: str | Path,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Return the system in the tensors and the metadata of a single file; see `read_single_file`."""
    family = detect_family(tensors)
    if family is None:
        known = ", ".join(each.title for each in FAMILIES.values())
        other = other_model(tensors, metadata.get("modelspec.architecture", ""))
        what = (
            f"this is {other}" if other else f"no family has names like {a_few(list(tensors), 1) or 'none'}"
        )
        raise UserError(f"{path}: {what}; single files of {known} can be read")
    refuse_relatives(tensors, path)
    found = _said_in(metadata, path, family, tensors) or _by_family(
        family, tensors, metadata, path, prediction_type
    )
    if prediction_type:
        found.configs["scheduler"]["prediction_type"] = prediction_type
    found.unused, notes = set_aside(tensors, family, found.configs[next(iter(FAMILIES[family].text))])
    found.notes += notes
    for component, rows in _rows(family, found.configs).items():
        prefix = _prefix(family, component)
        own = {
            name: each
            for name, each in tensors.items()
            if name.startswith(prefix) and name not in found.unused
        }
        if not own:
            raise UserError(f"{path}: no {component} inside (nothing is named {prefix}...)")
        own = _with_clip_prefix(own) if _kind(family, component) == "clip" else own
        found.tensors[component] = KeyMap.over_theirs(rows, own, path).to_ours(own)
    known = tuple(_prefix(family, component) for component in found.tensors)
    unknown = [name for name in tensors if not name.startswith(known) and name not in found.unused]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} names are of no part of {FAMILIES[family].title}: {a_few(unknown)}"
        )
    return found


def write_single_file(path: str | Path, system: Checkpoint) -> None:
    """Write a system as one `.safetensors` in the LDM layout, whole or not at all.

    Tokenizers have no place in this layout. The configs travel in the file's metadata, so that reading it
    back needs no table and no guess.

    Args:
        path: where to.
        system: a system of SD 1.x, 2.x, XL or its refiner's structure, of any size.

    Raises:
        UserError: a network or a tensor that the layout has no place for; an unwritable place.
    """
    family = family_of_configs(system.configs, path)
    tensors: dict[str, Tensor] = {}
    for component, rows in _rows(family, system.configs).items():
        if component not in system.tensors:
            raise UserError(f"{path}: the system to write has no {component}")
        own = system.tensors[component]
        tensors |= KeyMap.over_ours(rows, own, f"{component} of {path}").to_theirs(own)
    said = {"pipeline": system.pipeline, "configs": system.configs, "options": system.options}
    write_tensors(path, tensors, {CONFIGS: json.dumps(said)})


def _kind(family: str, component: str) -> str:
    return FAMILIES[family].text.get(component, ("", component))[1]


def _prefix(family: str, component: str) -> str:
    return {"unet": UNET, "vae": VAE}.get(component) or FAMILIES[family].text[component][0]


def _rows(family: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Return the rows of each network of a system, with the prefixes they have in the file."""
    rows = {"unet": unet_rows(configs["unet"]), "vae": vae_rows(configs["vae"])}
    for component, (_, kind) in FAMILIES[family].text.items():
        rows[component] = (
            clip_rows() if kind == "clip" else open_clip_rows(configs[component]["num_hidden_layers"])
        )
    return {component: below(_prefix(family, component), each) for component, each in rows.items()}


def _said_in(
    metadata: Mapping[str, str], path: str | Path, family: str, tensors: Mapping[str, Tensor]
) -> Checkpoint | None:
    """Return what the metadata of our own single files says of their system; None for anybody else's."""
    if CONFIGS not in metadata:
        return None
    where = f"{path}: the configs in its metadata ({CONFIGS})"
    said = json_object(metadata[CONFIGS], where)
    configs, options = said.get("configs"), said.get("options", {})
    needed = ("unet", "vae", "scheduler", *FAMILIES[family].text)
    if not isinstance(configs, dict) or not isinstance(options, dict):
        raise UserError(f"{where} can't be read: configs and options must be mappings")
    if absent := [name for name in needed if not isinstance(configs.get(name), dict)]:
        raise UserError(f"{where} can't be read: nothing is said of {' and '.join(absent)}")
    kept = {name: dict(each) for name, each in configs.items() if isinstance(each, dict)}
    _check_layout(kept, len(tensors), where)
    return Checkpoint(str(said.get("pipeline", "")), kept, {}, dict(options))


def _check_layout(configs: Mapping[str, Mapping[str, Any]], tensors: int, where: str) -> None:
    """Raise UserError for settings of which no rows of names can be made; all others the networks check themselves."""
    listed = {"unet": ("down_block_types", "up_block_types"), "vae": ("block_out_channels",)}
    for component, keys in listed.items():
        for key in keys:
            value = configs[component].get(key)
            kind = int if component == "vae" else str
            if not isinstance(value, list) or not value or not all(type(each) is kind for each in value):
                raise UserError(
                    f"{where} can't be read: {key} of the {component} is {value!r:.60}, where a list is needed"
                )
    counts = [(name, "layers_per_block", 2) for name in listed]
    counts += [(name, "num_hidden_layers", 12) for name in configs if name.startswith("text_encoder")]
    for component, key, usual in counts:
        value = configs[component].get(key, usual)
        if type(value) is not int or not 1 <= value <= tensors:
            raise UserError(
                f"{where} can't be read: {key} of the {component} is {value!r:.60}, for {tensors} tensors"
            )


def _by_family(
    family: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: str | Path,
    prediction_type: str | None,
) -> Checkpoint:
    """Return what is known of a published single file: by its family, and from what it says of itself."""
    said = stated(tensors, metadata, path)
    if said.other and not prediction_type:
        raise UserError(
            f"{path}: {said.other}, which is another way of denoising than Stable Diffusion's; where that is wrong, "
            "say prediction_type (--prediction-type epsilon or v_prediction)"
        )
    configs = family_configs(family, tensors, path, prediction_type, said)
    pipeline, options = pipeline_class(family, configs["unet"]), dict(FAMILIES[family].options)
    found = Checkpoint(pipeline, configs, {}, options, notes=said.notes)
    if GUIDANCE in tensors:
        found.notes.append(
            "its U-Net is told the guidance scale: taken for a latent consistency model (LCMScheduler)"
        )
    if family == "sd2" and not prediction_type and "prediction_type" not in said.scheduler:
        guess = configs["scheduler"]["prediction_type"]
        found.notes.append(f"the file doesn't say what its U-Net predicts: {guess} is assumed")
    return found


def _with_clip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP text encoder's tensors by their usual names; some merged files lack the `text_model.`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, middle, tail = name.partition("transformer.")
        renamed[head + middle + next(iter(canonical_clip({tail: tensor})))] = tensor
    return renamed
