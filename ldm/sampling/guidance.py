"""How a request is guided: by a second pass of the network without the prompt, or by telling it the scale."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import classifier_free


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; see `ldm.diffusion.guidance.classifier_free`, whose arguments these are.

    told: the network learned to draw as if guided, and is told the scale in its condition (Meng et al. 2023): it is
    called once, with the prompt, and rescale and interval have no effect.
    """

    scale: float | Tensor = 7.5
    rescale: float | Tensor = 0.0
    interval: tuple[float | Tensor, float | Tensor] = (0.0, math.inf)
    told: bool = False

    def of(self, wants: Collection[str]) -> "Guidance":
        """Return the guidance of a network that wants these parts in its condition."""
        return replace(self, told="guidance" in wants)

    @property
    def guides(self) -> bool:
        """Whether any image is guided here, so that the condition without the prompt is needed."""
        return not self.told and bool((torch.as_tensor(self.scale) > 1).any())

    def around(self, denoiser: Denoiser) -> Denoise:
        """Return the guided denoiser of one whose condition has, where this `guides`, both halves."""
        if self.told:
            return classifier_free(denoiser, 1.0)
        return classifier_free(denoiser, self.scale, self.rescale, self.interval)

    def notes(self, against: bool) -> list[str]:
        """Return what the user should know of settings without effect. against: whether there are negative prompts."""
        low, high = (torch.as_tensor(each) for each in self.interval)
        without = {
            "negative prompts": against,
            "guidance_rescale": bool((torch.as_tensor(self.rescale) > 0).any()),
            "guidance_interval": not bool((low <= 0).all() and (high == math.inf).all()),
        }
        listed = ", ".join(name for name, is_there in without.items() if is_there)
        if not self.told or not listed:
            return []
        return [f"without effect, for this model is told guidance_scale and the prompt alone: {listed}"]
