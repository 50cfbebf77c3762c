"""The pictures that others are drawn from: as they are handed to a call, and as a recipe names them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ldm.data.pictures import decode
from ldm.errors import UserError
from ldm.foreign import read_plain
from ldm.pictures import open_raster
from pipelines.canvas import mask_of, pixels_of
from pipelines.files import whole_path
from pipelines.uses import PictureUse

if TYPE_CHECKING:
    from PIL.Image import Image

# A picture as a call takes it, or several; a tensor (C, h, w) of other than three channels is latents.
Original: TypeAlias = "str | Path | Image | np.ndarray | Tensor"
Originals: TypeAlias = "Original | Sequence[Original]"


def originals_for(
    given: Any, count: int, each_prompt: int, name: str
) -> tuple[list[PictureUse | None], list[np.ndarray | Tensor | None]]:
    """What recipes say of the picture of each of a call's `count` images, and these pictures.

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


def use_of(original: Original, name: str) -> tuple[PictureUse, np.ndarray | Tensor]:
    """Return what a recipe says of a picture, and the picture itself.

    Latents stay a tensor, a picture is (H, W, 3) float32 in [0, 1], one whose name begins with "mask" (H, W). Raises
    UserError.
    """
    if isinstance(original, str | Path):
        content = _content(original, name)
        return PictureUse(whole_path(original), _hash(content)), _decoded(content, original, name)
    if isinstance(original, Tensor) and (original.is_meta or original.layout != torch.strided):
        raise UserError(f"{name} is a tensor of the device meta, or sparse: give one that holds its numbers")
    if isinstance(original, Tensor) and original.ndim == 3 and len(original) not in (1, 3):
        return PictureUse(None, _hash(original.detach().cpu().float().numpy().tobytes())), original
    array = mask_of(original, name) if _is_mask(name) else pixels_of(original, name)
    return PictureUse(None, _hash(np.ascontiguousarray(array).tobytes())), array


def read(use: PictureUse, name: str) -> np.ndarray:
    """Read the file that a recipe names, as `use_of` gives pictures. Raises UserError, also where it is gone."""
    if use.path is None:
        raise UserError(f"{name} was no file, it has to be given again")
    return _decoded(_content(use.path, name), use.path, name)


def changed(use: PictureUse) -> str:
    """A note where the file is not what it was when the picture was drawn, else ""."""
    if use.path is None or use.hash is None:
        return ""
    found = _hash(_content(use.path, "the picture"))
    if found == use.hash:
        return ""
    return f"{use.path} has changed since the picture was drawn ({use.hash}, now {found})"


def _content(path: str | Path, name: str) -> bytes:
    try:
        return read_plain(path)
    except FileNotFoundError as error:
        raise UserError(f"{name} {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} {path} can't be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _decoded(content: bytes, path: str | Path, name: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        if not _is_mask(name):
            return decode(content).astype(np.float32) / 255
        with open_raster(content) as file:
            return mask_of(file, name)
    except UnidentifiedImageError as error:
        raise UserError(f"{name} {path} is no picture that can be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} {path} can't be read: {error}") from error


def _is_mask(name: str) -> bool:
    return name.startswith("mask")


def latents_of(picture: np.ndarray | Tensor | None) -> Tensor | None:
    """The picture where it is latents."""
    return picture if isinstance(picture, torch.Tensor) else None


def _hash(content: bytes) -> str:
    """As `ldm.checkpoints.files.file_hash`."""
    return hashlib.sha256(content).hexdigest()[:10]
