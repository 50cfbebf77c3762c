"""The files that a picture is made with, as its recipe names them. Each hash is the file's `file_hash`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BUNDLED = "bundled"  # in place of a path: what ships with this package
Preprocessor = Literal["canny"]


@dataclass(frozen=True)
class LoRAUse:
    """A LoRA that takes part: its file or folder, how much of it, and the name that prompts call it by."""

    path: str
    weight: float = 1.0
    hash: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class EmbeddingUse:
    """New words that take part: their file or folder, and the token where one was given."""

    path: str
    token: str | None = None
    hash: str | None = None


@dataclass(frozen=True)
class PictureUse:
    """A picture that another is drawn from: its file (None where it was none), and the hash of file or pixels."""

    path: str | None
    hash: str | None = None


@dataclass(frozen=True)
class ControlUse:
    """A ControlNet that takes part, and the picture that it is shown.

    path, hash: of the network. scale, start, end: see `ldm.conditioning.control.Control`. preprocessor: what makes the
    control picture of this one.
    """

    path: str
    image: PictureUse
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocessor: Preprocessor | None = None
    hash: str | None = None


@dataclass(frozen=True)
class ImagePromptUse:
    """An IP-Adapter that takes part, the folder of its image encoder, and the pictures that it is shown together."""

    path: str
    images: tuple[PictureUse, ...]
    scale: float = 1.0
    encoder: str | None = None
    hash: str | None = None


def encoder_folder(path: str, encoder: str | None) -> str:
    """The folder of the image encoder of an IP-Adapter's file: where none is named, the one beside it."""
    return str(Path(path).parent / "image_encoder") if encoder is None else encoder


@dataclass(frozen=True)
class CLIPUse:
    """A CLIP that guides: its folder, or "bundled"."""

    path: str
    hash: str | None = None


@dataclass(frozen=True)
class UpscalerUse:
    """A network that enlarges: its file, or "bundled"."""

    path: str
    hash: str | None = None
