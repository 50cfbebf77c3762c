"""Files that a command line, or a row of a file, names for a picture: in words, and as a recipe has them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.checkpoints.kinds import PICKLES
from ldm.checkpoints.paths import readable
from ldm.errors import UserError
from pipelines.files import whole_path
from pipelines.originals import use_of
from pipelines.uses import BUNDLED, CLIPUse, ControlUse, ImagePromptUse, LoRAUse, PictureUse, UpscalerUse

_LORAS = (".safetensors", *PICKLES)
_ROOT = Path()


def weighed(text: str) -> tuple[str, float]:
    """Read PATH[:WEIGHT]; what follows the last colon is part of the path where it is no number."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def picture_use(path: str | Path, name: str, folder: Path = _ROOT) -> PictureUse:
    """Return what a recipe says of a picture's file, which is read. Raises UserError."""
    return use_of(folder / path, name)[0]


def control_use(text: str, folder: Path = _ROOT) -> ControlUse:
    """Read PATH:MODEL[:SCALE], the file of a control picture and a ControlNet. Raises UserError."""
    rest, scale = weighed(text)
    path, colon, model = rest.rpartition(":")
    if len(path) > 2 and path[-2] == ":" and model[:1] in ("\\", "/"):  # the colon of a drive
        path, model = path[:-2], f"{path[-1]}:{model}"
    if not colon or not path or not model:
        raise UserError(
            f"the control {text!r} is no PATH:MODEL[:SCALE]: name a control picture, then a ControlNet, such as "
            "edges.png:controlnet-canny:0.8"
        )
    return ControlUse(_place(model, folder), picture_use(path, "control_image", folder), scale)


def _place(name: str, folder: Path) -> str:
    """A file or folder that may lie in `folder`; what is not there may be the name of one on the hub."""
    if name == BUNDLED:
        return name
    with readable(name):
        return whole_path(folder / name) if (folder / name).exists() else whole_path(name)


def row_settings(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a row's settings as a recipe has them; files that it names by a path are looked for from `folder` on.

    Raises UserError.
    """
    settings = dict(row)
    for name in ("image", "mask_image"):
        if isinstance(row.get(name), str):
            settings[name] = asdict(picture_use(row[name], name, folder))
    if isinstance(row.get("controls"), list):
        settings["controls"] = [_control(each, folder) for each in row["controls"]]
    if isinstance(row.get("image_prompts"), list):
        settings["image_prompts"] = [_image_prompt(each, folder) for each in row["image_prompts"]]
    if isinstance(path := row.get("clip_model"), str):
        settings["clip_model"] = asdict(clip_use(path, folder))
    for name in ("upscaler", "hires_upscaler"):
        if isinstance(path := row.get(name), str):
            use = upscaler_use(path, name, folder)
            settings[name] = None if use is None else asdict(use)
    return settings


def row_loras(given: Any, folder: Path) -> list[LoRAUse]:
    """Return the LoRAs that a row names: one PATH[:WEIGHT], a list of them, or weights by path. Raises UserError."""
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        pairs = [weighed(each) if isinstance(each, str) else (each, None) for each in _listed(given)]
    for path, weight in pairs:
        if not isinstance(path, str) or not path.strip() or type(weight) not in (int, float):
            raise UserError(
                f"loras are {given!r:.80}: give PATH:WEIGHT, such as style.safetensors:0.8, or a list of these"
            )
    return [LoRAUse(_place(path, folder), float(weight or 0)) for path, weight in pairs]


def _listed(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]


def _control(given: Any, folder: Path) -> Any:
    if isinstance(given, str):
        return asdict(control_use(given, folder))
    if not isinstance(given, Mapping):
        return given
    changed = dict(given)
    if isinstance(given.get("image"), str):
        changed["image"] = asdict(picture_use(given["image"], "control_image", folder))
    if isinstance(given.get("path"), str):
        changed["path"] = _place(given["path"], folder)
    return changed


def _image_prompt(given: Any, folder: Path) -> Any:
    if not isinstance(given, Mapping):
        return given
    changed = dict(given)
    if isinstance(images := given.get("images"), list):
        changed["images"] = [
            asdict(picture_use(each, "ip_adapter_image", folder)) if isinstance(each, str) else each
            for each in images
        ]
    for name in ("path", "encoder"):
        if isinstance(given.get(name), str):
            changed[name] = _place(given[name], folder)
    return changed


def image_prompt_use(adapter: str, pictures: Sequence[Path], encoder: str | None) -> ImagePromptUse:
    """Return an image prompt of PATH[:SCALE] and of pictures' files. Raises UserError."""
    path, scale = weighed(adapter)
    images = tuple(picture_use(each, "ip_adapter_image") for each in pictures)
    return ImagePromptUse(whole_path(path), images, scale, None if encoder is None else whole_path(encoder))


def clip_use(path: str | Path, folder: Path = _ROOT) -> CLIPUse:
    """Return what a recipe says of a CLIP: its folder, or "bundled"."""
    return CLIPUse(_place(str(path), folder))


def upscaler_use(path: str | Path, name: str, folder: Path = _ROOT) -> UpscalerUse | None:
    """Return what a recipe says of the network `name`: a file, or "bundled"; of "hires_upscaler" "latent" is none.

    Raises UserError.
    """
    if path == "latent" and name == "hires_upscaler":
        return None
    if path == "latent":
        raise UserError(
            'upscaler "latent" is for a second pass alone: give a file of a network, or "bundled"'
        )
    return UpscalerUse(_place(str(path), folder))


def loras_in(folders: Iterable[Path]) -> dict[str, Path]:
    """The files of LoRAs in folders, and in folders within, by their names; of one name the first file counts."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in _LORAS and path.is_file():
                found.setdefault(path.stem, path)
    return found
