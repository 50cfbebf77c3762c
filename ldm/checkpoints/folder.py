"""The diffusers folder: `model_index.json` and one subfolder for each component."""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.files import (
    INDEX,
    a_few,
    read_tensors,
    read_text,
    write_tensors,
)
from ldm.checkpoints.layouts import canonical_clip, canonical_vae, is_clip
from ldm.checkpoints.paths import nearby, readable
from ldm.checkpoints.repairs import repair
from ldm.errors import UserError
from ldm.files import replaced_folder, write_text, writing
from ldm.foreign import json_object

MODEL_INDEX = "model_index.json"
PREVIEW = "vae_preview"  # a tiny autoencoder of the same latents; no model_index.json names it
OPEN_CLIP = "open_clip_config.json"
# diffusers', transformers', its old pickles', open_clip's
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
_NOT_READ = ("image_encoder", "feature_extractor", "controlnet")
_NO_COMPONENT = [None, None]
_LARGEST = 2**22  # bytes of a config
_COMPONENT = re.compile(r"\w[\w-]*(\.[\w-]+)*", re.ASCII)  # a plain name, that leads out of no folder
_VARIANT = re.compile(r"\.([A-Za-z]\w*)\.(?:safetensors|bin)$|\.index\.(\w+)\.json$")


# Reading


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError if it isn't there or isn't one."""
    return json_object(read_text(path, _LARGEST), path)


def read_index(folder: str | Path) -> dict[str, Any]:
    """Return a folder's model_index.json; UserError if the folder or the file is missing."""
    folder = Path(folder)
    with readable(folder):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder{nearby(folder)}")
        if not (folder / MODEL_INDEX).is_file():
            inside = a_few(sorted(each.name for each in folder.iterdir()), 6) or "nothing"
            raise UserError(f"{folder} is no saved system: it has no {MODEL_INDEX} (it has {inside})")
    return read_json(folder / MODEL_INDEX)


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the components that a model_index.json names, each with its library and its class.

    Raises UserError for a name that is not that of a folder beside it.
    """
    if odd := [name for name in index if not _COMPONENT.fullmatch(name)]:
        raise UserError(f"{MODEL_INDEX} names a component {odd[0][:60]!r}, and no folder can be called so")
    return {
        name: (str(value[0]), str(value[1]))
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value != _NO_COMPONENT
    }


def component_folder(folder: str | Path, component: str) -> Path:
    """Return a component's subfolder; UserError names what is there if it is missing."""
    path = Path(folder) / component
    with readable(path):
        if path.is_dir():
            return path
        inside = Path(folder).iterdir() if Path(folder).is_dir() else ()
        there = sorted(each.name for each in inside if each.is_dir())
        raise UserError(f"{folder} has no {component} (it has {a_few(there, 8) or 'no components'})")


def component_file(folder: str | Path, component: str, variant: str | None = None) -> Path:
    """Return the file with a component's weights, for `read_tensors`; for a sharded one, its index.

    Safetensors are preferred to pickles. A `variant` such as "fp16" stands in the files' names.

    Raises:
        UserError: no weights, or not in that variant (says which there are).
    """
    place = component_folder(folder, component)
    there = _names_in(place)
    if name := _weights_among(there, variant):
        return place / name
    weights = sorted(name for name in there if name.endswith((".safetensors", ".bin")))
    wanted = f"weights of variant {variant!r}" if variant else "weights without a variant"
    found = sorted({each[1] or each[2] for name in there if (each := _VARIANT.search(name))})
    hint = f": give variant={found[0]!r} (--variant {found[0]})" if found and not variant else ""
    raise UserError(f"{place} has no {wanted} (it has {a_few(weights) or 'no weights at all'}){hint}")


def _names_in(place: Path) -> set[str]:
    with readable(place):
        return {each.name for each in place.iterdir() if each.is_file()}


def _weights_among(names: Collection[str], variant: str | None) -> str | None:
    word = f".{variant}" if variant else ""
    for ending in (".safetensors", ".bin"):
        for stem in _STEMS:
            for name in (f"{stem}{word}{ending}", f"{stem}{ending}{INDEX.removesuffix('.json')}{word}.json"):
                if name in names:
                    return name
    return None


def read_component(
    folder: str | Path, component: str, variant: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a network's config and its tensors, under today's names where older versions had others.

    Of an OpenCLIP checkpoint, as its hub's repositories are, the config is open_clip's own `model_cfg`.
    """
    place = component_folder(folder, component)
    with readable(place):
        theirs = (place / OPEN_CLIP).is_file() and not (place / "config.json").is_file()
    config = read_json(place / (OPEN_CLIP if theirs else "config.json"))
    if theirs:
        found = config.get("model_cfg", config)
        if not isinstance(found, dict):
            raise UserError(f"{place / OPEN_CLIP}: model_cfg must hold named entries")
        return found, read_tensors(component_file(folder, component, variant))
    tensors = read_tensors(component_file(folder, component, variant))
    if config.get("_class_name") in ("AutoencoderKL", "VQModel"):
        tensors = canonical_vae(tensors)
    elif is_clip(tensors):
        tensors = canonical_clip(tensors)
    return config, tensors


def read_folder(folder: str | Path, variant: str | None = None) -> Checkpoint:
    """Return the system in a diffusers folder: the networks' configs and tensors, the scheduler's config.

    Tokenizers stay where they are. A safety checker, image encoders and ControlNets are not read. Components without
    weights in the `variant` are read without it, and old configs are mended, both as diffusers does and with a note.

    Raises:
        UserError: the folder or a component that it promises is missing or can't be read, or nothing in it has weights
            in the variant.
    """
    folder = Path(folder)
    index = read_index(folder)
    named = components(index)
    found = Checkpoint(str(index.get("_class_name", "")), {}, {})
    found.options = {
        name: each for name, each in index.items() if name[0] != "_" and not isinstance(each, list)
    }
    plain: list[str] = []  # the components that are there without the variant only
    for component in named:
        if component == "safety_checker":
            found.notes.append("not used: the folder's safety checker")
        elif component in _NOT_READ:
            continue
        elif component == "scheduler":
            found.configs[component] = read_json(
                component_folder(folder, component) / "scheduler_config.json"
            )
        elif not component.startswith("tokenizer"):
            there = _names_in(component_folder(folder, component)) if variant else set[str]()
            other = bool(there) and not _weights_among(there, variant) and _weights_among(there, None)
            plain += [component] if other else []
            own = None if other else variant
            found.configs[component], found.tensors[component] = read_component(folder, component, own)
    if variant and plain:
        if len(plain) == len(found.tensors):
            raise UserError(
                f"{folder} has no weights of variant {variant!r} in any part: leave the variant out"
            )
        found.notes.append(f"not of variant {variant!r}, which they don't have: {', '.join(plain)}")
    repair(found, named)
    return found


# Writing


def write_component(
    folder: str | Path, component: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a component's config, and its weights if it has any, into a system's folder."""
    place = Path(folder) / component
    name = "config.json" if tensors is not None else "scheduler_config.json"
    write_text(place / name, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tensors is not None:
        stem = _STEMS[0] if "_class_name" in config else _STEMS[1]
        write_tensors(place / f"{stem}.safetensors", tensors)


def write_folder(target: str | Path, system: Checkpoint, also: Callable[[Path], None] | None = None) -> None:
    """Write a system as a diffusers folder, whole or not at all; an older system of that name is replaced.

    Args:
        target: the folder. If it exists, it must be empty or a saved system.
        system: configs and tensors; a component without tensors is a scheduler.
        also: called with the new folder to add what a Checkpoint doesn't hold: `tokenizer/` and the like.

    Raises:
        UserError: the place can't be written to, or holds something else.
    """
    with whole_folder(target) as folder:
        for component, config in system.configs.items():
            write_component(folder, component, config, system.tensors.get(component))
        if also is not None:
            also(folder)
        write_text(
            folder / MODEL_INDEX, json.dumps(_index_of(folder, system), indent=2, sort_keys=True) + "\n"
        )


def _index_of(folder: Path, system: Checkpoint) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": system.pipeline, "_diffusers_version": "0.30.0", **system.options}
    if system.pipeline.startswith(("StableDiffusion", "LatentConsistencyModel")):
        index |= {name: _NO_COMPONENT for name in ("feature_extractor", "image_encoder")}
        if not system.pipeline.startswith("StableDiffusionXL"):
            index |= {"safety_checker": _NO_COMPONENT, "requires_safety_checker": False}
        elif "text_encoder" not in system.configs:  # SDXL's refiner
            index |= {name: _NO_COMPONENT for name in ("text_encoder", "tokenizer")}
    for component, config in system.configs.items():
        if "_class_name" in config:
            index[component] = ["diffusers", config["_class_name"]]
        else:
            index[component] = ["transformers", (config.get("architectures") or ["AutoModel"])[0]]
    for tokenizer in sorted(folder.glob("tokenizer*/tokenizer_config.json")):
        index[tokenizer.parent.name] = [
            "transformers",
            read_json(tokenizer).get("tokenizer_class", "CLIPTokenizer"),
        ]
    return index


@contextmanager
def whole_folder(target: str | Path, network: str = "") -> Iterator[Path]:
    """Give a new folder beside `target` to fill; it takes the place of `target` once the block ends well.

    The old system is moved away only when the new one is whole and on the disk; what lay in its folder
    besides its components (a model card, logs) is kept. If the block fails, the old one is as it was and the
    new one is removed.

    Args:
        target: the folder.
        network: the class, by diffusers' name, of one network that the folder is of; "" for a whole system.

    Raises:
        UserError: the place can't be written to, or `target` holds something that isn't such a system or network.
    """
    target = Path(target).resolve()
    with writing(target):
        if target.exists() and not _may_replace(target, network):
            raise UserError(
                f"can't write {target}: it is there already and is no saved {network or 'system'}; choose another "
                "folder"
            )
    with replaced_folder(target) as new:
        yield new
        if target.exists():
            _keep_the_rest(target, new, network)


def _may_replace(target: Path, network: str) -> bool:
    if not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    if not network:
        return (target / MODEL_INDEX).is_file()
    config = target / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == network


def _keep_the_rest(old: Path, new: Path, network: str) -> None:
    if network:
        named = {"config.json", *(each.name for each in old.glob(f"{_STEMS[0]}*"))}
    else:
        named = (
            {*components(read_index(old)), MODEL_INDEX, PREVIEW} if (old / MODEL_INDEX).is_file() else set()
        )
    for each in old.iterdir():
        if each.name not in named and not (new / each.name).exists():
            copy = shutil.copytree if each.is_dir() else shutil.copy2
            copy(each, new / each.name)
