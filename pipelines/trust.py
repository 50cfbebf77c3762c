"""What a stranger's picture may have loaded: a recipe names files of any place, and its picture may come from anyone.

The bundled model needs no leave. Other files are loaded from where the user allows it, and what lies on a network, or
on the hub, only where the user names it. Nothing of a path is touched before that: to look is to ask a network already.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ldm.checkpoints.files import a_few
from ldm.checkpoints.paths import readable
from ldm.errors import UserError
from ldm.system import bundled_model
from pipelines.recipe import Recipe
from pipelines.uses import BUNDLED, encoder_folder

ANYWHERE = "\0"  # among the folders that are trusted: all of this disk; no path is called so
_MOST = 100  # files: a picture that names more wants to keep the machine busy
_ON_THE_HUB = ("model", "ControlNet")  # kinds of which a name that is no path is asked of the hub
_SCHEME = re.compile(r"[A-Za-z][\w+.-]+:[/\\]")  # http://, file:///; a drive has one letter
_VARIANT = re.compile(r"[\w.-]+")
_HOW = "name it yourself, with {option}, if you mean it"


def check(recipe: Recipe, picture: Path, trusted: Sequence[str]) -> str:
    """Return what a picture's recipe has loaded, in words, "" for nothing. Raises UserError for what may not be.

    recipe: without what the user names in place of it. trusted: files, and folders with all that lies in them.
    """
    if recipe.variant and not _VARIANT.fullmatch(recipe.variant):
        raise UserError(
            f"{picture}: its recipe has {recipe.variant!r} for a variant, which is a word such as fp16"
        )
    folders = [_trusted(each) for each in trusted]
    named = [("model", "--model", recipe.model)] if recipe.model and not _bundled(recipe.model) else []
    named += [("LoRA", "--lora", each.path) for each in recipe.loras]
    named += [("embedding", "--embedding", each.path) for each in recipe.embeddings]
    controls = [each.path for each in recipe.controls if each.path != BUNDLED]
    named += [("ControlNet", "--control", each) for each in controls]
    named += [("IP-Adapter", "--ip-adapter", each.path) for each in recipe.image_prompts]
    encoders = dict.fromkeys(encoder_folder(each.path, each.encoder) for each in recipe.image_prompts)
    named += [("image encoder", "--image-encoder", each) for each in encoders]
    pictures = [("image", "--image", recipe.image), ("mask", "--mask", recipe.mask_image)]
    pictures += [("control picture", "--control", each.image) for each in recipe.controls]
    pictures += [
        ("picture", "--ip-image", picture) for each in recipe.image_prompts for picture in each.images
    ]
    named += [(kind, option, each.path) for kind, option, each in pictures if each and each.path is not None]
    networks = (
        ("upscaler", "--upscaler", recipe.upscaler),
        ("upscaler", "--hires-upscaler", recipe.hires_upscaler),
        ("CLIP", "--clip-model", recipe.clip_model),
    )
    named += [(kind, option, each.path) for kind, option, each in networks if each and each.path != BUNDLED]
    if len(named) > _MOST:
        raise UserError(f"{picture} names {len(named):,} files to load, where {_MOST} are the most")
    for kind, option, path in named:
        if on_network(path):
            raise UserError(
                f"{picture} names the {kind} {path}, which is on a network: {_HOW.format(option=option)}"
            )
    strange = [
        f"the {kind} {path}" for kind, _, path in named if not any(_inside(path, each) for each in folders)
    ]
    if strange:
        options = ", ".join(dict.fromkeys(option for _, option, _ in named))
        raise UserError(
            f"{picture} wants {a_few(strange)}: if you know them, allow them by --trust FOLDER (what lies in it) or "
            f"--trust (all of this disk), or name others by {options}"
        )
    for kind, option, path in named:
        with readable(path):
            if kind in _ON_THE_HUB and not Path(path).expanduser().exists():
                raise UserError(
                    f"{picture} names the {kind} {path}, which is not on this disk: {_HOW.format(option=option)}"
                )
    return a_few([f"the {kind} {path}" for kind, _, path in named], len(named))


def on_network(path: str) -> bool:
    """Whether a path leads to another machine by its form: a share of Windows (with either slash), or a URL."""
    return path.replace("\\", "/").startswith("//") or bool(_SCHEME.match(path))


def _bundled(name: str) -> bool:
    try:
        own = bundled_model()
    except UserError:  # there is none
        return False
    return name in (str(own), str(own.resolve()))


def _trusted(folder: str) -> Path | None:
    """None is anywhere on this disk."""
    if folder == ANYWHERE:
        return None
    with readable(folder):
        path = Path(folder).expanduser()
        if not folder or not path.exists():
            raise UserError(f"--trust {folder}: no such folder or file")
        return Path(os.path.abspath(path))


def _inside(path: str, folder: Path | None) -> bool:
    """Whether a path lies in a folder, both as it is written and where its links lead."""
    if folder is None:
        return True
    with readable(path):
        written = Path(os.path.abspath(Path(path).expanduser()))
        if not any(written.is_relative_to(each) for each in (folder, folder.resolve())):
            return False
        return written.resolve().is_relative_to(folder.resolve())
