"""The ControlNets that a pipeline has loaded, and what a call, or a recipe, shows them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.files import file_hash
from ldm.conditioning.control import Control
from ldm.conditioning.controlnets import load_controlnet
from ldm.errors import UserError, nearest
from ldm.models.controlnet import ControlNet, check_fit
from ldm.preprocess import PREPROCESSORS
from ldm.system import System, bundled
from pipelines import arguments
from pipelines.files import whole_path
from pipelines.originals import Originals, originals_for
from pipelines.registry import Registry
from pipelines.turns import Turns
from pipelines.uses import BUNDLED, ControlUse, Preprocessor

# A control picture (H, W, 3) in [0, 1] as it was given, of each ControlNet that an image is steered by.
Shown = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Loaded:
    path: str
    hash: str | None
    network: ControlNet


class ControlNets:
    """The ControlNets of one pipeline, by name, in the order in which they were loaded.

    They stay on the device where the system works, even while its own parts rest elsewhere.
    """

    def __init__(self, system: System, device: torch.device, turns: Turns):
        self.system, self.device, self._turns = system, device, turns
        self.loaded: Registry[_Loaded] = Registry("ControlNet", "load_controlnet")

    def load(self, path: str | Path = BUNDLED, name: str | None = None, variant: str | None = None) -> str:
        """Load a ControlNet for the pipeline's model; returns its name.

        path, variant: see `ldm.conditioning.controlnets.load_controlnet`; "bundled" is the one that ships with this
        package, for the bundled model and edges. name: None is the file's. Raises UserError, also for one that was made
        for other models.
        """
        with self._turns.turn(self.device):
            return self._load(path, name, variant)

    def _load(self, path: str | Path, name: str | None = None, variant: str | None = None) -> str:
        name = self.loaded.new_name(path, name)
        file = _bundled() if path == BUNDLED else Path(path)
        network = load_controlnet(file, self.system.network.dtype, variant, self.system.network)
        config = self.system.autoencoder.config
        check_fit(self.system.network, network, config.latent_channels, config.factor, f"{path}")
        where = BUNDLED if path == BUNDLED else whole_path(path)
        self.loaded.add(name, _Loaded(where, _hash(file), network.to(self.device)))
        return name

    def load_again(self, uses: Iterable[ControlUse]) -> list[str]:
        """Load the ControlNets that recipes name, and that aren't loaded; returns notes on what has changed since.

        It loads from anywhere: of a stranger's recipe look at the paths first. Raises UserError.
        """
        with self._turns.turn(self.device):
            return self.loaded.load_again(uses, lambda use, name: self._load(use.path, name))

    def unload(self, names: Iterable[str] | None = None) -> None:
        """Let ControlNets go; None is all. Raises UserError."""
        with self._turns.turn(self.device):
            self.loaded.take_out(names)

    def to(self, device: torch.device) -> None:
        """Follow the system to a device and into its precision, within a turn."""
        self.device = device
        for each in self.loaded:
            each.network.to(device, self.system.network.dtype)

    def asked(
        self,
        control_image: Any,
        count: int,
        each_prompt: int,
        scale: SupportsFloat | Sequence[SupportsFloat] = 1.0,
        start: SupportsFloat | Sequence[SupportsFloat] = 0.0,
        end: SupportsFloat | Sequence[SupportsFloat] = 1.0,
        preprocessor: Preprocessor | None = None,
    ) -> list[tuple[tuple[ControlUse, ...], Shown]]:
        """Return, for each of a call's `count` images, what its recipe says of control pictures, and these.

        control_image: Originals for the one ControlNet that is loaded, a list of them for several, or a dict by their
        names. scale, start, end: one for all ControlNets, or one each. Raises UserError.
        """
        by_name = self._by_name(control_image)
        scales, starts, ends = (
            arguments.numbers(value, len(by_name), name, "ControlNet")
            for value, name in (
                (scale, "controlnet_conditioning_scale"),
                (start, "control_guidance_start"),
                (end, "control_guidance_end"),
            )
        )
        if preprocessor is not None and preprocessor not in PREPROCESSORS:
            known = ", ".join(PREPROCESSORS)
            raise UserError(
                f"control_preprocessor {preprocessor!r} is unknown{nearest(str(preprocessor), PREPROCESSORS)} "
                f"(known: {known})"
            )
        columns: list[list[tuple[ControlUse, np.ndarray]]] = []
        for place, (name, originals) in enumerate(by_name.items()):
            network = self.loaded.named(name)
            uses, pictures = originals_for(originals, count, each_prompt, "control_image")
            column: list[tuple[ControlUse, np.ndarray]] = []
            for use, picture in zip(uses, pictures, strict=True):
                if use is None or not isinstance(picture, np.ndarray):
                    raise UserError("control_image is latents, or None: give a picture, of three channels")
                stated = (scales[place], starts[place], ends[place], preprocessor, network.hash)
                column.append((ControlUse(network.path, use, *stated), picture))
            columns.append(column)
        rows = zip(*columns, strict=True)
        return [(tuple(use for use, _ in row), tuple(picture for _, picture in row)) for row in rows]

    def _by_name(self, given: Any) -> dict[str, Originals]:
        names = self.loaded.names
        if not names:
            raise UserError("control_image goes with a ControlNet: load one first, with load_controlnet")
        if isinstance(given, Mapping):
            self.loaded.check(given)
            if not given:
                raise UserError("control_image is empty: leave it out, or give a picture")
            return dict(given)
        if len(names) == 1:
            return {names[0]: given}
        if not isinstance(given, list | tuple) or len(given) != len(names):
            raise UserError(
                f"{len(names)} ControlNets are loaded ({', '.join(names)}): give control_image a list of one picture "
                "each, or a dict of some by their names"
            )
        return dict(zip(names, given, strict=True))

    def check(self, uses: Sequence[ControlUse], size: tuple[int, int]) -> None:
        """Raise UserError for control pictures of a recipe that can't steer a picture of (height, width)."""
        config = self.system.autoencoder.config
        blank = torch.zeros(1, 1, 1, 1)
        for use in uses:
            network = self.loaded.at(use.path).network
            picture = blank.expand(1, network.config.conditioning_channels, *size)
            control = Control(network, picture, use.scale, use.start, use.end)
            control.check(self.system.network, config.latent_channels, config.factor, 1, size, use.path)

    def controls(
        self,
        uses: Sequence[Sequence[ControlUse]],
        shown: Sequence[Shown],
        guess_mode: bool,
    ) -> list[Control]:
        """Return the Controls of a batch of images that have the same ControlNets at the same steps.

        uses: of each image, as `asked` gives them. shown: pictures of the size that is drawn.
        """
        controls: list[Control] = []
        for place, first in enumerate(uses[0]):
            pictures = [
                _control_picture(row[place], use[place].preprocessor)
                for row, use in zip(shown, uses, strict=True)
            ]
            scale = torch.tensor([use[place].scale for use in uses])
            network = self.loaded.at(first.path).network
            image = torch.stack(pictures).to(self.device)
            controls.append(Control(network, image, scale, first.start, first.end, guess_mode))
        return controls


def _control_picture(picture: np.ndarray, preprocessor: str | None) -> Tensor:
    """(3, H, W) in [0, 1]: edges and the like are found in the picture of the size that is drawn."""
    if preprocessor is not None:
        found = PREPROCESSORS[preprocessor]((picture * 255).round().astype(np.uint8))
        picture = found.astype(np.float32) / 255
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)


def _bundled() -> Path:
    found = bundled("*/control-lora.safetensors")
    if found is None:
        raise UserError("the bundled ControlNet is not there: name a folder, or a file")
    return found


def _hash(path: Path) -> str | None:
    """The hash of its one file of weights, as adapters are looked up elsewhere; None where there are several."""
    if path.is_dir():
        found = [each for pattern in ("*.safetensors", "*.bin") for each in sorted(path.glob(pattern))]
        return file_hash(found[0]) if len(found) == 1 else None
    return file_hash(path) if path.is_file() else None
