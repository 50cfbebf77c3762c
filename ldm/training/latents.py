"""A pool of compositions, encoded once: shards of latents and captions in safetensors, built as they are needed."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.files import read_metadata, read_tensors, write_tensors
from ldm.data.recipe import Recipe
from ldm.models.autoencoder import AutoencoderKL
from ldm.pictures import to_tensor

SHARD = 2048
_CHUNK = 64  # pictures a call of the encoder


class LatentCache:
    """`pictures` compositions of a recipe as latents, float16 on disk and in memory.

    The first pass goes through the pool in order and builds what is missing; an interrupted build keeps its whole
    shards. Each later pass has an order of its own.
    """

    def __init__(self, folder: Path, recipe: Recipe, autoencoder: AutoencoderKL, pictures: int):
        self.folder, self.recipe, self.autoencoder = folder, recipe, autoencoder
        self.shards = max(1, pictures // SHARD)
        self._loaded: dict[int, tuple[Tensor, list[str]]] = {}

    def read(self, start: int, size: int) -> tuple[Tensor, list[str]]:
        """Pictures `start` .. `start + size` of the endless order: latents (size, C, h, w) and captions."""
        places = [self._place(i) for i in range(start, start + size)]
        latents = torch.stack([self._shard(shard)[0][row] for shard, row in places])
        return latents.float(), [self._shard(shard)[1][row] for shard, row in places]

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and row of a position in the endless order."""
        turn, index = divmod(index, self.shards * SHARD)
        if turn > 0:
            if getattr(self, "_turn", None) != turn:
                self._turn, self._order = turn, np.random.default_rng(turn).permutation(self.shards * SHARD)
            index = int(self._order[index])
        return divmod(index, SHARD)

    def _shard(self, number: int) -> tuple[Tensor, list[str]]:
        if number not in self._loaded:
            path = self.folder / f"{number:05d}.safetensors"
            if not path.exists():
                self._build(number, path)
            captions: list[str] = json.loads(read_metadata(path)["captions"])
            self._loaded[number] = read_tensors(path)["latents"].clone(), captions
        return self._loaded[number]

    @torch.no_grad()
    def _build(self, number: int, path: Path) -> None:
        device = next(self.autoencoder.parameters()).device
        examples = [self.recipe.sample(i) for i in range(number * SHARD, (number + 1) * SHARD)]
        latents: list[Tensor] = []
        for start in range(0, SHARD, _CHUNK):
            pictures = to_tensor([e.picture for e in examples[start : start + _CHUNK]]).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                mean = self.autoencoder.encode(pictures.contiguous(memory_format=torch.channels_last)).mean
            latents.append(self.autoencoder.scale(mean.float()).half().cpu())
        write_tensors(
            path, {"latents": torch.cat(latents)}, {"captions": json.dumps([e.caption for e in examples])}
        )
