"""Pictures into files: each with its recipe, whole or not at all, and no present file is overwritten unasked."""

import io
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoints.files import unwritable, write_bytes
from ldm.errors import UserError
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


def png(picture: "Image", recipe: Recipe | None = None) -> bytes:
    """The bytes of a PNG, with the recipe in its metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=recipe.png_info() if recipe else None)
    return buffer.getvalue()


def check_target(path: Path, pictures: int, folder: bool = True) -> None:
    """Find out before minutes of drawing, not after, that `pictures` can't be saved to `path`.

    path: a `.png`, or where `folder` also a folder. Makes the folders that are missing. Raises UserError.
    """
    if path.suffix.lower() == ".png":
        if path.is_dir():
            raise UserError(f"{path} is a folder, where a picture's file was expected")
        if pictures > 1:
            raise UserError(f"{path} is one file for {pictures} pictures: name a folder")
        place = path.parent
    elif not folder or path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise UserError(f"{path}: pictures are saved as PNG, which can carry their recipe: name it .png")
    else:
        place = path
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise unwritable(place, error) from error


def save_picture(picture: "Image", recipe: Recipe, path: Path) -> Path:
    """Save to a `.png`, or into a folder under the next free number: `0007-a-raccoon-astronaut.png`."""
    data = png(picture, recipe)
    if path.suffix.lower() == ".png":
        write_bytes(path, data)
        return path
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.prompt.lower()).strip("-")[:48] or "picture"
    taken = [int(found[1]) for each in path.glob("*.png") if (found := re.match(r"(\d+)-", each.name))]
    number = max(taken, default=-1) + 1
    while True:  # another run may be writing into the same folder
        target = path / f"{number:04d}-{slug}.png"
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            raise unwritable(target, error) from error
    try:
        write_bytes(target, data)
    except BaseException:
        target.unlink(missing_ok=True)  # the name that was held, still empty
        raise
    return target
