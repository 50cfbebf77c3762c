"""Pictures and captions from disk, as a config names them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ldm.data.buckets import buckets
from ldm.data.pictures import PictureSet, open_pictures
from ldm.errors import UserError, printable
from ldm.system import System
from ldm.training.bounds import refuse_outside
from ldm.training.data.latents import PictureLatents


@dataclass(frozen=True)
class PicturesConfig:
    """Pictures and captions from disk (see `ldm.data.pictures.open_pictures`).

    captions: in place of the pictures' own, one of these each time, at random, as of a picture's own where it has
        several.
    outside: metadata, and rows of a dataset, may name picture files that are not below `path`.
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
    max_ratio: float = 1.0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    cache: str | None = None
    sample_posterior: bool = False
    encoding: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0

    def check(self, where: str) -> None:
        """Raises UserError for values that can't be. where: the section, for the error."""
        refuse_outside(where, self, ("resolution",), 1)
        refuse_outside(where, self, ("seed",), 0)
        for each in self.captions:
            try:
                each.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{where}.captions: {each!r} holds half of a surrogate pair: write it anew"
                ) from None


def listed(config: PicturesConfig, where: str, captioned: bool = True) -> PictureSet:
    """The pictures, those that are broken told apart. Raises UserError. where: the section, for the error."""
    try:
        return open_pictures(
            config.path,
            image_column=config.image_column,
            caption_column=config.caption_column if captioned and not config.captions else "",
            outside=config.outside,
            index=Path(config.cache) / "pictures.json" if config.cache else None,
        )
    except UserError as error:
        place = where if os.path.exists(config.path) else f"{where}.path"
        raise UserError(f"{place}: {error}") from error


def lines_about(notes: Sequence[str], broken: Mapping[str, str]) -> list[str]:
    """What the user should know of pictures, a line each, fit to print; `broken`: the reason by name."""
    skipped = [f"skipped {name}: {why}" for name, why in broken.items()]
    lines = [*notes, *skipped, *([f"{len(broken)} broken pictures were skipped"] if broken else [])]
    return [printable(each) for each in lines]


def check_size(config: PicturesConfig, system: System) -> None:
    """Raise UserError for a resolution, or a max_ratio, that the networks can't take."""
    try:
        buckets(config.resolution, _step(system), config.max_ratio)
    except UserError as error:
        raise UserError(f"text_to_image.pictures: {error}") from None


def on_disk(
    config: PicturesConfig, found: PictureSet, system: System, batch_size: int, with_pictures: bool
) -> PictureLatents:
    """Raises UserError."""
    return PictureLatents(
        found,
        system.autoencoder,
        resolution=config.resolution,
        batch_size=batch_size,
        seed=config.seed,
        max_ratio=config.max_ratio,
        step=_step(system),
        crop=config.crop,
        flip=config.flip,
        cache=Path(config.cache) / "latents" if config.cache else None,
        with_pictures=with_pictures,
        sample=config.sample_posterior,
        dtype=getattr(torch, config.encoding),
    )


def _step(system: System) -> int:
    """What sides are multiples of: the autoencoder and the U-Net divide by it."""
    return system.autoencoder.config.factor * system.network.multiple
