"""Compositions of a mixture as training data: a pool of latents, and squares for a first stage."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.data.buckets import Pixels
from ldm.emoji.mixture import REGIONS, Example, Mixture, MixtureConfig
from ldm.emoji.sprites import SPRITES_FILE, load_sprites
from ldm.emoji.things import choose
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import to_tensor
from ldm.system import System
from ldm.training.data.cache import Entry, TensorCache
from ldm.training.data.examples import Batch, Examples, random_cut
from ldm.training.data.kinds import Data
from ldm.training.data.latents import SHARD, LatentBatch, LatentSource, chunk_of, encode, encoder_key

Labels = Literal["kind", "thing"]
_UNSEEN = 10**9  # the first index of compositions that are never trained on, and how many there are
_ALL = slice(None)


@dataclass(frozen=True)
class CompositionsConfig(Data, kind="compositions"):
    """Compositions of a mixture; for text_to_image a pool of them, encoded once.

    cache: folder of the pool's latents. pictures: the pool's size, in whole shards of 2048; a longer run goes over it
    again, reshuffled. labels: condition a first stage on what each composition shows: its "kind" in the mixture, or
    first "thing". encoding: the precision in which the autoencoder computes the pool; bfloat16 is under autocast.
    """

    renamed: ClassVar[dict[str, str]] = {"recipe": "mixture"}

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    sprites: str = str(SPRITES_FILE)
    cache: str | None = None
    pictures: int = 131_072
    labels: Labels | None = None
    encoding: Literal["float32", "bfloat16"] = "bfloat16"

    def made(self) -> Mixture:
        """Return the mixture with its sprites. Raises UserError."""
        return Mixture(load_sprites(self.sprites), self.mixture)

    def latents(self, where: str, system: System, with_pictures: bool) -> LatentSource:
        """See `Data`."""
        if self.cache is None:
            raise UserError(f"{where}.cache is missing: give a folder for the latents of the compositions")
        dtype: torch.dtype = getattr(torch, self.encoding)
        return MixturePool(self.made(), system.autoencoder, self.pictures, self.cache, with_pictures, dtype)

    def examples(self, where: str, crop: int | None, held_out: int) -> Examples:
        """See `Data`."""
        return Compositions(self.made(), crop, self.labels, held_out)


class MixturePool:
    """`count` compositions of a mixture as latents, float16 on disk.

    The first pass goes through the pool in order and builds what is missing, SHARD at a time; each later pass has an
    order of its own. Another mixture, other sprites or another encoder have keys of their own in the folder.

    with_pictures: also compose the pictures, which takes longer than reading latents.
    dtype: what the encoder computes in, under autocast.

    Raises UserError unless `count` is a multiple of SHARD.
    """

    def __init__(
        self,
        mixture: Mixture,
        autoencoder: AutoencoderKL,
        count: int,
        folder: str | Path,
        with_pictures: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ):
        if count < SHARD or count % SHARD:
            raise UserError(
                f"compositions.pictures is {count}: make it a multiple of {SHARD}, a shard's size"
            )
        self.mixture, self.autoencoder, self.count = mixture, autoencoder, count
        self.with_pictures, self.dtype = with_pictures, dtype
        self.captions: Sequence[str] = ()
        self.resolution: int | None = None
        self.cache = TensorCache(folder)
        self._turn, self._order = 0, np.arange(count)

    def prepare(self, batch_size: int) -> None:
        """Do nothing: the pool is built as it is needed."""

    def notes(self) -> list[str]:
        return []

    def read(self, start: int, size: int, rows: slice = _ALL) -> LatentBatch:
        indices = [self._index(i) for i in range(start, start + size)]
        # Not only for this process's own rows: the others wait for theirs.
        for shard in sorted({i // SHARD for i in indices if self._key(i) not in self.cache}):
            self._build(range(shard * SHARD, (shard + 1) * SHARD))
        mine = indices[rows]
        keys = [self._key(i) for i in mine]
        side = self.mixture.config.size
        return LatentBatch(
            latents=torch.stack([self.cache.read(key)["latents"] for key in keys]).float(),
            captions=[self.cache.note(key) for key in keys],
            time_ids=torch.tensor([[side, side, 0, 0, side, side]] * len(mine), dtype=torch.float32),
            pictures=to_tensor([self.mixture.sample(i).picture for i in mine])
            if self.with_pictures
            else None,
        )

    @cached_property
    def made_from(self) -> str:
        """A hash of all that decides the pool's content: encoder and scaling, mixture, sprites."""
        parts = [encoder_key(self.autoencoder, self.dtype), self.mixture.fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _key(self, index: int) -> str:
        return f"{self.made_from}-{index}"

    def _index(self, position: int) -> int:
        """The composition at a position of the endless order."""
        turn, place = divmod(position, self.count)
        if turn != self._turn:
            self._turn, everything = turn, np.arange(self.count)
            self._order = np.random.default_rng(turn).permutation(everything) if turn else everything
        return int(self._order[place])

    def _build(self, indices: Sequence[int]) -> None:
        numbers = {self._key(i): i for i in indices}
        captions: dict[str, str] = {}

        def make(keys: Sequence[str]) -> list[Entry]:
            examples = [self.mixture.sample(numbers[key]) for key in keys]
            captions.update(zip(keys, (e.caption for e in examples), strict=True))
            latents = encode(self.autoencoder, to_tensor([e.picture for e in examples]), self.dtype)
            return [{"latents": each} for each in latents.mean]

        chunk = chunk_of(self.mixture.config.size, self.mixture.config.size)
        self.cache.fill(list(numbers), make, chunk, SHARD, note=captions.__getitem__)


class Compositions:
    """A mixture's compositions, each of them new. cut: a side in pixels, or None for whole ones."""

    def __init__(self, mixture: Mixture, cut: int | None, labels: Labels | None, held_out: int):
        self.mixture, self.cut, self.kind = mixture, cut, labels
        self.side, self.held_out, self.count = mixture.config.size, held_out, _UNSEEN
        things = [thing.name for thing in choose(mixture.config.things)]
        self.labels = {None: [], "kind": mixture.kinds, "thing": things}[labels]
        self.regions = list(REGIONS)

    def cuts(self, start: int, size: int, rows: slice = _ALL) -> Batch:
        """See `Examples`. Of a picture, the liveliest of three cuts: plain background teaches little."""
        indices = range(start, start + size)[rows]
        examples = [self.mixture.sample(i) for i in indices]
        pictures = [each.picture for each in examples]
        if self.cut:
            rngs = (np.random.default_rng((self.mixture.config.seed, 3, i)) for i in indices)
            pictures = [_liveliest(each, self.cut, rng) for each, rng in zip(pictures, rngs, strict=True)]
        return Batch(
            to_tensor(pictures), self._labels(examples), start, None if self.cut else _maps(examples)
        )

    def whole(self, start: int, size: int) -> Batch:
        examples = [self.mixture.sample(_UNSEEN + i) for i in range(start, start + size)]
        pictures = to_tensor([each.picture for each in examples])
        return Batch(pictures, self._labels(examples), start, _maps(examples))

    def notes(self) -> list[str]:
        return []

    def _labels(self, examples: list[Example]) -> Tensor | None:
        if self.kind is None:
            return None
        names = [each.kind if self.kind == "kind" else each.parts["things"][0] for each in examples]
        return torch.tensor([self.labels.index(name) for name in names])


def _maps(examples: list[Example]) -> Tensor:
    return torch.from_numpy(np.stack([each.regions for each in examples])).long()


def _liveliest(picture: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    cuts = (random_cut(picture, side, rng) for _ in range(3))
    return max(cuts, key=lambda cut: float(cut.std()))
