"""Pictures into files: each with its recipe, whole or not at all.

In a folder no present file is overwritten; a `.png` that is named is replaced.
"""

import os
import re
import tempfile
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.files import flush_to_disk, unwritable, workshop, write_bytes, writing
from ldm.pictures import png
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


_OTHERS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf")


def check_target(path: Path, pictures: int, folder: bool = True) -> None:
    """Find out before minutes of drawing, not after, that `pictures` can't be saved to `path`.

    path: a `.png`, or where `folder` also a folder. Makes the folders that are missing. Raises UserError.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} can't be a file's name")
    try:
        if path.suffix.lower() == ".png":
            if path.is_dir():
                raise UserError(f"{path} is a folder, where a picture's file was expected")
            if pictures > 1:
                raise UserError(f"{path} is one file for {pictures} pictures: name a folder")
            place = path.parent
        elif not folder or path.suffix.lower() in _OTHERS:
            raise UserError(f"{path}: pictures are saved as PNG, which can carry their recipe: name it .png")
        else:
            place = path
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


def whole_path(name: str | Path) -> str:
    """A file's or folder's path from the root, so that a recipe finds it from anywhere; another name as it is."""
    try:
        return str(Path(name).resolve()) if Path(name).exists() else str(name)
    except (OSError, ValueError):
        return str(name)


def picture_bytes(picture: "Image", recipe: Recipe, infotext: bool = False) -> bytes:
    """Return a PNG with its recipe, and with AUTOMATIC1111's text where `infotext`."""
    info = recipe.png_info()
    if infotext:
        from pipelines.infotext import parameters

        info.add_text("parameters", parameters(recipe))
    return png(picture, info)


def save_picture(picture: "Image", recipe: Recipe, path: Path, infotext: bool = False) -> Path:
    """Save to a `.png`, or into a folder under the next free number: `0007-a-raccoon-astronaut.png`.

    infotext: write AUTOMATIC1111's text of it beside the recipe, for other programs.
    """
    data = picture_bytes(picture, recipe, infotext)
    if path.suffix.lower() == ".png":
        write_bytes(path, data)
        return path
    slug = re.sub(r"[\W_]+", "-", recipe.prompt.lower()).strip("-")[:48].strip("-") or "picture"
    taken = [int(found[1]) for each in path.glob("*.png") if (found := re.match(r"(\d+)-", each.name))]
    number = max(taken, default=-1) + 1
    return save_new(data, path, (f"{n:04d}-{slug}.png" for n in count(number)))


def save_new(data: bytes, folder: Path, names: Iterable[str]) -> Path:
    """Write a file into a folder under the first of `names`, which have no end, that no file there has yet."""
    names = iter(names)
    name = next(names)
    with writing(folder), workshop(folder / name) as hidden:
        temporary = hidden / "picture.png"
        temporary.write_bytes(data)
        flush_to_disk(temporary)
        while not _named(temporary, target := folder / name):
            name = next(names)  # another run writes into the same folder, or one has
        flush_to_disk(folder)
        return target


def _named(temporary: Path, target: Path) -> bool:
    """Give a whole file a name that is free, in one step; False where it is not free."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if target.exists():
            return False
        temporary.rename(target)
    return True
