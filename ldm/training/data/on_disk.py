"""Pictures and captions from disk, as a config names them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ldm.data.buckets import buckets
from ldm.data.pictures import PictureSet, open_pictures
from ldm.errors import UserError, printable
from ldm.system import System
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import PictureExamples
from ldm.training.data.kinds import Data
from ldm.training.data.latents import PictureLatents

_WHOLE = r"-?\d{1,18}"  # what has more digits is a name
BY_FOLDER = "folder"  # in place of a column's name


@dataclass(frozen=True)
class PicturesConfig(Data, kind="pictures"):
    """Pictures and captions from disk (see `ldm.data.pictures.open_pictures`).

    captions: in place of the pictures' own, one of these each time, at random, as of a picture's own where it has
        several.
    outside: metadata, and rows of a dataset, may name picture files that are not below `path`.
    conditioning_column: of control pictures, for a ControlNet, such as conditioning_image.
    label_column: of each picture's class, for a model of classes; "folder" takes the folder that a picture lies in, as
        ImageNet has them. The classes are sorted by name, numbers by value.
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
    label_column: str = ""
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
        if self.label_column:
            raise UserError(f"{where}.label_column is for a model of classes, without text: leave it out")
        if self.cache and self.crop == "random":
            raise UserError(
                f"{where}.crop: random crops are new in each turn and can't be cached: set crop to center, or cache to "
                "null"
            )
        try:  # before all pictures are looked through
            buckets(self.resolution, _step(system), self.max_ratio)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return self.latents_of(
            self._found(where, "" if self.captions else self.caption_column), system, with_pictures
        )

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
        by_folder = self.label_column == BY_FOLDER
        found = self._found(where, "" if by_folder else self.label_column, classes=True)
        if len(found) < 2:
            raise UserError(f"{where}: there is one picture, and one is held out: give it more of them")
        labels = None
        if self.label_column:
            named = [Path(each.name).parent.name if by_folder else each.caption for each in found.items]
            labels = classes_of(named, [each.name for each in found.items], f"{where}.label_column")
        return PictureExamples(
            found, self.resolution, crop, self.crop, self.flip, self.seed, held_out, labels
        )

    def _found(self, where: str, caption_column: str, classes: bool = False) -> PictureSet:
        """The pictures, those that are broken told apart. Raises UserError."""
        try:
            return open_pictures(
                self.path,
                image_column=self.image_column,
                caption_column=caption_column,
                outside=self.outside,
                conditioning_column=self.conditioning_column,
                index=Path(self.cache) / "pictures.json" if self.cache else None,
                classes=classes,
            )
        except UserError as error:
            place = where if os.path.exists(self.path) else f"{where}.path"
            raise UserError(f"{place}: {error}") from error


def classes_of(named: Sequence[str], pictures: Sequence[str], where: str) -> tuple[list[str], list[int]]:
    """Return the names of the classes, sorted, and each picture's number. pictures: their names, for errors.

    Raises UserError for a picture without a class, and where all are of one.
    """
    if bare := [name for name, label in zip(pictures, named, strict=True) if not label]:
        raise UserError(f"{where}: {printable(bare[0])} has no class, and {len(bare)} have none")
    names = set(named)
    if len(names) < 2:
        raise UserError(f"{where}: all pictures are of one class, {printable(next(iter(names)))}")
    whole = all(re.fullmatch(_WHOLE, each) for each in names)
    order = sorted(names, key=lambda each: (int(each), each) if whole else (0, each))
    number = {name: k for k, name in enumerate(order)}
    return order, [number[each] for each in named]


def _step(system: System) -> int:
    """What sides are multiples of: the autoencoder and the U-Net divide by it."""
    return system.autoencoder.config.factor * system.network.multiple
