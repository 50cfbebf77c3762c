"""DreamBooth's prior preservation (Ruiz et al. 2023): pictures of a class, which the model draws itself."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.files import read_text
from ldm.data.listing import SUFFIXES
from ldm.data.pictures import PictureSet, open_pictures
from ldm.errors import UserError
from ldm.files import write_bytes, write_text
from ldm.foreign import json_object
from ldm.pictures import png
from ldm.system import System
from ldm.training.bounds import refuse_outside
from ldm.training.data.kinds import Data
from ldm.training.data.latents import LatentBatch, LatentSource, RowGroup
from ldm.training.data.on_disk import PicturesConfig
from ldm.training.distributed import processes
from ldm.training.drawing import check_steps, draw

_AT_ONCE = 16  # class pictures that an interruption may cost
_DRAWN = "class-"  # how the names of class pictures that were drawn begin
_ORIGIN = "class.json"  # beside them: what they were drawn from


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

    def check(self, where: str, data: Data) -> None:
        """Raise UserError for values that can't be, and for data that can't be paired. where: the section."""
        refuse_outside(where, self, ("pictures", "steps"), 1)
        refuse_outside(where, self, ("weight",), 0)
        if not isinstance(data, PicturesConfig):
            raise UserError(f"{where} goes with pictures of an instance: data of the kind pictures")
        if data.max_ratio != 1:
            raise UserError("prior preservation takes pictures of one size: set max_ratio to 1")

    def source(
        self, where: str, instance: LatentSource, data: Data, system: System, with_pictures: bool
    ) -> "PriorPreservation":
        """Return the class's pictures beside the instance's, and cut like them.

        Raises UserError; where: the section.
        """
        assert isinstance(data, PicturesConfig)
        check_steps(f"{where}.steps", system, self.steps)
        _check_origin(f"{where}.folder", self, system)

        def prior() -> LatentSource:
            return data.latents_of(draw_class(f"{where}.folder", self, system), system, with_pictures)

        return PriorPreservation(instance, prior, self)


def _check_origin(where: str, config: PriorConfig, system: System) -> None:
    """Raise UserError where the folder's class pictures were drawn from something else than this asks for."""
    folder = Path(config.folder)
    if not any(folder.glob(f"{_DRAWN}*")):
        return
    made, wanted = _read_origin(folder), _origin(config, system)
    odd = [f"{key} is {each!r} here" for key, each in wanted.items() if made.get(key) != each]
    if odd:
        raise UserError(
            f"{where}: {folder} holds class pictures that were drawn otherwise ({', '.join(odd)}): give another "
            "folder, or delete it"
        )


def draw_class(where: str, config: PriorConfig, system: System) -> PictureSet:
    """Return the class pictures; those that are missing are drawn, by the main process, where the U-Net is.

    Pictures of other names in the folder, such as photographs of one's own, count too. Raises UserError.
    """
    _check_origin(where, config, system)
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
    # What else lies there, such as the note of their origin, needs no word.
    return replace(open_pictures(folder, caption_column=""), notes=[])


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
    with suppress(UserError):  # a damaged one says nothing, and `_check_origin` what to do
        return json_object(read_text(path), path)
    return {}


class PriorPreservation:
    """Pairs: rows of even number are the instance's, the others the class's, whose mean has a weight of its own.

    prior: makes the class's source, which may first have to be drawn.
    """

    def __init__(self, instance: LatentSource, prior: Callable[[], LatentSource], config: PriorConfig):
        self.instance, self.config = instance, config
        self.captions: Sequence[str] = [*instance.captions, config.prompt]
        self.resolution, self.dtype = instance.resolution, instance.dtype
        self._make_prior = prior
        self._prior: LatentSource | None = None
        self.groups = (
            RowGroup("instance", slice(0, None, 2), 1.0),
            RowGroup("prior", slice(1, None, 2), config.weight),
        )

    def prepare(self, batch_size: int) -> None:
        """Draw what is missing of the class, then as LatentSource says. Raises UserError for an odd batch."""
        if batch_size % 2:
            raise UserError("prior preservation takes pictures in pairs: make loop.batch_size even")
        if self._prior is None:
            self._prior = self._make_prior()
        for each in (self.instance, self._prior):
            each.prepare(batch_size // 2)

    def notes(self) -> list[str]:
        return [*self.instance.notes(), *(self._prior.notes() if self._prior else ())]

    def read(self, start: int, size: int, rows: slice = slice(None)) -> LatentBatch:
        """See `LatentSource`. Raises UserError where pairs would be torn apart."""
        first, stop, _ = rows.indices(size)
        if size % 2 or first % 2 or stop % 2:
            raise UserError(
                "prior preservation takes pictures in pairs: make each part of loop.batch_size even"
            )
        self.prepare(size)
        assert self._prior is not None
        mine = slice(first // 2, stop // 2)
        instance, prior = (each.read(start // 2, size // 2, mine) for each in (self.instance, self._prior))
        if instance.latents.shape != prior.latents.shape:
            raise UserError("prior preservation takes pictures of one size: set max_ratio to 1")
        prompt = self.config.prompt
        pictures = None
        if instance.pictures is not None and prior.pictures is not None:
            pictures = _alternate(instance.pictures, prior.pictures)
        return LatentBatch(
            _alternate(instance.latents, prior.latents),
            [each for caption in instance.captions for each in (caption, prompt)],
            _alternate(instance.time_ids, prior.time_ids),
            pictures,
            [each for options in instance.choices for each in (options, (prompt,))],
            self.groups,
        )


def _alternate(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1).flatten(0, 1)
