"""All that a pipeline has loaded beside its system."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.checkpoints.files import a_few
from ldm.conditioning.prompts.reading import read_prompt
from ldm.errors import UserError
from ldm.system import System
from pipelines.adapters import Adapters
from pipelines.clips import CLIPs
from pipelines.controlnets import ControlNets
from pipelines.enlarging import Upscalers
from pipelines.image_prompts import ImageAdapters
from pipelines.limits import check_texts
from pipelines.named_files import loras_in
from pipelines.recipe import Recipe
from pipelines.turns import Turns
from pipelines.uses import LoRAUse


class Loaded:
    """LoRAs and new words, ControlNets, IP-Adapters, CLIPs and upscaling networks of one pipeline."""

    def __init__(self, system: System, device: torch.device, turns: Turns):
        self.adapters = Adapters(system, device, turns)
        self.controlnets = ControlNets(system, device, turns)
        self.image_adapters = ImageAdapters(system, device, turns)
        self.clips = CLIPs(system, device)
        self.upscalers = Upscalers(device)

    def to(self, device: torch.device) -> None:
        """Follow the system to a device and into its precision, within a turn."""
        self.adapters.to(device)
        self.controlnets.to(device)
        self.image_adapters.to(device)
        self.clips.to(device)
        self.upscalers.to(device)

    def load_for(self, recipes: Sequence[Recipe], lora_folders: Sequence[Path] = ()) -> list[str]:
        """Load what recipes name, and isn't loaded: ControlNets, IP-Adapters, CLIPs, upscalers, LoRAs of prompts.

        lora_folders: where these are looked for by their names; they get weight 0 for other prompts. Of a stranger's
        recipe look at the paths first: all else is loaded from anywhere. Returns notes, of changed files and the like.
        Raises UserError.
        """
        notes = self.controlnets.load_again(use for recipe in recipes for use in recipe.controls)
        notes += self.image_adapters.load_again(use for recipe in recipes for use in recipe.image_prompts)
        clips = dict.fromkeys(recipe.clip_model for recipe in recipes if recipe.clip_model is not None)
        notes += self.clips.changed(clips)
        networks = (use for recipe in recipes for use in (recipe.hires_upscaler, recipe.upscaler))
        notes += self.upscalers.changed(dict.fromkeys(use for use in networks if use is not None))
        names: dict[str, None] = {}
        for recipe in recipes:
            check_texts(recipe)
            prompt = read_prompt(recipe.prompt, recipe.prompt_syntax)  # its LoRAs are the same for any steps
            names |= dict.fromkeys(lora.name for lora in prompt.loras)
        wanted = [name for name in names if name not in self.adapters.weights()]
        found = loras_in(lora_folders) if wanted else {}
        for name in wanted if lora_folders else ():
            if (file := found.get(name)) is None:
                raise UserError(
                    f"no file of the LoRA {name} is in {a_few([str(each) for each in lora_folders])}"
                )
            notes += self.adapters.load_again([LoRAUse(str(file), 0.0, name=name)], [])
        return list(dict.fromkeys(notes))
