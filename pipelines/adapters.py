"""Adapters in use: LoRA and new words, loaded into a system, weighed, merged into it, and taken out again."""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import lora as lora_files
from ldm.checkpoints.files import file_hash, file_in
from ldm.checkpoints.paths import readable
from ldm.conditioning import inversion
from ldm.conditioning.prompts.weighted import Lora
from ldm.conditioning.sdxl import parts_of
from ldm.errors import UserError, nearest
from ldm.models.lora import LoRA
from ldm.models.resting import computed_in
from ldm.system import System
from pipelines.files import whole_path
from pipelines.turns import Turns
from pipelines.uses import EmbeddingUse, LoRAUse


@dataclass(frozen=True)
class _Loaded:
    """A LoRA: where from, its part for each network, and the words that came along."""

    path: str
    hash: str
    parts: dict[str, LoRA]
    words: list[str]

    @property
    def weight(self) -> float:
        return next(iter(self.parts.values())).weight


class Adapters:
    """LoRAs and new words of one system: `pipe.adapters`. Each method that changes or saves something is a turn.

    LoRAs stay on the device where the system works, even while its own parts rest elsewhere: they are small.
    """

    def __init__(self, system: System, device: torch.device, turns: Turns):
        self.system = system
        self.device = device
        self._turns = turns
        self._loras: dict[str, _Loaded] = {}
        self._words = {part.name: inversion.NewWords(part) for part in parts_of(system.text)}
        self._embeddings: dict[EmbeddingUse, list[str]] = {}

    def to(self, device: torch.device) -> None:
        """Follow the system to a device and into its precision, within a turn."""
        self.device = device
        for loaded in self._loras.values():
            self._place(loaded.parts)

    def _turn(self) -> AbstractContextManager[None]:
        return self._turns.turn(self.device)

    # LoRA

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """Put a LoRA over the networks that it is for, beside those that are there; returns its name.

        LoHa, LoKr, DoRA, (IA)^3, norms and differences of weights count as LoRAs; words that came along are taught too.
        path: a file of diffusers', kohya's, LyCORIS', ComfyUI's or peft's, or a folder of diffusers' or peft's. weight:
        how much of it. name: for `set_weights` and `unload_loras`; None is the file's. Warns of what is passed over.
        Raises UserError.
        """
        with self._turn():
            name, notes = self._load(path, weight, name)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return name

    def _load(self, path: str | Path, weight: float, name: str | None) -> tuple[str, list[str]]:
        """Load a LoRA and the words in it; returns its name, and notes for the user. Raises UserError."""
        name = name or Path(path).resolve().stem
        if name in self._loras:
            raise UserError(f"a LoRA named {name!r} is loaded already: give another name, or set its weight")
        _check_weight(name, weight)
        networks = self._networks()
        found = lora_files.read_lora_file(path, networks, self.system.network.config.to_diffusers())
        if not found.adapters:
            raise UserError(f"{path} holds no LoRA")
        parts: dict[str, LoRA] = {}
        try:
            for part, each in found.adapters.items():
                parts[part] = LoRA.from_weights(networks[part], each)
            self._place(parts)
        except BaseException:  # a half of it would change pictures whose recipes don't name it
            for each in parts.values():
                each.detach()
            raise
        words = self._load_bundled(found, notes := list(found.notes))
        self._loras[name] = _Loaded(whole_path(path), _hash(found.files), parts, words)
        self._weigh(name, weight)
        return name, notes

    def _load_bundled(self, file: lora_files.LoRAFile, notes: list[str]) -> list[str]:
        """Teach the encoders the words that a LoRA's file brings; those that can't be are noted, like the others."""
        loaded: list[str] = []
        path = file.files[0]
        try:
            bundled = inversion.bundled_words(file.bundled, path)
        except UserError as error:
            notes.append(f"the words that came along are not loaded: {error}")
            return []
        for word, vectors in bundled.items():
            try:
                self._add_words(inversion.checked({word: vectors}, path), path)
                loaded.append(word)
            except UserError as error:
                notes.append(f"the word {word[:100]!r} that came along is not loaded: {error}")
        if loaded:
            notes.append(f"{path} brings words of its own, to be used in prompts: {', '.join(loaded)}")
        return loaded

    def weights(self) -> dict[str, float]:
        """The weight of every LoRA that is loaded, by its name."""
        return {name: each.weight for name, each in self._loras.items()}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Use these LoRAs, with these weights; others that are loaded get weight 0. Raises UserError."""
        with self._turn():
            for name, weight in weights.items():
                self._check_name(name)
                _check_weight(name, weight)
            for name in self._loras:
                self._weigh(name, weights.get(name, 0.0))

    def unload_loras(self, names: Iterable[str] | None = None) -> None:
        """Take LoRAs out, merged or not; None takes all. The weights are then those of the model. Raises UserError."""
        with self._turn():
            names = list(self._loras if names is None else names)
            for name in names:
                self._check_name(name)
            for name in names:
                loaded = self._loras.pop(name)
                for part in loaded.parts.values():
                    part.detach()
                self._forget(loaded.words)

    def merge(self, names: Iterable[str] | None = None, scale: float = 1.0) -> None:
        """Add LoRAs, as weighed, to the networks' weights: they cost no time any more, and are saved with them.

        names: None is all. scale: their weights are multiplied by it first. Raises UserError.
        """
        if self.system.quantization is not None:
            raise UserError("LoRAs can't be merged into quantized weights: use them beside, or load without")
        with self._turn():
            names = list(self._loras if names is None else names)
            for name in names:
                self._check_name(name)
                _check_weight(name, scale)
            for name in names:
                self._weigh(name, self._loras[name].weight * scale)
                for part in self._loras[name].parts.values():
                    part.merge()

    def unmerge(self) -> None:
        """Give the networks the very weights from before `merge`; the LoRAs are beside them again."""
        with self._turn():
            for part in self._parts():
                part.unmerge()

    def _networks(self) -> dict[str, nn.Module]:
        return {**self.system.text.modules, self.system.network.component: self.system.network}

    def _parts(self) -> list[LoRA]:
        return [part for loaded in self._loras.values() for part in loaded.parts.values()]

    def _place(self, parts: Mapping[str, LoRA]) -> None:
        for name, part in parts.items():
            part.to(device=self.device, dtype=computed_in(self._networks()[name]))

    def _weigh(self, name: str, weight: float) -> None:
        for part in self._loras[name].parts.values():
            part.weight = weight

    def _free(self, name: str) -> str:
        """The name, or where a LoRA has it already one with a number."""
        return next(each for n in count(1) if (each := f"{name}-{n}" if n > 1 else name) not in self._loras)

    def _check_name(self, name: str) -> None:
        if name not in self._loras:
            loaded = ", ".join(self._loras) or "none"
            raise UserError(f"no LoRA is named {name!r}{nearest(name, self._loras)} (loaded: {loaded})")

    def asked(self, loras: Sequence[Lora]) -> dict[str, float]:
        """Return the weight of every LoRA for a prompt that asks for some, which then has these weights for them.

        Of one that it names twice the weights add up, as in AUTOMATIC1111. Raises UserError for one that isn't loaded.
        """
        weights = self.weights()
        sums: dict[str, float] = {}
        for name, weight in loras:
            self._check_name(name)
            _check_weight(name, weight)
            sums[name] = sums.get(name, 0.0) + weight
        for name, weight in sums.items():
            if any(part.merged for part in self._loras[name].parts.values()) and weight != weights[name]:
                raise UserError(
                    f"the LoRA {name!r}, which a prompt asks for, is merged: unmerge it (unfuse_lora) first"
                )
        return weights | sums

    def named(self, uses: Iterable[LoRAUse]) -> list[Lora]:
        """Return LoRAs as a prompt asks for them; those that aren't loaded are, with weight 0 for all other pictures.

        Raises UserError.
        """
        asked = list[Lora]()
        for use in uses:
            path = whole_path(use.path)
            if path not in (paths := {each.path: name for name, each in self._loras.items()}):
                self.load_again([LoRAUse(path, 0.0, name=self._free(Path(path).stem))], [])
                paths = {each.path: name for name, each in self._loras.items()}
            asked.append(Lora(paths[path], use.weight))
        return asked

    @contextmanager
    def weighed(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Within a turn: draw with the weights of `asked`, then put the former ones back."""
        before = self.weights()
        try:
            for name, weight in weights.items():
                if weight != before[name]:
                    self._weigh(name, weight)
            yield
        finally:
            for name, weight in before.items():
                if weight != weights[name]:
                    self._weigh(name, weight)

    # New words

    def load_words(self, path: str | Path, token: str | None = None) -> list[str]:
        """Teach the text encoders new words, by an embedding of diffusers' or AUTOMATIC1111's; returns the words.

        token: the word to use in prompts, in place of the file's own. Raises UserError.
        """
        with self._turn():
            return self._load_words(path, token)

    def _load_words(self, path: str | Path, token: str | None) -> list[str]:
        words = inversion.read_inversion(path, token)
        self._add_words(words, path)
        use = EmbeddingUse(whole_path(path), token, file_hash(file_in(path, inversion.FILE)))
        self._embeddings[use] = list(words)
        return list(words)

    def _add_words(self, words: Mapping[str, Mapping[str, Tensor]], path: str | Path) -> None:
        """Teach the encoders words, all of them or none. Raises UserError."""
        for vectors in words.values():
            if set(vectors) != set(self._words):
                raise UserError(
                    f"{path} has vectors for {' and '.join(sorted(vectors))}, where this model reads prompts with "
                    f"{' and '.join(sorted(self._words))}: it is for another model"
                )
        known = {
            encoder: {word: vectors[encoder] for word, vectors in words.items()} for encoder in self._words
        }
        for encoder, each in known.items():
            self._words[encoder].check_all(each)
        for encoder, each in known.items():
            self._words[encoder].add_all(each)

    def _forget(self, words: Iterable[str]) -> None:
        gone = set(words)
        for each in self._words.values():
            each.remove_all(gone & set(each.words))

    def check_words(self, words: Iterable[str]) -> None:
        """Raise UserError for a word that a prompt names as one of textual inversion's, and that isn't loaded."""
        known = {word for each in self._words.values() for word in each.words}
        for word in words:
            if word not in known:
                loaded = ", ".join(sorted(known)) or "none"
                raise UserError(
                    f"no embedding gives the word {word!r}{nearest(word, known)} (loaded: {loaded})"
                )

    def unload_words(self) -> None:
        """Forget all words that were loaded."""
        with self._turn():
            self._embeddings.clear()
            for each in self._words.values():
                each.remove_all(each.words)

    # What is told of them

    def recipe(self, weights: Mapping[str, float], named: Sequence[Lora] = ()) -> dict[str, Any]:
        """Return Recipe's `loras` and `embeddings`: what takes part in a picture that is drawn with these weights.

        named: what its prompt asks for, which takes part with any weight: without it the prompt can't be read.
        """
        asked = {each.name for each in named}
        loras = tuple(
            LoRAUse(each.path, weights[name], each.hash, name)
            for name, each in self._loras.items()
            if weights[name] or each.words or name in asked
        )
        return {"loras": loras, "embeddings": tuple(self._embeddings)}

    def warn_of_saving(self) -> None:
        """Warn whoever saves the system of what of its adapters is written with it."""
        merged = [name for name, each in self._loras.items() if next(iter(each.parts.values())).merged]
        said = {
            "these LoRAs are written as part of the weights, into which they are merged": merged,
            "these LoRAs are not written, they stay in their own files (fuse_lora() makes them part of the "
            "weights)": [name for name in self._loras if name not in merged],
            "these words are not written, they stay in their own files": [
                word for words in self._embeddings.values() for word in words
            ],
        }
        for what, names in said.items():
            if names:
                warnings.warn(f"{what}: {', '.join(names)}", stacklevel=3)

    def load_again(self, loras: Iterable[LoRAUse], embeddings: Iterable[EmbeddingUse]) -> list[str]:
        """Load what a recipe names, in order; returns notes on files: what is passed over, what has changed since.

        It loads from anywhere: of a stranger's recipe look at the paths first, as `pipelines.trust` does.
        Raises UserError, also for a file that a recipe names and that is gone.
        """
        with self._turn():
            return self._load_again(loras, embeddings)

    def _load_again(self, loras: Iterable[LoRAUse], embeddings: Iterable[EmbeddingUse]) -> list[str]:
        uses = [*loras, *embeddings]
        for use in uses:
            with readable(use.path):
                if use.hash and not Path(use.path).exists():
                    raise UserError(
                        f"the picture was drawn with {use.path}, which is not there: put it back first"
                    )
        notes: list[str] = []
        for use in uses:
            if isinstance(use, LoRAUse):
                name, said = self._load(use.path, use.weight, use.name or self._free(Path(use.path).stem))
                notes += said
                found = self._loras[name].hash
            else:
                words = self._load_words(use.path, use.token)
                found = next(each.hash for each, its in self._embeddings.items() if its == words)
            if use.hash and use.hash != found:
                notes.append(f"{use.path} has changed since the picture was drawn ({use.hash}, now {found})")
        return notes


def _hash(files: list[Path]) -> str:
    """The hash of a LoRA's file; of several, that of theirs."""
    hashes = [file_hash(each) for each in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:10]


def _check_weight(name: str, weight: float) -> None:
    if not math.isfinite(weight):
        raise UserError(f"the weight of the LoRA {name!r} is {weight}: give a number, commonly 0 to 1")
