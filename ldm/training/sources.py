"""Where text-to-image training's pictures come from: compositions, pictures on disk, and a class beside an instance."""

import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.checkpoints.files import write_bytes
from ldm.data.listing import SUFFIXES
from ldm.data.pictures import PictureSet, open_pictures
from ldm.data.recipe import Recipe, RecipeConfig
from ldm.data.sprites import SPRITES_FILE, load_sprites
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.system import System
from ldm.training.drawing import draw
from ldm.training.latents import LatentBatch, LatentSource, PictureLatents, RecipePool
from ldm.training.share import processes

_AT_ONCE = 16  # class pictures that an interruption may cost


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

    captions: in place of the pictures' own, one of these each time, at random.
    resolution, max_ratio: of the aspect-ratio buckets, in pixels; a max_ratio of 1 cuts squares.
    crop, flip: how pictures are cut, and whether they are mirrored half of the time.
    cache: a folder that keeps latents and text states; without one they are computed again and again.
    """

    path: str
    resolution: int
    captions: tuple[str, ...] = ()
    image_column: str = "image"
    caption_column: str = "text"
    max_ratio: float = 1.0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    cache: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class PriorConfig:
    """DreamBooth's prior preservation (Ruiz et al. 2023, eq. 2): pictures of the class, drawn by the model itself.

    prompt: of the class, such as "a dog". folder: where the class pictures are or, as far as they are missing, will
    be. weight: of their loss, beside that of the instance's pictures.
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


def listed(config: PicturesConfig) -> PictureSet:
    """The pictures, those that are broken told apart. Raises UserError."""
    return open_pictures(
        config.path,
        image_column=config.image_column,
        caption_column="" if config.captions else config.caption_column,
        index=Path(config.cache) / "pictures.json" if config.cache else None,
    )


def on_disk(
    config: PicturesConfig, found: PictureSet, system: System, batch_size: int, with_pictures: bool
) -> PictureLatents:
    """Sides are multiples of what the autoencoder and the U-Net divide by. Raises UserError."""
    halvings = len(system.unet.config.block_out_channels) - 1
    return PictureLatents(
        found,
        system.autoencoder,
        resolution=config.resolution,
        batch_size=batch_size,
        seed=config.seed,
        max_ratio=config.max_ratio,
        step=system.autoencoder.config.factor * 2**halvings,
        crop=config.crop,
        flip=config.flip,
        cache=Path(config.cache) / "latents" if config.cache else None,
        with_pictures=with_pictures,
    )


def draw_class(config: PriorConfig, system: System) -> PictureSet:
    """The class pictures; those that are missing are drawn, by the main process, where the U-Net is.

    Pictures of other names in the folder, such as photographs of one's own, count too.
    """
    folder = Path(config.folder)
    own = [p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("class-")]
    paths = [folder / f"class-{k:05d}.png" for k in range(config.pictures - len(own))]
    missing = [k for k, path in enumerate(paths) if not path.exists()]
    if processes().is_main_process:
        for start in range(0, len(missing), _AT_ONCE):
            seeds = missing[start : start + _AT_ONCE]
            drawn = draw(system, [config.prompt] * len(seeds), seeds, config.steps, config.guidance)
            for seed, picture in zip(seeds, drawn, strict=True):
                buffer = io.BytesIO()
                picture.save(buffer, "png")
                write_bytes(paths[seed], buffer.getvalue())
    processes().wait_for_everyone()
    return open_pictures(folder, caption_column="")


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
