"""Pictures and captions from disk, as a config names them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ldm.data.buckets import buckets
from ldm.data.pictures import PictureSet, open_pictures
from ldm.errors import UserError
from ldm.system import System
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import PictureExamples
from ldm.training.data.kinds import Data
from ldm.training.data.latents import PictureLatents


@dataclass(frozen=True)
class PicturesConfig(Data, kind="pictures"):
    """Pictures and captions from disk (see `ldm.data.pictures.open_pictures`).

    captions: in place of the pictures' own, one of these each time, at random, as of a picture's own where it has
        several.
    outside: metadata, and rows of a dataset, may name picture files that are not below `path`.
    conditioning_column: of control pictures, for a ControlNet, such as conditioning_image.
    resolution, max_ratio: of the aspect-ratio buckets, in pixels; a max_ratio of 1 cuts squares.
    crop, flip: how pictures are cut, and whether they are mirrored half of the time.
    cache: a folder that keeps latents and text states, and which pictures are broken; without one all of it is found
        out again and again.
    sample_posterior: latents are drawn from the autoencoder's posterior, as diffusers' scripts do; else they are its
        mean.
    encoding: the precision in which the autoencoder computes them; bfloat16 is under autocast.
    """

    path: str
    resolution: int
    captions: tuple[str, ...] = ()
    image_column: str = "image"
    caption_column: str = "text"
    outside: bool = False
    conditioning_column: str = ""
    max_ratio: float = 1.0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    cache: str | None = None
    sample_posterior: bool = False
    encoding: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0

    def check(self, where: str) -> None:
        refuse_outside(where, self, ("resolution",), 1)
        refuse_outside(where, self, ("seed",), 0)
        for each in self.captions:
            try:
                each.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{where}.captions: {each!r} holds half of a surrogate pair: write it anew"
                ) from None

    @property
    def conditioned(self) -> bool:
        return bool(self.conditioning_column)

    @property
    def text_cache(self) -> Path | None:
        return Path(self.cache) / "text" if self.cache else None

    def latents(self, where: str, system: System, with_pictures: bool) -> PictureLatents:
        """See `Data`."""
        if self.cache and self.crop == "random":
            raise UserError(
                f"{where}.crop: random crops are new in each turn and can't be cached: set crop to center, or cache to "
                "null"
            )
        try:  # before all pictures are looked through
            buckets(self.resolution, _step(system), self.max_ratio)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return self.latents_of(self._found(where, not self.captions), system, with_pictures)

    def latents_of(self, found: PictureSet, system: System, with_pictures: bool) -> PictureLatents:
        """Return the latents of other pictures, cut and kept as these are. Raises UserError."""
        return PictureLatents(
            found,
            system.autoencoder,
            resolution=self.resolution,
            captions=self.captions,
            seed=self.seed,
            max_ratio=self.max_ratio,
            step=_step(system),
            crop=self.crop,
            flip=self.flip,
            cache=Path(self.cache) / "latents" if self.cache else None,
            with_pictures=with_pictures,
            sample=self.sample_posterior,
            dtype=getattr(torch, self.encoding),
        )

    def examples(self, where: str, crop: int | None, held_out: int) -> PictureExamples:
        """See `Data`."""
        for name in ("captions", "conditioning_column", "max_ratio", "sample_posterior", "encoding"):
            if getattr(self, name) != getattr(PicturesConfig, name):
                raise UserError(f"{where}.{name} is for a U-Net's training: leave it out")
        found = self._found(where, captioned=False)
        if len(found) < 2:
            raise UserError(f"{where}: there is one picture, and one is held out: give it more of them")
        return PictureExamples(found, self.resolution, crop, self.crop, self.flip, self.seed, held_out)

    def _found(self, where: str, captioned: bool) -> PictureSet:
        """The pictures, those that are broken told apart. Raises UserError."""
        try:
            return open_pictures(
                self.path,
                image_column=self.image_column,
                caption_column=self.caption_column if captioned else "",
                outside=self.outside,
                conditioning_column=self.conditioning_column,
                index=Path(self.cache) / "pictures.json" if self.cache else None,
            )
        except UserError as error:
            place = where if os.path.exists(self.path) else f"{where}.path"
            raise UserError(f"{place}: {error}") from error


def _step(system: System) -> int:
    """What sides are multiples of: the autoencoder and the U-Net divide by it."""
    return system.autoencoder.config.factor * system.network.multiple
