"""What a call gives: latents to pictures in the form that is asked for, and their recipes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import to_numpy, to_pil
from ldm.sampling import decode
from pipelines.canvas import Canvas
from pipelines.files import check_target, save_picture
from pipelines.recipe import Recipe

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass(frozen=True)
class TextToImageOutput:
    """What a call drew.

    images: PIL pictures; or one array (B, H, W, 3) in [0, 1] ("np"), one tensor (B, 3, H, W) in [0, 1] ("pt"), or
        latents (B, C, h, w) as the U-Net has them ("latent"); prompt by prompt, `num_images_per_prompt` each.
    recipes: how to draw each image again, nothing left open.
    notes: what the caller should know, such as how a long prompt was read.
    """

    images: Any
    recipes: list[Recipe]
    notes: list[str] = field(default_factory=list)

    def save(self, path: str | Path, infotext: bool = False) -> list[Path]:
        """Save PIL pictures with their recipes, one to a `.png`, or all into a folder. Raises UserError.

        infotext: write AUTOMATIC1111's `parameters` too, for other programs.
        """
        if not isinstance(self.images, list):
            raise UserError('only output_type "pil" gives pictures that can be saved')
        check_target(Path(path), len(self.images))
        pairs = zip(self.images, self.recipes, strict=True)
        return [save_picture(picture, recipe, Path(path), infotext) for picture, recipe in pairs]


def pictures(
    autoencoder: AutoencoderKL,
    latents: Tensor,
    output_type: OutputType,
    canvases: Sequence[Canvas | None],
    enlarge: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """The `images` of a TextToImageOutput, of latents (B, C, h, w), each on its canvas.

    enlarge: makes finished pictures (1, 3, H, W) in [0, 1] larger. Raises UserError where they come out as NaN, or are
    of several sizes and one array is wanted.
    """
    if output_type == "latent":
        return latents
    decoded = decode(autoencoder, latents)
    if not bool(decoded.isfinite().all()):
        raise UserError(
            "the picture came out as NaN: in float16 some models overflow (take float32 or bfloat16); else the "
            "guidance_scale is far too high, or the weights are damaged"
        )
    finished = [
        each if canvas is None else canvas.finish(each.float().cpu())
        for each, canvas in zip(decoded, canvases, strict=True)
    ]
    if enlarge is not None:
        finished = [enlarge(each[None].float())[0] for each in finished]
    if output_type == "pil":
        return [picture for each in finished for picture in to_pil(each[None])]
    if len({each.shape for each in finished}) > 1:
        raise UserError(
            f'the pictures are of several sizes, and output_type "{output_type}" makes one array of them: take "pil"'
        )
    stacked = torch.stack([each.to(decoded.device) for each in finished])
    return to_numpy(stacked) if output_type == "np" else stacked
