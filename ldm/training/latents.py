"""A pool of compositions, encoded once: shards of latents and captions in safetensors, built as they are needed."""

import hashlib
import json
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.files import read_metadata, read_tensors, write_tensors
from ldm.data.recipe import Recipe
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import to_tensor
from ldm.system import fingerprint

SHARD = 2048
_CHUNK = 64  # pictures a call of the encoder
_ALL = slice(None)


class LatentCache:
    """`pictures` compositions of a recipe as latents, float16 on disk and in memory.

    The first pass goes through the pool in order and builds what is missing; an interrupted build keeps its whole
    shards. Each later pass has an order of its own. Of several processes the main one builds, the others wait.

    Raises UserError unless `pictures` is a multiple of SHARD, and where a shard was made from something else.
    """

    def __init__(self, folder: Path, recipe: Recipe, autoencoder: AutoencoderKL, pictures: int):
        if pictures < SHARD or pictures % SHARD:
            raise UserError(f"cached_pictures is {pictures}: make it a multiple of {SHARD}, a shard's size")
        self.folder, self.recipe, self.autoencoder = folder, recipe, autoencoder
        self.shards = pictures // SHARD
        self._loaded: dict[int, tuple[Tensor, list[str]]] = {}
        self._turn, self._order = 0, np.arange(pictures)

    def read(self, start: int, size: int, rows: slice = _ALL) -> tuple[Tensor, list[str]]:
        """The `rows` of pictures `start` .. `start + size` of the endless order: latents (N, C, h, w) and captions."""
        places = [self._place(i) for i in range(start, start + size)]
        for number in sorted(
            {shard for shard, _ in places}
        ):  # not only for its own rows: others wait for them
            self._provide(number)
        latents = torch.stack([self._shard(shard)[0][row] for shard, row in places[rows]])
        return latents.float(), [self._shard(shard)[1][row] for shard, row in places[rows]]

    @cached_property
    def made_from(self) -> str:
        """A hash of all that decides a shard's content: encoder and scaling, recipe, sprites, shard size.

        Not of the decoder: fine-tuning it leaves the latents as they are.
        """
        config = self.autoencoder.config
        weights = {
            name: each.cpu()
            for name, each in self.autoencoder.state_dict().items()
            if name.startswith(("encoder.", "quant_conv."))
        }
        scaling = (config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std)
        # The order of the recipe's lists and weights counts too: no sorting of keys.
        parts = [fingerprint(weights), scaling, asdict(self.recipe.config), SHARD]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for (thing, style), pixels in sorted(self.recipe.sprites.pixels.items()):
            digest.update(f"{thing}/{style} {pixels.shape}".encode() + pixels.tobytes())
        return digest.hexdigest()[:16]

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and row of a position in the endless order."""
        turn, index = divmod(index, self.shards * SHARD)
        if turn != self._turn:
            count = self.shards * SHARD
            self._turn = turn
            self._order = np.random.default_rng(turn).permutation(count) if turn else np.arange(count)
        return divmod(int(self._order[index]), SHARD)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _provide(self, number: int) -> None:
        """Return once the shard is on disk."""
        if number in self._loaded or self._path(number).exists():
            return
        from accelerate import PartialState

        if PartialState().is_main_process:
            self._build(number)
        while not self._path(number).exists():
            time.sleep(0.2)

    def _shard(self, number: int) -> tuple[Tensor, list[str]]:
        if number not in self._loaded:
            path = self._path(number)
            metadata = read_metadata(path)
            if metadata.get("made_from") != self.made_from:
                raise UserError(
                    f"{path} was made from another autoencoder, recipe or sprites: delete {self.folder} (it is "
                    "built anew), or give text_to_image.latents another folder"
                )
            captions: list[str] = json.loads(metadata["captions"])
            self._loaded[number] = read_tensors(path)["latents"].clone(), captions
        return self._loaded[number]

    @torch.no_grad()
    def _build(self, number: int) -> None:
        device = next(self.autoencoder.parameters()).device
        examples = [self.recipe.sample(i) for i in range(number * SHARD, (number + 1) * SHARD)]
        latents: list[Tensor] = []
        for start in range(0, SHARD, _CHUNK):
            pictures = to_tensor([e.picture for e in examples[start : start + _CHUNK]]).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                mean = self.autoencoder.encode(pictures.contiguous(memory_format=torch.channels_last)).mean
            latents.append(self.autoencoder.scale(mean.float()).half().cpu())
        metadata = {"captions": json.dumps([e.caption for e in examples]), "made_from": self.made_from}
        write_tensors(self._path(number), {"latents": torch.cat(latents)}, metadata)
