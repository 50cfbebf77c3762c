"""From what a person types to a place on this disk: a folder, a file, or a hub id."""

import re
from pathlib import Path

from ldm.checkpoints.folder import MODEL_INDEX, components, read_folder, read_index
from ldm.checkpoints.paths import nearby, readable
from ldm.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ALONE = ("model*.safetensors", "diffusion_pytorch_model*.safetensors")  # of a network that is all there is
_WANTED = ["*.json", "*.txt", "*.model", *_ALONE, "*/*.safetensors"]
_NOT_WANTED = ["safety_checker/*", "*non_ema*"]
_VARIANTS = ["*.fp16*", "*.bf16*"]


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be a hub's, such as "org/name"."""
    return bool(_ID.fullmatch(name))


def resolve(name: str | Path, variant: str | None = None) -> Path:
    """Return the local folder or file for a path or a hub id such as "org/name".

    What exists on this disk is taken as it is; then a whole copy in the hub's local cache; only then the
    network, for the safetensors and the small text files (no pickles, no second copies in other precisions).

    Args:
        name: a folder, a file, or a hub id.
        variant: "fp16" and the like: fetch the weights with that word in their names, not the plain ones.

    Raises:
        UserError: neither a path nor an id (names the nearest paths), or not to be had (says what to do).
    """
    if not str(name).strip():
        raise UserError("the model's name is empty: give a folder, a single file or a hub id (org/name)")
    with readable(name):
        path = Path(name).expanduser()
        if path.is_file() and path.name == MODEL_INDEX:
            raise UserError(f"{path} is only the list of a model's parts: give its folder, {path.parent}")
        if path.exists():
            return path
        hint = nearby(path)
        if hint or not is_hub_id(str(name)):
            raise UserError(f"{name}: no such folder or file, and no hub id (org/name) either{hint}")
    return _from_hub(str(name), variant)


def _from_hub(name: str, variant: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise UserError(
            f"{name}: no such folder; to fetch it from the hub, `pip install huggingface_hub`"
        ) from error

    skip = _NOT_WANTED + ([] if variant else _VARIANTS)
    wanted = (
        [each.replace(".safetensors", f".{variant}*safetensors") for each in _WANTED] if variant else _WANTED
    )
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if _is_whole(cached, variant):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not in the cache: ask the hub, which has its own words for a bad name
    try:
        fetched = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=skip))
        if variant and (missing := _without_weights(fetched)):  # parts that have no such variant
            more = [f"{part}/*.safetensors" for part in missing]
            return Path(snapshot_download(name, allow_patterns=more, ignore_patterns=_NOT_WANTED + _VARIANTS))
        return fetched
    except GatedRepoError as error:
        raise UserError(
            f"{name}: its owners want their terms accepted; do so on its page, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name}: no such folder, and the hub knows no such model") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: not on this disk, and the hub can't be reached: where it can, run `hf download {name} "
            "--local-dir FOLDER`, then give that folder's path; or set HF_HOME to a cache that has it"
        ) from error


def _without_weights(folder: Path) -> list[str]:
    """The networks that a fetched system promises, and of which no weights have come."""
    if not (folder / MODEL_INDEX).is_file():
        return []
    return [
        name
        for name in components(read_index(folder))
        if (folder / name / "config.json").is_file() and not any((folder / name).glob("*.safetensors"))
    ]


def _is_whole(folder: Path, variant: str | None) -> bool:
    """Tell whether a cached copy has weights, or, for a whole system, every component that it promises."""
    if not (folder / MODEL_INDEX).is_file():
        return any(any(folder.glob(each)) for each in _ALONE)
    try:
        read_folder(folder, variant)
    except UserError:
        return False
    return True
