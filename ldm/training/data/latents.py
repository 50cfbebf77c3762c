"""Latents to train on, behind one protocol, and those of pictures from disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.buckets import Crop, Framing, Pixels, assign, buckets, cut, plan_framing
from ldm.data.order import Order
from ldm.data.pictures import PictureSet
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.pictures import to_tensor
from ldm.system import fingerprint
from ldm.training.data.cache import Entry, TensorCache
from ldm.training.distributed import BatchGenerator

SHARD = 2048
_ALL = slice(None)
_PIXELS = 2**20  # a call of the encoder: 64 pictures of 128 px, 4 of 512 px


@dataclass(frozen=True)
class RowGroup:
    """Rows of a batch by whose mean, times `weight`, the loss grows; `name` is for the log."""

    name: str
    rows: slice
    weight: float


@dataclass(frozen=True)
class LatentBatch:
    """A batch that diffusion learns from.

    latents: (B, C, h, w) float32, scaled to about unit variance, on the CPU or where they were computed.
    time_ids: (B, 6) float32, SDXL's size conditions: original height and width, crop top and left, target height and
    width, in pixels.
    pictures: (B, 3, H, W) in [-1, 1] where they were asked for. conditioning: (B, 3, H, W) in [0, 1], control pictures,
    where the data have them.
    choices: of each row, captions of which one is drawn in place of its own; none where the own ones stand.
    groups: rows that count apart in the loss; none where it is the mean over all of them.
    """

    latents: Tensor
    captions: list[str]
    time_ids: Tensor
    pictures: Tensor | None = None
    choices: Sequence[Sequence[str]] = ()
    groups: Sequence[RowGroup] = ()
    conditioning: Tensor | None = None

    def draw_captions(self, rng: BatchGenerator) -> list[str]:
        """Return the rows' captions; where there is a choice, one of it at random."""
        if not self.choices:
            return self.captions
        drawn = zip(self.choices, rng.uniform().tolist(), strict=True)
        return [options[int(u * len(options))] for options, u in drawn]

    def mean(self, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of rows (B,) as one: their mean, or the weighted sum of the groups' means, also named."""
        if not self.groups:
            return losses.mean(), {}
        means = {each.name: losses[each.rows].mean() for each in self.groups}
        weighted = [each.weight * means[each.name] for each in self.groups]
        return sum(weighted[1:], start=weighted[0]), means


class LatentSource(Protocol):
    """An endless, deterministic order of latents.

    captions: all that can come; none where they are not known beforehand. resolution: the pictures' in pixels, where
    the data have one; None is the model's own. dtype: what the encoder computes in, under autocast.
    """

    captions: Sequence[str]
    resolution: int | None
    dtype: torch.dtype

    def prepare(self, batch_size: int) -> None:
        """Compute now what `read` would else compute when it is first called. In all processes alike."""
        ...

    def read(self, start: int, size: int, rows: slice = _ALL) -> LatentBatch:
        """Return the `rows` of pictures `start` .. `start + size`. In all processes alike, but for `rows`.

        size: always the same, that of `prepare`.
        """
        ...

    def notes(self) -> list[str]:
        """Return what the user should know of the pictures, a line each."""
        ...


class PictureLatents:
    """The latents of pictures from disk, each cut to the bucket of its shape.

    Args:
        resolution, max_ratio, step: of the buckets (see ldm/data/buckets.py), in pixels.
        captions: in place of the pictures' own, one of these each time.
        seed: of order, cuts, flips and draws.
        crop, flip: how a picture is cut, and whether it is mirrored half of the time, anew each turn.
        cache: a folder that keeps the latents (two of a picture that may be mirrored); all are computed at the first
            read, or by `prepare`. None: each is computed when it is needed, and meanwhile the next batch is decoded.
        with_pictures: also give the pictures.
        sample: draw each latent from the posterior, anew each turn, in place of its mean; a cache then holds the
            posterior's log-variance too.
        dtype: what the encoder computes in, under autocast.

    Raises:
        UserError: a random crop with a cache; a step the autoencoder can't take; what `buckets` refuses.
    """

    def __init__(
        self,
        picture_set: PictureSet,
        autoencoder: AutoencoderKL,
        *,
        resolution: int,
        captions: Sequence[str] = (),
        seed: int = 0,
        max_ratio: float = 1.0,
        step: int = 64,
        crop: Crop = "center",
        flip: bool = False,
        cache: Path | None = None,
        with_pictures: bool = False,
        sample: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ):
        factor = autoencoder.config.factor
        if cache is not None and crop == "random":
            raise UserError(
                "random crops are new in each turn and can't be cached: set crop to center, or no cache"
            )
        if step % factor:
            raise UserError(
                f"the buckets' step is {step}: make it a multiple of {factor}, the autoencoder's factor"
            )
        self.sizes = buckets(resolution, step, max_ratio)
        self.targets: list[tuple[int, int]] = []  # by picture; they and the order are of a batch's size
        self.order: Order
        self.picture_set, self.autoencoder, self.seed = picture_set, autoencoder, seed
        self.resolution: int | None = resolution
        self.choices = tuple(captions)
        self.captions: Sequence[str] = self.choices or [
            each for item in picture_set.items for each in item.captions
        ]
        self.crop: Crop = crop
        self.flip, self.with_pictures, self.sample, self.dtype = flip, with_pictures, sample, dtype
        self.cache = None if cache is None else TensorCache(cache)
        self._chunk = chunk_of(resolution, resolution)
        self._batch_size = 0  # that it was prepared for
        self._workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoders work outside Python's lock
        self._begun: dict[int, dict[tuple[bool, int, Framing], Future[Pixels]]] = {}  # by the batch's start

    def notes(self) -> list[str]:
        return self.picture_set.report()

    def read(self, start: int, size: int, rows: slice = _ALL) -> LatentBatch:
        """See `LatentSource`; `start` is a multiple of `size`."""
        self.prepare(size)
        chosen = self._framed(start, size, rows)
        pictures = self._pictures(start, size, rows) if self.with_pictures or self.cache is None else None
        if self.cache is not None:
            entries = [self.cache.read(self._key(*each)) for each in chosen]
            parts = {name: torch.stack([each[name].float() for each in entries]) for name in entries[0]}
        else:
            assert pictures is not None
            parts = self._parts(encode(self.autoencoder, pictures, self.dtype))
        latents = parts["latents"]
        if self.sample:
            noise = self._noise(start, size, rows, latents.shape[1:]).to(latents.device)
            latents = DiagonalGaussian(latents, parts["logvar"]).sample(noise)
        return LatentBatch(
            latents=latents,
            captions=self._captions(start, size, rows),
            time_ids=torch.tensor([framing.time_ids for _, framing in chosen], dtype=torch.float32),
            pictures=pictures if self.with_pictures else None,
            choices=[self.choices] * len(chosen) if self.choices else (),
            conditioning=self._pictures(start, size, rows, control=True) / 2 + 0.5
            if self.picture_set.conditionings
            else None,
        )

    def prepare(self, batch_size: int) -> None:
        """Share the pictures out to buckets, of at least a batch each, and fill the cache, if there is one."""
        if self._batch_size == batch_size:
            return
        sides = [(item.height, item.width) for item in self.picture_set.items]
        self.targets = assign(sides, self.sizes, batch_size)
        self.order = Order(self.targets, batch_size, self.seed)
        self._begun, self._batch_size = {}, batch_size
        if self.cache is not None:
            self._fill(self.cache)

    def _fill(self, cache: TensorCache) -> None:
        """Compute what is not there yet."""
        wanted: dict[str, tuple[int, Framing]] = {}
        by_bucket = sorted(range(len(self.targets)), key=self.targets.__getitem__)
        for index in by_bucket:
            item = self.picture_set.items[index]
            plain = plan_framing((item.height, item.width), self.targets[index])
            for framing in (plain, replace(plain, flipped=True)) if self.flip else (plain,):
                wanted[self._key(index, framing)] = index, framing

        def make(keys: Sequence[str]) -> list[Entry]:
            futures = [self._workers.submit(self._cut, *wanted[key]) for key in keys]
            cuts = [future.result() for future in futures]
            alike = groupby(cuts, key=np.shape)  # a chunk may reach over a bucket's end
            made = [encode(self.autoencoder, to_tensor(list(some)), self.dtype) for _, some in alike]
            parts = [(self._parts(each), len(each.mean)) for each in made]
            return [{name: part[name][i] for name in part} for part, count in parts for i in range(count)]

        cache.fill(list(wanted), make, self._chunk, SHARD)

    def _parts(self, posterior: DiagonalGaussian) -> dict[str, Tensor]:
        """What latents are made of, by name, as a cache holds it."""
        return {"latents": posterior.mean} | ({"logvar": posterior.logvar} if self.sample else {})

    def _noise(self, start: int, size: int, rows: slice, shape: Sequence[int]) -> Tensor:
        """Unit noise for a batch's rows (B, *shape): a function of the seed, the picture and its turn."""
        rngs = (
            np.random.default_rng((self.seed, 3, *place)) for place in self.order.places(start, size)[rows]
        )
        return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))

    def _captions(self, start: int, size: int, rows: slice) -> list[str]:
        """The rows' captions; of a picture that has several one at random, anew in each turn."""
        return [
            self.picture_set.items[index].pick(np.random.default_rng((self.seed, 4, turn, index)))
            for turn, index in self.order.places(start, size)[rows]
        ]

    @cached_property
    def _encoder(self) -> str:
        return encoder_key(self.autoencoder, self.dtype)

    def _key(self, index: int, framing: Framing) -> str:
        """All that decides an entry: the encoder, the picture's bytes, how they are cut, and what is kept."""
        (height, width), (top, left) = framing.target, framing.crop
        ending = ("-flipped" if framing.flipped else "") + ("-posterior" if self.sample else "")
        return f"{self._encoder}-{self.picture_set.items[index].key}-{height}x{width}-{top},{left}{ending}"

    def _framed(self, start: int, size: int, rows: slice) -> list[tuple[int, Framing]]:
        """The pictures of a batch's rows, and how each is cut in its turn."""
        framed: list[tuple[int, Framing]] = []
        for turn, index in self.order.places(start, size)[rows]:
            item, rng = self.picture_set.items[index], np.random.default_rng((self.seed, 1, turn, index))
            original, target = (item.height, item.width), self.targets[index]
            framed.append((index, plan_framing(original, target, crop=self.crop, flip=self.flip, rng=rng)))
        return framed

    def _pictures(self, start: int, size: int, rows: slice, control: bool = False) -> Tensor:
        """The rows' pictures, or their control pictures (B, 3, H, W), in [-1, 1]; those of the next batch are begun."""
        following = start + size
        self._begun = {each: self._begun.get(each, {}) for each in (start, following)}
        for at in (start, following):
            for each in self._framed(at, size, rows):
                if (control, *each) not in self._begun[at]:
                    self._begun[at][(control, *each)] = self._workers.submit(self._cut, *each, control)
        framed = self._framed(start, size, rows)
        return to_tensor([self._begun[start][(control, *each)].result() for each in framed])

    def _cut(self, index: int, framing: Framing, control: bool = False) -> Pixels:
        read = self.picture_set.read_conditioning if control else self.picture_set.read
        return cut(read(index), framing)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: Tensor, dtype: torch.dtype) -> DiagonalGaussian:
    """Encode pictures (B, 3, H, W) in [-1, 1] to their posterior over scaled latents (B, C, h, w), on its device.

    Computed in `dtype` under autocast, a few pictures at a time; given in float32.
    """
    device = next(autoencoder.parameters()).device
    means, logvars = list[Tensor](), list[Tensor]()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for part in pictures.split(chunk_of(*pictures.shape[2:])):
            posterior = autoencoder.encode(part.to(device, memory_format=torch.channels_last))
            means.append(autoencoder.scale(posterior.mean.float()))
            logvars.append(posterior.logvar.float())
    one = torch.ones(1, means[0].shape[1], 1, 1, device=device)
    gain = autoencoder.scale(one) - autoencoder.scale(0 * one)
    return DiagonalGaussian(torch.cat(means), torch.cat(logvars) + 2 * gain.abs().log())


def encoder_key(autoencoder: AutoencoderKL, dtype: torch.dtype) -> str:
    """Hash all of an autoencoder that decides its latents: not the decoder, which may be fine-tuned."""
    config = autoencoder.config
    weights = {
        name: each
        for name, each in autoencoder.state_dict().items()
        if name.startswith(("encoder.", "quant_conv."))
    }
    scaling = (config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std)
    parts = [fingerprint(weights), scaling, str(dtype)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def chunk_of(height: int, width: int) -> int:
    """Return how many pictures go through the encoder at a time."""
    return max(1, _PIXELS // (height * width))
