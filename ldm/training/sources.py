"""Where text-to-image training's pictures come from: compositions, pictures on disk, and a class beside an instance."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.checkpoints.files import read_text, write_bytes, write_text
from ldm.data.buckets import buckets
from ldm.data.listing import SUFFIXES
from ldm.data.pictures import PictureSet, open_pictures
from ldm.data.recipe import Recipe, RecipeConfig
from ldm.data.sprites import SPRITES_FILE, load_sprites
from ldm.errors import UserError, printable
from ldm.foreign import json_object
from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import png
from ldm.system import System
from ldm.training.bounds import refuse_outside
from ldm.training.drawing import draw
from ldm.training.latents import LatentBatch, LatentSource, PictureLatents, RecipePool
from ldm.training.share import processes

_AT_ONCE = 16  # class pictures that an interruption may cost
_DRAWN = "class-"  # how the names of class pictures that were drawn begin
_ORIGIN = "class.json"  # beside them: what they were drawn from


@dataclass(frozen=True)
class CompositionsConfig:
    """A pool of compositions of a recipe, encoded once.

    cache: folder of their latents. pictures: the pool's size, in whole shards of 2048; a longer run goes over it
    again, reshuffled.
    """

    cache: str
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    sprites: str = str(SPRITES_FILE)
    pictures: int = 131_072


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


@dataclass(frozen=True)
class PriorConfig:
    """DreamBooth's prior preservation (Ruiz et al. 2023, eq. 2): pictures of the class, drawn by the model itself.

    prompt: of the class, such as "a dog". folder: where the class pictures are or, as far as they are missing, will
    be, with a note of what they were drawn from. weight: of their loss, beside that of the instance's pictures.
    """

    prompt: str
    folder: str
    pictures: int = 100
    weight: float = 1.0
    steps: int = 30
    guidance: float = 5.0


def compositions(config: CompositionsConfig, autoencoder: AutoencoderKL, with_pictures: bool) -> LatentSource:
    """Raises UserError."""
    recipe = Recipe(load_sprites(config.sprites), config.recipe)
    return RecipePool(recipe, autoencoder, config.pictures, config.cache, with_pictures)


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


def told(notes: Sequence[str], broken: Mapping[str, str]) -> list[str]:
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


def check_class(config: PriorConfig, system: System) -> None:
    """Raise UserError where the folder's class pictures were drawn from something else than this asks for."""
    folder = Path(config.folder)
    if not any(folder.glob(f"{_DRAWN}*")):
        return
    made, wanted = _read_origin(folder), _origin(config, system)
    odd = [f"{key} is {each!r} here" for key, each in wanted.items() if made.get(key) != each]
    if odd:
        raise UserError(
            f"text_to_image.prior.folder: {folder} holds class pictures that were drawn otherwise ({', '.join(odd)}): "
            "give another folder, or delete it"
        )


def draw_class(config: PriorConfig, system: System) -> PictureSet:
    """The class pictures; those that are missing are drawn, by the main process, where the U-Net is.

    Pictures of other names in the folder, such as photographs of one's own, count too. Raises UserError.
    """
    check_class(config, system)
    folder = Path(config.folder)
    own = [p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(_DRAWN)]
    paths = [folder / f"{_DRAWN}{k:05d}.png" for k in range(config.pictures - len(own))]
    missing = [k for k, path in enumerate(paths) if not path.exists()]
    if processes().is_main_process and missing:
        write_text(folder / _ORIGIN, json.dumps(_origin(config, system), indent=2) + "\n")
        for start in range(0, len(missing), _AT_ONCE):
            seeds = missing[start : start + _AT_ONCE]
            drawn = draw(system, [config.prompt] * len(seeds), seeds, config.steps, config.guidance)
            for seed, picture in zip(seeds, drawn, strict=True):
                write_bytes(paths[seed], png(picture))
    processes().wait_for_everyone()
    return open_pictures(folder, caption_column="")


def _origin(config: PriorConfig, system: System) -> dict[str, Any]:
    """What decides a class picture, but for its seed."""
    return {
        "prompt": config.prompt,
        "model": system.fingerprint,
        "steps": config.steps,
        "guidance": config.guidance,
    }


def _read_origin(folder: Path) -> dict[str, Any]:
    """What the folder's class pictures were drawn from; nothing where it doesn't say."""
    path = folder / _ORIGIN
    with suppress(UserError):  # it only saves drawing them
        return json_object(read_text(path), path)
    return {}


class WithPrior:
    """Pairs: rows of even number are the instance's, the others the class's."""

    def __init__(self, instance: LatentSource, prior: LatentSource, prompt: str):
        self.instance, self.prior, self.prompt = instance, prior, prompt

    @property
    def broken(self) -> Mapping[str, str]:
        return {**self.instance.broken, **self.prior.broken}

    def prepare(self) -> None:
        self.instance.prepare()
        self.prior.prepare()

    def read(self, start: int, size: int, rows: slice = slice(None)) -> LatentBatch:
        """As LatentSource says. Raises UserError where pairs would be torn apart."""
        first, stop, _ = rows.indices(size)
        if size % 2 or first % 2 or stop % 2:
            raise UserError(
                "prior preservation takes pictures in pairs: make each part of loop.batch_size even"
            )
        mine = slice(first // 2, stop // 2)
        instance, prior = (each.read(start // 2, size // 2, mine) for each in (self.instance, self.prior))
        if instance.latents.shape != prior.latents.shape:
            raise UserError("prior preservation takes pictures of one size: set max_ratio to 1")
        captions = itertools.chain.from_iterable((each, self.prompt) for each in instance.captions)
        pictures = None
        if instance.pictures is not None and prior.pictures is not None:
            pictures = _alternate(instance.pictures, prior.pictures)
        return LatentBatch(
            _alternate(instance.latents, prior.latents),
            list(captions),
            _alternate(instance.time_ids, prior.time_ids),
            pictures,
        )


def _alternate(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1).flatten(0, 1)
