"""What is evaluated, and on what: models with text and without, pictures from disk and those a training holds out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.checkpoints.folder import components, read_index
from ldm.condition import Condition
from ldm.conditioning.bound import BoundNetwork
from ldm.data.buckets import frame
from ldm.data.pictures import PictureSet
from ldm.diffusion.bound import of_betas
from ldm.diffusion.process import Discrete
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import to_tensor
from ldm.system import System
from ldm.system.plain import PlainSystem


@dataclass(frozen=True)
class Shown:
    """Pictures (B, C, H, W) in [-1, 1] and what is known of them: captions, or labels (B,); sizes (B, 6) as SDXL's."""

    pictures: Tensor
    captions: Sequence[str]
    labels: Tensor | None = None
    sizes: Tensor | None = None


class Pictures(Protocol):
    """Pictures to evaluate on, in a fixed order."""

    def __len__(self) -> int: ...

    def read(self, start: int, size: int) -> Shown:
        """Return up to so many of them, from number `start` on."""
        ...


@dataclass(frozen=True)
class OnDisk:
    """Pictures from disk, with their captions where they were found with them, cut to squares of `side` pixels."""

    found: PictureSet
    side: int

    def __len__(self) -> int:
        return len(self.found)

    def read(self, start: int, size: int) -> Shown:
        numbers = range(start, min(start + size, len(self)))
        framed = [frame(self.found.read(i), (self.side, self.side)) for i in numbers]
        captions = [self.found.items[i].caption for i in numbers]
        sizes = torch.tensor([framing.time_ids for _, framing in framed])
        return Shown(to_tensor([picture for picture, _ in framed]), captions, None, sizes)


class Examples(Protocol):
    """Of training's examples, those held out: `ldm.training.data.examples.Examples` is one."""

    @property
    def held_out(self) -> int: ...

    def whole(self, start: int, size: int) -> Any:
        """Return a batch with `pictures` (B, C, H, W) and `labels` (B,) or None."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """The pictures that a training held out, with their labels."""

    examples: Examples

    def __len__(self) -> int:
        return self.examples.held_out

    def read(self, start: int, size: int) -> Shown:
        batch = self.examples.whole(start, min(size, len(self) - start))
        return Shown(batch.pictures, [""] * len(batch.pictures), batch.labels)


class Subject(Protocol):
    """A model that is evaluated.

    channels: of the pictures it is of. side: pixels of those, as it was trained on them. variance_type: what its
    scheduler says. autoencoder: of a model of latents.
    """

    @property
    def channels(self) -> int: ...

    @property
    def side(self) -> int: ...

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def prediction_type(self) -> str: ...

    @property
    def variance_type(self) -> str | None: ...

    @property
    def autoencoder(self) -> AutoencoderKL | None: ...

    @property
    def device(self) -> torch.device: ...

    def condition(self, shown: Shown) -> Condition:
        """Return what the network is told of pictures. Raises UserError where they lack something."""
        ...

    def bind(self, condition: Condition) -> BoundNetwork:
        """Return the network under a condition."""
        ...


class TextSubject:
    """A system of text to image."""

    channels = 3

    def __init__(self, system: System):
        self.system, self.side, self.autoencoder = system, system.default_size, system.autoencoder
        self.schedule, self.device = system.scheduler.noise_schedule(), system.network.device
        self.prediction_type: str = system.scheduler.get("prediction_type")
        self.variance_type: str | None = system.scheduler.get("variance_type")

    def condition(self, shown: Shown) -> Condition:
        text, _ = self.system.text.encode(list(shown.captions))
        sizes = None if shown.sizes is None else shown.sizes.to(self.device)
        return self.system.condition(text, sizes, guidance=1.0)  # what is likely is so without guidance

    def bind(self, condition: Condition) -> BoundNetwork:
        return self.system.bind(condition.to(self.device, self.system.network.dtype))


class PlainSubject:
    """A system without text. Raises UserError for one whose process is not in steps."""

    def __init__(self, system: PlainSystem):
        self.system, self.autoencoder = system, system.autoencoder
        self.schedule, self.device = of_betas(system.process.schedule), system.network.device
        self.prediction_type = system.process.prediction_type
        process, channels, side = system.process, system.channels, system.shape[1]
        self.variance_type: str | None = (
            process.scheduler.get("variance_type") if isinstance(process, Discrete) else None
        )
        factor = 1 if system.autoencoder is None else system.autoencoder.config.factor
        self.side, self.channels = side * factor, channels if system.autoencoder is None else 3

    def condition(self, shown: Shown) -> Condition:
        if "labels" not in self.system.wants:
            return Condition()
        if shown.labels is None:
            raise UserError("the model is told classes, and these pictures have none: give data with labels")
        return Condition(labels=shown.labels.to(self.device))

    def bind(self, condition: Condition) -> BoundNetwork:
        return self.system.bind(condition.to(self.device, self.system.network.dtype))


def open_subject(model: str | None) -> Subject:
    """Load a model with text or without, by what its folder holds, to the accelerator if there is one.

    model: a folder, a single file or a hub id; None is the bundled one. Raises UserError.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if model is not None and (Path(model) / "model_index.json").is_file():
        index = read_index(Path(model))
        if "text_encoder" not in components(index) and "unet" in components(index):
            return PlainSubject(PlainSystem.load(model, device=device))
    return TextSubject(System.load(model, device=device))
