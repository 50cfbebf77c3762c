"""The IP-Adapters that a pipeline has loaded, and the pictures that a call, or a recipe, shows them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch

from ldm.checkpoints.files import file_hash
from ldm.conditioning.image_prompt import ImageAdapter, ImagePrompt, load_ip_adapter
from ldm.errors import UserError
from ldm.system import System
from pipelines import arguments
from pipelines.files import whole_path
from pipelines.originals import use_of
from pipelines.registry import Registry
from pipelines.turns import Turns
from pipelines.uses import ImagePromptUse, PictureUse, encoder_folder

# Pictures (H, W, 3) in [0, 1] as they were given, of each IP-Adapter that an image is told by.
Shown = tuple[tuple[np.ndarray, ...], ...]


@dataclass
class _Loaded:
    path: str
    hash: str
    encoder: str | None
    adapter: ImageAdapter
    scale: float = 1.0


class ImageAdapters:
    """The IP-Adapters of one pipeline, by name, in the order in which they were loaded."""

    def __init__(self, system: System, device: torch.device, turns: Turns):
        self.system, self.device, self._turns = system, device, turns
        self.loaded: Registry[_Loaded] = Registry("IP-Adapter", "load_ip_adapter")

    def load(self, path: str | Path, image_encoder: str | Path | None = None, name: str | None = None) -> str:
        """Load an IP-Adapter over the network; returns its name. Raises UserError.

        path: a file, see `ldm.conditioning.image_prompt.load_ip_adapter`. image_encoder: a folder; None is the folder
        image_encoder beside the file. name: None is the file's.
        """
        with self._turns.turn(self.device):
            return self._load(path, image_encoder, name)

    def _load(self, path: str | Path, image_encoder: str | Path | None, name: str | None = None) -> str:
        name = self.loaded.new_name(path, name)
        encoder = None if image_encoder is None else whole_path(image_encoder)
        wanted = encoder_folder(whole_path(path), encoder)
        same = [each for each in self.loaded if encoder_folder(each.path, each.encoder) == wanted]
        shared = same[0].adapter.encoder if same else None  # encoders are large
        adapter = load_ip_adapter(self.system.network, path, shared or image_encoder)
        adapter.network.to(self.device)
        adapter.encoder.module.to(self.device)
        self.loaded.add(name, _Loaded(whole_path(path), file_hash(path), encoder, adapter))
        return name

    def load_again(self, uses: Iterable[ImagePromptUse]) -> list[str]:
        """Load the IP-Adapters that recipes name, and that aren't loaded; returns notes on what has changed since.

        It loads from anywhere: of a stranger's recipe look at the paths first. Raises UserError.
        """
        with self._turns.turn(self.device):
            return self.loaded.load_again(uses, lambda use, name: self._load(use.path, use.encoder, name))

    def set_scale(self, scale: float | Sequence[float] | Mapping[str, float]) -> None:
        """Set how much calls take of pictures by default: one for all adapters, one each, or by their names."""
        if isinstance(scale, Mapping):
            wanted = {
                str(name): arguments.numbers(each, 1, "the scale", "IP-Adapter")[0]
                for name, each in scale.items()
            }
        else:
            names = self.loaded.names
            each = arguments.numbers(scale, len(names), "the scale", "IP-Adapter")
            wanted = dict(zip(names, each, strict=True))
        with self._turns.turn(self.device):
            self.loaded.check(wanted)
            for name, value in wanted.items():
                self.loaded.named(name).scale = value

    def unload(self, names: Iterable[str] | None = None) -> None:
        """Take IP-Adapters out of the network; None is all. Raises UserError."""
        with self._turns.turn(self.device):
            for each in self.loaded.take_out(names):
                each.adapter.network.detach()

    def to(self, device: torch.device) -> None:
        """Follow the system to a device and into its precision, within a turn."""
        self.device = device
        for each in self.loaded:
            each.adapter.network.to(device=device, dtype=self.system.network.dtype)
            each.adapter.encoder.module.to(device=device, dtype=self.system.network.dtype)

    def asked(
        self, ip_adapter_image: Any, scale: SupportsFloat | Sequence[SupportsFloat] | None = None
    ) -> tuple[tuple[ImagePromptUse, ...], Shown]:
        """Return what the recipes of a call say of its image prompts, and the pictures.

        ip_adapter_image: a picture, or several that are taken together, for the one adapter that is loaded; a list of
        these for several; or a dict by their names. scale: one for all adapters, or one each; None is what `set_scale`
        said. Raises UserError.
        """
        by_name = self._by_name(ip_adapter_image)
        scales = (
            [self.loaded.named(name).scale for name in by_name]
            if scale is None
            else arguments.numbers(scale, len(by_name), "ip_adapter_scale", "IP-Adapter")
        )
        uses: list[ImagePromptUse] = []
        shown: list[tuple[np.ndarray, ...]] = []
        for (name, pictures), weight in zip(by_name.items(), scales, strict=True):
            loaded = self.loaded.named(name)
            found = [_picture(each) for each in pictures]
            images = tuple(use for use, _ in found)
            uses.append(ImagePromptUse(loaded.path, images, weight, loaded.encoder, loaded.hash))
            shown.append(tuple(picture for _, picture in found))
        return tuple(uses), tuple(shown)

    def _by_name(self, given: Any) -> dict[str, Sequence[Any]]:
        names = self.loaded.names
        if not names:
            raise UserError("ip_adapter_image goes with an IP-Adapter: load one first, with load_ip_adapter")
        if isinstance(given, Mapping):
            self.loaded.check(given)
            named: dict[str, Any] = dict(given)
        elif len(names) == 1:
            nested = (
                isinstance(given, list | tuple) and len(given) == 1 and isinstance(given[0], list | tuple)
            )
            named = {names[0]: given[0] if nested else given}
        elif isinstance(given, list | tuple) and len(given) == len(names):
            named = dict(zip(names, given, strict=True))
        else:
            raise UserError(
                f"{len(names)} IP-Adapters are loaded ({', '.join(names)}): give ip_adapter_image a list "
                "of one picture (or one list of pictures) each, or a dict of some by their names"
            )
        several: dict[str, Sequence[Any]] = {
            name: list(each) if isinstance(each, list | tuple) else [each] for name, each in named.items()
        }
        if not several or not all(several.values()):
            raise UserError("ip_adapter_image is empty: leave it out, or give a picture")
        return several

    def check(self, uses: Sequence[ImagePromptUse]) -> None:
        """Raise UserError for the image prompts of a recipe whose adapters aren't loaded, or with an odd scale."""
        for use in uses:
            self.loaded.at(use.path)
            if not np.isfinite(use.scale):
                raise UserError(f"the scale of the IP-Adapter is {use.scale}: give a number, commonly 0 to 1")

    def prompts(
        self, uses: Sequence[Sequence[ImagePromptUse]], shown: Sequence[Shown]
    ) -> tuple[ImagePrompt, ...]:
        """Return the image prompts of a batch of images that have the same adapters, and numbers of pictures.

        uses, shown: of each image, as `asked` gives them.
        """
        prompts: list[ImagePrompt] = []
        for place, first in enumerate(uses[0]):
            adapter = self.loaded.at(first.path).adapter
            rows = [row[place] for row in shown]
            if all(each is rows[0] for each in rows):
                rows = rows[:1]
            pictures = [[(each * 255).round().astype(np.uint8) for each in row] for row in rows]
            prompts.append(adapter.prompt(pictures, [use[place].scale for use in uses]))
        return tuple(prompts)


def _picture(given: Any) -> tuple[PictureUse, np.ndarray]:
    use, picture = use_of(given, "ip_adapter_image")
    if not isinstance(picture, np.ndarray):
        raise UserError("ip_adapter_image is latents: give a picture, of three channels")
    return use, picture
