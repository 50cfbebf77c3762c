"""The pictures that others are drawn from: as they are handed to a call, and as a recipe names them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.files import file_hash
from ldm.data.pictures import decode
from ldm.errors import UserError
from ldm.foreign import read_plain
from ldm.pictures import open_raster
from pipelines.canvas import mask_of, pixels_of
from pipelines.files import whole_path
from pipelines.recipe import PictureUse

if TYPE_CHECKING:
    from PIL.Image import Image

# A picture as a call takes it, or several; a tensor (C, h, w) of other than three channels is latents.
Original: TypeAlias = "str | Path | Image | np.ndarray | Tensor"
Originals: TypeAlias = "Original | Sequence[Original]"


def originals_for(
    given: Any, count: int, each_prompt: int, name: str
) -> tuple[list[PictureUse | None], list[np.ndarray | Tensor | None]]:
    """What recipes say of the picture of each of a call's `count` images, and the pictures that are no files.

    given: Originals: one for all, one a prompt, or one an image. Raises UserError.
    """
    if given is None:
        return [None] * count, [None] * count
    if isinstance(given, Tensor | np.ndarray) and given.ndim == 4:
        given = list(given)
    members: Sequence[Original] = given if isinstance(given, list | tuple) else [given]
    if len(members) not in (1, count) and len(members) * each_prompt != count:
        raise UserError(
            f"{name} is a list of {len(members)} for {count // each_prompt} prompts: give one, or one a prompt"
        )
    read_once = [use_of(each, name) for each in members]
    found = [read_once[k * len(members) // count] for k in range(count)]
    return [use for use, _ in found], [picture for _, picture in found]


def use_of(original: Original, name: str) -> tuple[PictureUse, np.ndarray | Tensor | None]:
    """What a recipe says of a picture, and the picture itself where it is not a file's.

    Latents stay a tensor, a picture is (H, W, 3) float32 in [0, 1], one whose name begins with "mask" (H, W). Raises
    UserError.
    """
    if isinstance(original, str | Path):
        read(PictureUse(str(original)), name)  # now, not after others are drawn
        return PictureUse(whole_path(original), file_hash(Path(original))), None
    if isinstance(original, Tensor) and original.ndim == 3 and len(original) not in (1, 3):
        return PictureUse(None, _hash(original.detach().cpu().float().numpy())), original
    array = mask_of(original, name) if name.startswith("mask") else pixels_of(original, name)
    return PictureUse(None, _hash(array)), array


def read(use: PictureUse, name: str) -> np.ndarray:
    """Read the file that a recipe names, as `use_of` gives pictures. Raises UserError, also where it is gone."""
    from PIL import Image, UnidentifiedImageError

    if use.path is None:
        raise UserError(f"{name} was no file, it has to be given again")
    try:
        content = read_plain(use.path)
        if not name.startswith("mask"):
            return decode(content).astype(np.float32) / 255
        with open_raster(content) as file:
            return mask_of(file, name)
    except FileNotFoundError as error:
        raise UserError(f"{name} {use.path}: no such file") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} {use.path} is no picture that can be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} {use.path} can't be read: {error}") from error


def changed(use: PictureUse | None) -> str:
    """A note where the file is not what it was when the picture was drawn, else ""."""
    if use is None or use.path is None or use.hash is None or not Path(use.path).exists():
        return ""
    found = file_hash(Path(use.path))
    return (
        ""
        if found == use.hash
        else f"{use.path} has changed since the picture was drawn ({use.hash}, now {found})"
    )


def latents_of(picture: np.ndarray | Tensor | None) -> Tensor | None:
    """The picture where it is latents."""
    return picture if isinstance(picture, torch.Tensor) else None


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:10]
