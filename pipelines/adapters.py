"""Adapters in use: LoRA and new words, loaded into a system, weighed, merged into it, and taken out again."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoints import lora as lora_files
from ldm.checkpoints.files import file_hash, file_in
from ldm.conditioning import inversion
from ldm.conditioning.sdxl import parts_of
from ldm.errors import UserError, nearest
from ldm.models.lora import LoRA
from ldm.system import System
from pipelines.files import whole_path
from pipelines.recipe import EmbeddingUse, LoRAUse


@dataclass(frozen=True)
class _Loaded:
    """A LoRA: where from, and its part for each network."""

    path: str
    hash: str
    parts: dict[str, LoRA]

    @property
    def weight(self) -> float:
        return next(iter(self.parts.values())).weight


class Adapters:
    """What is loaded into one system.

    LoRAs stay on the device where the system works, even while its own parts rest elsewhere: they are small.
    """

    def __init__(self, system: System, device: torch.device):
        self.system = system
        self.device = device
        self._loras: dict[str, _Loaded] = {}
        self._words = {part.name: inversion.NewWords(part) for part in parts_of(system.text)}
        self._embeddings: dict[EmbeddingUse, list[str]] = {}

    def to(self, device: torch.device) -> None:
        """Follow the system to a device and into its precision."""
        self.device = device
        for loaded in self._loras.values():
            self._place(loaded.parts)

    # LoRA

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """See `TextToImagePipeline.load_lora`."""
        file = file_in(path, lora_files.FILE)
        name = name or Path(path).resolve().stem
        if name in self._loras:
            raise UserError(f"a LoRA named {name!r} is loaded already: give another name, or set its weight")
        _check_weight(name, weight)
        networks = self._networks()
        found = lora_files.read_lora(path, networks, self.system.unet.config.to_diffusers())
        if not found:
            raise UserError(f"{path} holds no LoRA")
        parts = {part: LoRA.from_weights(networks[part], each) for part, each in found.items()}
        self._place(parts)
        self._loras[name] = _Loaded(whole_path(path), file_hash(file), parts)
        self._weigh(name, weight)
        return name

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """See `TextToImagePipeline.set_loras`."""
        for name, weight in weights.items():
            self._check_name(name)
            _check_weight(name, weight)
        for name in self._loras:
            self._weigh(name, weights.get(name, 0.0))

    def unload_loras(self, names: Iterable[str] | None = None) -> None:
        """See `TextToImagePipeline.unload_loras`."""
        names = list(self._loras if names is None else names)
        for name in names:
            self._check_name(name)
        for name in names:
            for part in self._loras.pop(name).parts.values():
                part.detach()

    def merge_loras(self) -> None:
        """See `TextToImagePipeline.merge_loras`."""
        for part in self._parts():
            part.merge()

    def unmerge_loras(self) -> None:
        """See `TextToImagePipeline.unmerge_loras`."""
        for part in self._parts():
            part.unmerge()

    def _networks(self) -> dict[str, nn.Module]:
        return {**self.system.text.modules, "unet": self.system.unet}

    def _parts(self) -> list[LoRA]:
        return [part for loaded in self._loras.values() for part in loaded.parts.values()]

    def _place(self, parts: Mapping[str, LoRA]) -> None:
        for name, part in parts.items():
            part.to(device=self.device, dtype=next(self._networks()[name].parameters()).dtype)

    def _weigh(self, name: str, weight: float) -> None:
        for part in self._loras[name].parts.values():
            part.weight = weight

    def _check_name(self, name: str) -> None:
        if name not in self._loras:
            loaded = ", ".join(self._loras) or "none"
            raise UserError(f"no LoRA is named {name!r}{nearest(name, self._loras)} (loaded: {loaded})")

    # New words

    def load_words(self, path: str | Path, token: str | None = None) -> list[str]:
        """See `TextToImagePipeline.load_textual_inversion`."""
        words = inversion.read_inversion(path, token)
        for word, vectors in words.items():
            if set(vectors) != set(self._words):
                raise UserError(
                    f"{path} has vectors for {' and '.join(sorted(vectors))}, where this model reads prompts with "
                    f"{' and '.join(sorted(self._words))}: it is for another model"
                )
            for encoder, each in vectors.items():
                self._words[encoder].check(word, each)
        for word, vectors in words.items():
            for encoder, each in vectors.items():
                self._words[encoder].add(word, each)
        use = EmbeddingUse(whole_path(path), token, file_hash(file_in(path, inversion.FILE)))
        self._embeddings[use] = list(words)
        return list(words)

    def unload_words(self) -> None:
        """See `TextToImagePipeline.unload_textual_inversion`."""
        self._embeddings.clear()
        for each in self._words.values():
            for word in each.words:
                each.remove(word)

    # What is told of them

    def recipe(self) -> dict[str, Any]:
        """Recipe's `loras` and `embeddings`: what takes part in a picture drawn now."""
        used = (LoRAUse(each.path, each.weight, each.hash) for each in self._loras.values())
        return {"loras": tuple(each for each in used if each.weight), "embeddings": tuple(self._embeddings)}

    def warn_of_saving(self) -> None:
        """Warn whoever saves the system of what of its adapters is written with it."""
        merged = [name for name, each in self._loras.items() if next(iter(each.parts.values())).merged]
        said = {
            "these LoRAs are written as part of the weights, into which they are merged": merged,
            "these LoRAs are not written, they stay in their own files (merge_loras() makes them part of the "
            "weights)": [name for name in self._loras if name not in merged],
            "these words are not written, they stay in their own files": [
                word for words in self._embeddings.values() for word in words
            ],
        }
        for what, names in said.items():
            if names:
                warnings.warn(f"{what}: {', '.join(names)}", stacklevel=3)

    def load_again(self, loras: Iterable[LoRAUse], embeddings: Iterable[EmbeddingUse]) -> list[str]:
        """Load what a recipe names, in order; returns notes on files that are not what they were.

        Raises UserError, also for a file that a recipe names and that is gone.
        """
        uses = [*loras, *embeddings]
        for use in uses:
            if use.hash and not Path(use.path).exists():
                raise UserError(
                    f"the picture was drawn with {use.path}, which is not there: put it back first"
                )
        notes: list[str] = []
        for place, use in enumerate(uses):
            if isinstance(use, LoRAUse):
                name = self.load_lora(use.path, use.weight, f"{Path(use.path).stem}-{place}")
                found = self._loras[name].hash
            else:
                words = self.load_words(use.path, use.token)
                found = next(each.hash for each, its in self._embeddings.items() if its == words)
            if use.hash and use.hash != found:
                notes.append(f"{use.path} has changed since the picture was drawn ({use.hash}, now {found})")
        return notes


def _check_weight(name: str, weight: float) -> None:
    if not math.isfinite(weight):
        raise UserError(f"the weight of the LoRA {name!r} is {weight}: give a number, commonly 0 to 1")
