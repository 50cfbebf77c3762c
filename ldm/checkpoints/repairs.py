"""What diffusers mends in folders of older versions, and of people, before it draws with them; each with a note."""

import re
from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

from ldm.checkpoints.checkpoint import Checkpoint

_CLIP_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
# Classes of a whole model with a ControlNet beside it: the model's own class is what is left of the name.
_WITH_CONTROLNET = re.compile(r"(StableDiffusion(?:XL)?)ControlNet(?:Union)?((?:Img2Img|Inpaint)?Pipeline)")


def repair(system: Checkpoint, named: Mapping[str, tuple[str, str]]) -> None:
    """Change a folder's configs as diffusers' loaders and pipelines do, and note it.

    Args:
        system: what was read; its configs and notes change.
        named: library and class of each component, from model_index.json.
    """
    for component, (library, class_name) in named.items():
        if component in system.configs:
            _take_class(system, component, library, class_name)
    if beside := _WITH_CONTROLNET.fullmatch(system.pipeline):
        system.pipeline = beside[1] + beside[2]
        system.notes.append("not used: the folder's ControlNet, which is loaded by itself")
    if "XL" in system.pipeline or not system.pipeline.startswith("StableDiffusion"):
        return
    unet, scheduler = (system.configs.get(name, {}) for name in ("unet", "scheduler"))
    side = unet.get("sample_size")
    if isinstance(side, int) and side < 64 and _before(unet.get("_diffusers_version"), "0.9.0.dev0"):
        unet["sample_size"] = 64
        system.notes.append(
            f"the U-Net's sample_size is taken to be 64, not {side}: diffusers before 0.9 wrote a wrong one"
        )
    runge_kutta = scheduler.get("_class_name") == "PNDMScheduler" and not scheduler.get(
        "skip_prk_steps", False
    )
    if "Inpaint" in system.pipeline and runge_kutta:
        scheduler["skip_prk_steps"] = True
        system.notes.append("skip_prk_steps is taken to be true, as diffusers' inpainting has it")


def _take_class(system: Checkpoint, component: str, library: str, class_name: str) -> None:
    """Let the class in model_index.json count, not the one in the component's own config, where they differ."""
    config = system.configs[component]
    if library == "diffusers":
        own = config.get("_class_name", class_name)
        config["_class_name"] = class_name
    elif class_name in _CLIP_CLASSES and config.get("architectures"):
        listed = config["architectures"]
        own = listed[0] if isinstance(listed, list) and listed[0] in _CLIP_CLASSES else class_name
        if own != class_name:  # whether it projects its text; other classes hold more than a text encoder
            config["architectures"] = [class_name]
    else:
        return
    if own != class_name:
        system.notes.append(
            f"the {component} is a {class_name}, as model_index.json has it; its own config says {str(own)[:60]}"
        )


def _before(version: object, bound: str) -> bool:
    try:
        return Version(Version(str(version)).base_version) < Version(bound)
    except InvalidVersion:
        return False
