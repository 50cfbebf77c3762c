"""Data of one's own: a section of a config whose `kind` says which class it is."""

from typing import ClassVar

from ldm.config import add_kind
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.data.examples import Examples
from ldm.training.data.latents import LatentSource


class Data:
    """Where pictures come from, if not from disk. Whoever brings a kind derives a dataclass from this and imports it.

    `class Mine(Data, kind="mine")` is what a config means by `data: {kind: mine, ...}`, with Mine's fields.
    """

    kinds: ClassVar[dict[str, type["Data"]]] = {}
    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        add_kind(Data.kinds, cls, kind)

    def latents(self, autoencoder: AutoencoderKL, with_pictures: bool) -> LatentSource:
        """Return what a denoising network learns from. Raises UserError."""
        raise UserError(f"data of the kind {self.kind} are not for text_to_image")

    def examples(self, crop: int | None, held_out: int) -> Examples:
        """Return what a first stage learns from.

        crop: a side in pixels, of what training sees; None for whole pictures. held_out: for validation. Raises
        UserError.
        """
        raise UserError(f"data of the kind {self.kind} are not for a first stage")
