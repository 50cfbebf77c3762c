"""What a picture says of how it was made, to be drawn again: a recipe of ours, or what other programs write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.infotext import Infotext, infotext_in, texts_of
from pipelines.named_files import loras_in
from pipelines.recipe import KEYWORD, Recipe, read_recipe
from pipelines.uses import BUNDLED, LoRAUse, UpscalerUse


@dataclass(frozen=True)
class Again:
    """A recipe out of a picture, and what the user should know of it. foreign: another program wrote it."""

    recipe: Recipe
    notes: tuple[str, ...] = ()
    foreign: bool = False


def read_again(path: str | Path, lora_folders: Sequence[Path] = ()) -> Again:
    """Read how a picture was made.

    lora_folders: where LoRAs that another program names are looked for; nothing else that it names is. Raises
    UserError where the picture says nothing that is known here.
    """
    texts = texts_of(path)
    found = None if KEYWORD in texts else infotext_in(texts, path)
    if found is None:
        return Again(read_recipe(path))  # which says so where there is none
    return _of_others(found, path, lora_folders)


def _of_others(found: Infotext, path: str | Path, folders: Sequence[Path]) -> Again:
    notes = [f"{path} was drawn by {found.program}", *found.notes]
    weights: dict[str, float] = {}
    for each in found.loras:  # of one that is named twice the weights add up
        weights[each.name] = weights.get(each.name, 0.0) + each.weight
    loras: list[LoRAUse] = []
    files = loras_in(folders) if weights else {}
    for name, weight in weights.items():
        if name in files:
            loras.append(LoRAUse(str(files[name]), weight, name=name))
        else:
            missing = "is in none of these folders" if folders else "is not looked for"
            notes.append(f"the LoRA {name} {missing}: --lora PATH, or --lora-folder FOLDER, gives it")
    if found.model:
        notes.append(f"its model was {found.model}: --model PATH gives it")
    recipe = replace(found.recipe(), prompt_syntax=found.prompt_syntax, loras=tuple(loras))
    second = _second_pass(recipe, found.beyond, notes)
    return Again(replace(recipe, **second), tuple(notes), foreign=True)


def _second_pass(recipe: Recipe, beyond: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """AUTOMATIC1111's hires fix in our words."""
    scale = beyond.get("hr_scale")
    if scale is None and beyond.get("hr_resize_x") and recipe.width:
        scale = beyond["hr_resize_x"] / recipe.width
    if scale is None or scale < 1:
        if any(name.startswith("hr_") for name in beyond):
            notes.append("its second pass is left out: the text names no larger size that can be taken")
        return {}
    name = str(beyond.get("hr_upscaler", "Latent"))
    upscaler = None
    if name.startswith("Latent"):
        if name != "Latent":
            notes.append(f"its upscaler {name} stretches latents otherwise than here")
    else:
        upscaler = UpscalerUse(BUNDLED)
        notes.append(
            f"its upscaler {name} is not looked for: --hires-upscaler FILE gives it; the bundled one is taken"
        )
    return {
        "hires_scale": float(scale),
        "hires_steps": int(beyond["hr_second_pass_steps"]) if beyond.get("hr_second_pass_steps") else None,
        "hires_strength": beyond.get("hr_denoising_strength"),
        "hires_upscaler": upscaler,
    }
