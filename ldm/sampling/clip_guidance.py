"""Guidance of a request by a CLIP: its pictures are pulled towards texts (GLIDE, Nichol et al. 2022, sec. 2.4).

clip = load_clip("runs/clip/run/export/clip", system.autoencoder, system.text)
guide = CLIPGuidance.towards(clip, ["a red fox"], scale=1.0)
request = guided(prepare(system, plan, ["a fox"], [0], guidance=Guidance(1.0)), [guide])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning.clip import LatentCLIP
from ldm.conditioning.clip_models import PictureCLIP
from ldm.conditioning.prompts.weighted import Text
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.plan import Plan
from ldm.errors import UserError


@dataclass(frozen=True)
class CLIPGuidance:
    """A CLIP and the texts that B pictures are pulled towards.

    texts: their features, (B, D), or (1, D) for all. scale: of the gradient of log p(text | x), one or (B,).
    """

    clip: LatentCLIP | PictureCLIP
    texts: Tensor
    scale: float | Tensor = 1.0

    @classmethod
    def towards(
        cls, clip: LatentCLIP | PictureCLIP, prompts: Sequence[Text], scale: float | Tensor = 1.0
    ) -> "CLIPGuidance":
        """Guide towards prompts: one for all pictures, or one each."""
        return cls(clip, clip.text_features(prompts), scale)

    def check(self, plan: Plan, shape: tuple[int, ...], rows: int) -> None:
        """See `Guide` of `likelihood_guidance`."""
        scale = torch.as_tensor(self.scale)
        if len(self.texts) not in (1, rows) or scale.ndim > 1 or scale.numel() not in (1, rows):
            raise UserError(
                f"a CLIP is given {len(self.texts)} prompts and {scale.numel()} scales for {rows} pictures: give one, "
                "or one each"
            )
        if not bool(scale.isfinite().all()):
            raise UserError(f"the CLIP's scale is {self.scale!r:.60}: give a finite number, or one a picture")

    def around(self, denoise: Denoise, plan: Plan) -> Denoise:
        """Return the guided denoiser of a run under this plan."""
        return self.clip.around(denoise, self.texts, self.scale)
