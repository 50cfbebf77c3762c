"""What training learns from: a section of a config whose `kind` says which class it is."""

from pathlib import Path
from typing import ClassVar

from ldm.config import add_kind
from ldm.errors import UserError
from ldm.system import System
from ldm.training.data.examples import Examples
from ldm.training.data.latents import LatentSource


class Data:
    """The source of pictures. Whoever brings a kind derives a dataclass from this and imports it.

    `class Mine(Data, kind="mine")` is what a config means by `data: {kind: mine, ...}`, with Mine's fields. In all
    methods `where` is the section's path in the config, for errors.
    """

    kinds: ClassVar[dict[str, type["Data"]]] = {}
    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        add_kind(Data.kinds, cls, kind)

    def check(self, where: str) -> None:
        """Raise UserError for values that can't be."""

    @property
    def conditioned(self) -> bool:
        """Whether control pictures come with the latents."""
        return False

    @property
    def text_cache(self) -> Path | None:
        """A folder that keeps the states of frozen text encoders; None keeps none."""
        return None

    def latents(self, where: str, system: System, with_pictures: bool) -> LatentSource:
        """Return what a denoising network learns from; with_pictures: beside the latents. Raises UserError."""
        raise UserError(f"{where}: data of the kind {self.kind} are not for a denoising network")

    def examples(self, where: str, crop: int | None, held_out: int) -> Examples:
        """Return what a first stage learns from.

        crop: a side in pixels, of what training sees; None for whole pictures. held_out: for validation. Raises
        UserError.
        """
        raise UserError(f"{where}: data of the kind {self.kind} are not for a first stage")
