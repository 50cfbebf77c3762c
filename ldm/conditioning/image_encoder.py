"""Image encoders: CLIP's vision tower (Radford et al. 2021) from a folder of transformers, and what it is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component
from ldm.conditioning.network_settings import network_settings
from ldm.conditioning.text import execution_device
from ldm.conditioning.tokenizer import quiet
from ldm.data.pictures import rgb
from ldm.errors import UserError
from ldm.foreign import foreign

if TYPE_CHECKING:
    from PIL.Image import Image

_CLASS = "CLIPVisionModelWithProjection"
_PARTS = ("vision_model.", "visual_projection.")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that CLIP was trained on
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LARGEST = 4096  # pixels along a side, and positions along one
_LONGEST = 100  # times as long as wide: what is longer would be made huge before it is cropped


@dataclass
class ImageEncoder:
    """A frozen CLIP vision tower with its projection.

    Attributes:
        module: transformers' CLIPVisionModelWithProjection.
        size: of the pictures that it sees, in pixels along a side.
    """

    module: nn.Module
    size: int

    @property
    def config(self) -> Any:
        """transformers' own."""
        return self.module.config

    def pixels(self, pictures: "Sequence[Image | np.ndarray]") -> Tensor:
        """Return pictures as the network sees them, see `clip_pixels`."""
        return clip_pixels(pictures, self.size)

    def embeds(self, pixels: Tensor) -> Tensor:
        """Return one vector (N, P) of each picture of `pixels` (N, 3, size, size)."""
        return self._run(pixels).image_embeds

    def states(self, pixels: Tensor) -> Tensor:
        """Return the states (N, L, C) before the last layer: of the whole picture, then of its patches."""
        return self._run(pixels, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def _run(self, pixels: Tensor, **options: bool) -> Any:
        dtype = next(self.module.parameters()).dtype
        return self.module(pixels.to(execution_device(self.module), dtype), **options)


def load_image_encoder(
    folder: str | Path,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> ImageEncoder:
    """Load a folder that transformers' CLIPVisionModelWithProjection was saved to, as IP-Adapters have one beside them.

    A whole CLIPModel's will do. variant: "fp16" reads the files of that name. Raises UserError.
    """
    config, tensors = read_component(folder, "", variant)
    where = str(folder)
    own = config.get("vision_config", config)
    named = config.get("architectures")
    kind = str(named[0]) if isinstance(named, list) and named else str(config.get("model_type", _CLASS))
    if not isinstance(own, Mapping) or kind not in (_CLASS, "CLIPModel", "clip", "clip_vision_model"):
        raise UserError(f"{where} holds a {kind:.60}, and no image encoder: a {_CLASS} is needed")
    if own is not config:
        own = {**own, "projection_dim": config.get("projection_dim", own.get("projection_dim"))}
    kept = {
        name: each
        for name, each in tensors.items()
        if name.startswith(_PARTS) and not name.endswith("position_ids")
    }
    module = _build(own, kept, where)
    module = module.to(device=device, dtype=torch_dtype).eval().requires_grad_(False)
    return ImageEncoder(module, module.config.image_size)


def _build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Any:
    from accelerate import init_empty_weights

    settings = network_settings(config, "clip_vision", len(tensors), where)
    with quiet():
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        with foreign(f"{where}:", "transformers refuses the config"):
            kind: Any = CLIPVisionConfig
            known = kind(**settings, attn_implementation="sdpa")
        _check_positions(known, tensors, where)
        with (
            foreign(f"{where}:", "transformers refuses the config"),
            init_empty_weights(include_buffers=False),
        ):
            module = CLIPVisionModelWithProjection(known)
    load_strict(module, tensors, where)
    return module


def _check_positions(config: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError for a size or patches of which the file has no positions: a table of them is built, not read."""
    table = tensors.get("vision_model.embeddings.position_embedding.weight")
    found = 0 if table is None else table.shape[0] if table.ndim else 0
    positions = (config.image_size // config.patch_size) ** 2 + 1
    if config.image_size > _LARGEST or config.num_channels != 3 or positions != found:
        raise UserError(
            f"{where}: pictures of {config.image_size} pixels a side and {config.num_channels} channels, in patches of "
            f"{config.patch_size}, have {positions} positions, and the file's table has {found}"
        )


def clip_pixels(pictures: "Sequence[Image | np.ndarray]", size: int) -> Tensor:
    """Bring pictures to what a CLIP of `size` sees, (N, 3, size, size) float32, as its CLIPImageProcessor does.

    The shorter side is resized to `size` (bicubic), the middle cropped, the colours normalised. pictures: of PIL in any
    mode, turned as their EXIF says, clear parts over white; or uint8 (H, W, 3). Raises UserError for others.
    """
    return torch.from_numpy(np.stack([_seen(each, size) for each in pictures]))


def clip_pixels_of(
    pictures: Tensor, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Do as `clip_pixels` with pictures (B, 3, H, W) in [0, 1], differentiably and on their device.

    It does not round to 8 bits between, as PIL does; mean, std: of each colour.
    """
    height, width = pictures.shape[2:]
    short = min(height, width)
    if short != size or height != width:
        wide = (int(size * height / short), int(size * width / short))
        pictures = F.interpolate(pictures, wide, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - size) // 2 for side in pictures.shape[2:])
    pictures = pictures[:, :, top : top + size, left : left + size]
    centre, spread = (pictures.new_tensor(each)[:, None, None] for each in (mean, std))
    return (pictures - centre) / spread


def _seen(picture: "Image | np.ndarray", size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UserError(
                f"an image prompt is an array of {picture.dtype} {picture.shape}: give uint8 (H, W, 3), or a "
                "picture of PIL's"
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise UserError(
            f"an image prompt is a {type(picture).__name__}: give a picture of PIL's, or an array"
        )
    with foreign("an image prompt"):
        picture = Image.fromarray(rgb(ImageOps.exif_transpose(picture)))
    short, long = sorted(picture.size)
    if not short or long > _LONGEST * short:
        raise UserError(
            f"an image prompt has {picture.width} x {picture.height} pixels: at most {_LONGEST} times as long as wide "
            "is taken"
        )
    grown = int(size * long / short)
    wide = (size, grown) if picture.width <= picture.height else (grown, size)
    pixels = np.asarray(picture.resize(wide, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    pixels = pixels[top : top + size, left : left + size].astype(np.float64) * (1 / 255)
    normed = (pixels.astype(np.float32) - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return normed.transpose(2, 0, 1)
