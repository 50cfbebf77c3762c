"""Checkpoints on disk: the diffusers folder, the single-file LDM layout, and strict loading.

`read_checkpoint` takes either layout, `write_folder` and `write_single_file` write them; `load_strict` puts
tensors into a network. Nothing here needs the network once the files are on disk.
"""

from pathlib import Path

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.files import (
    check_finite,
    load_strict,
    read_tensors,
    write_bytes,
    write_tensors,
    write_text,
)
from ldm.checkpoints.folder import read_folder, write_folder
from ldm.checkpoints.hub import resolve
from ldm.checkpoints.single_file import read_single_file, write_single_file

__all__ = [
    "Checkpoint",
    "check_finite",
    "load_strict",
    "read_checkpoint",
    "read_folder",
    "read_single_file",
    "read_tensors",
    "resolve",
    "write_bytes",
    "write_folder",
    "write_single_file",
    "write_tensors",
    "write_text",
]


def read_checkpoint(
    name: str | Path, variant: str | None = None, prediction_type: str | None = None
) -> Checkpoint:
    """Return the system behind a folder, a single file or a hub id.

    Args:
        name: what a person types; see `resolve`.
        variant: for a folder, "fp16" and the like.
        prediction_type: what the U-Net predicts, overriding what the files say or what is assumed of them.
    """
    path = resolve(name, variant)
    if path.is_file():
        return read_single_file(path, prediction_type)
    found = read_folder(path, variant)
    if prediction_type and "scheduler" in found.configs:
        found.configs["scheduler"]["prediction_type"] = prediction_type
    return found
