"""All that a pipeline has loaded beside its system."""

from collections.abc import Sequence

import torch

from ldm.system import System
from pipelines.adapters import Adapters
from pipelines.controlnets import ControlNets
from pipelines.enlarging import Upscalers
from pipelines.image_prompts import ImageAdapters
from pipelines.recipe import Recipe
from pipelines.turns import Turns


class Loaded:
    """LoRAs and new words, ControlNets, IP-Adapters and upscaling networks of one pipeline."""

    def __init__(self, system: System, device: torch.device, turns: Turns):
        self.adapters = Adapters(system, device, turns)
        self.controlnets = ControlNets(system, device, turns)
        self.image_adapters = ImageAdapters(system, device, turns)
        self.upscalers = Upscalers(device)

    def to(self, device: torch.device) -> None:
        """Follow the system to a device and into its precision, within a turn."""
        self.adapters.to(device)
        self.controlnets.to(device)
        self.image_adapters.to(device)
        self.upscalers.to(device)

    def load_again(self, recipes: Sequence[Recipe]) -> list[str]:
        """Load the ControlNets and IP-Adapters that recipes name; returns notes on what has changed since.

        It loads from anywhere: of a stranger's recipe look at the paths first. Raises UserError.
        """
        notes = self.controlnets.load_again(use for recipe in recipes for use in recipe.controls)
        notes += self.image_adapters.load_again(use for recipe in recipes for use in recipe.image_prompts)
        return list(dict.fromkeys(notes))
