"""The CLIPs that guide a pipeline's pictures, each loaded when it is first used."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ldm.checkpoints.files import file_hash
from ldm.conditioning.clip import LatentCLIP
from ldm.conditioning.clip_models import PictureCLIP, load_clip
from ldm.conditioning.prompts.weighted import Text
from ldm.errors import UserError
from ldm.sampling.clip_guidance import CLIPGuidance
from ldm.system import System, bundled
from pipelines.files import whole_path
from pipelines.registry import changed
from pipelines.uses import BUNDLED, CLIPUse


class CLIPs:
    """The CLIPs of one pipeline, with the hashes of their files."""

    def __init__(self, system: System, device: torch.device):
        self._system, self._device = system, device
        self._loaded: dict[str, tuple[LatentCLIP | PictureCLIP, str | None]] = {}

    def to(self, device: torch.device) -> None:
        """Follow the system to a device: they are loaded again there."""
        self._device = device
        self._loaded.clear()

    def stated(self, use: CLIPUse | None) -> CLIPUse:
        """Return what a recipe says of a CLIP, which is loaded, so that it fails now or never. Raises UserError."""
        path = _path(use)
        return CLIPUse(path, self._known(path)[1])

    def changed(self, uses: Iterable[CLIPUse]) -> list[str]:
        """Load CLIPs that recipes name; returns notes on what has changed since. Raises UserError."""
        return changed((use, self.stated(use)) for use in uses)

    def guide(self, use: CLIPUse | None, prompts: Sequence[Text], scale: float) -> CLIPGuidance:
        """Return what guides towards prompts, one an image; None is the CLIP that ships with the package."""
        return CLIPGuidance.towards(self._known(_path(use))[0], prompts, scale)

    def _known(self, path: str) -> tuple[LatentCLIP | PictureCLIP, str | None]:
        if path not in self._loaded:
            folder, system = (_bundled() if path == BUNDLED else Path(path)), self._system
            clip = load_clip(folder, system.autoencoder, system.text, self._device)
            files = sorted(folder.glob("*.safetensors"))
            self._loaded[path] = clip, file_hash(files[0]) if len(files) == 1 else None
        return self._loaded[path]


def _path(use: CLIPUse | None) -> str:
    return BUNDLED if use is None or use.path == BUNDLED else whole_path(use.path)


def _bundled() -> Path:
    found = bundled("*-clip/config.json")
    if found is None:
        raise UserError("the bundled CLIP is not there: name the folder of one in clip_model")
    return found.parent
