"""Captions to conditions in training: some left out for guidance, frozen encoders' states kept on disk."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ldm.conditioning.text import TextEmbedding, TextEncoder
from ldm.diffusion.parameterization import per_image
from ldm.system import fingerprint
from ldm.training.cache import Entry, TensorCache


class Conditions:
    """The conditions that captions become.

    cache: a folder that keeps the states of frozen encoders by caption, for those that `prepare` was told of.
    """

    def __init__(self, text: TextEncoder, cache: Path | None = None):
        self.text = text
        self.cache = TensorCache(cache) if cache else None

    def prepare(self, captions: Sequence[str]) -> None:
        """Compute the states of all captions to come, "" among them; in all processes alike."""
        if self.cache is None:
            return
        one = self.text.length([""])
        by_key = {self._key(each): each for each in ("", *captions) if self.text.length([each]) == one}

        def make(keys: Sequence[str]) -> list[Entry]:
            with torch.no_grad():
                made = self.text.encode([by_key[key] for key in keys])[0]
            pooled = made.pooled
            return [
                {"hidden": hidden} | ({} if pooled is None else {"pooled": pooled[i]})
                for i, hidden in enumerate(made.hidden)
            ]

        self.cache.fill(list(by_key), make)

    def __call__(self, captions: Sequence[str], dropped: Tensor) -> TextEmbedding:
        """float32 rows (B, ...). dropped: (B,), which captions are left out, as at sampling without a prompt."""
        zeros = self.text.zeros_without_negative
        kept = [c if zeros or not drop else "" for c, drop in zip(captions, dropped.tolist(), strict=True)]
        embedding = self._states(kept).map(lambda part: part.float())
        if not zeros:
            return embedding
        return embedding.map(lambda part: part.masked_fill(per_image(dropped, part).to(part.device), 0))

    def _states(self, captions: Sequence[str]) -> TextEmbedding:
        keys = [self._key(each) for each in captions] if self.cache else []
        if self.cache is None or not all(key in self.cache for key in keys):
            return self.text.encode(captions)[0]
        entries = [self.cache.read(key) for key in keys]
        # In float32 at once: autocast to bfloat16 refuses to join what is stored in float16.
        parts = {name: torch.stack([each[name].float() for each in entries]) for name in entries[0]}
        return TextEmbedding(parts["hidden"], parts.get("pooled"))

    @cached_property
    def _made_from(self) -> str:
        return " ".join(fingerprint(module.state_dict()) for module in self.text.modules.values())

    def _key(self, caption: str) -> str:
        return hashlib.sha256(f"{self._made_from} {caption}".encode()).hexdigest()[:24]
