"""What a kind of `train` says: which parameters are trained, and what comes of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from ldm.system import System
from ldm.training.trainable.model import TrainableModel


class Trainable:
    """A part of a system that can be trained; kinds are dataclasses derived from this, with their settings.

    A new kind is a new file, and a line in the `train` of the objectives that can train it.
    """

    kind: ClassVar[str]

    def check(self, from_nothing: bool, inpainting: bool) -> None:
        """Raise UserError where this can't be trained beside a U-Net from nothing, or one for inpainting."""

    def check_captions(self, captions: Iterable[str]) -> None:
        """Raise UserError where captions, all that will come, teach it nothing."""

    def model(self, system: System) -> TrainableModel:
        """Return the networks that a loss runs through; those parameters that are trained require a gradient.

        Everything else is frozen. The system's networks are changed: they get adapters and words. Raises UserError.
        """
        raise NotImplementedError

    def export(
        self, model: TrainableModel, system: System, folder: Path, metadata: Mapping[str, str]
    ) -> None:
        """Write what was trained into `folder`, as others read it. Raises UserError.

        model: as `model` gave it, or with averages in place of its weights. metadata: goes along where there is a
        place for it.
        """
        raise NotImplementedError
