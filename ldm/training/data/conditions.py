"""Captions to conditions in training: some left out for guidance, frozen encoders' states kept on disk."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.conditioning.sdxl import JoinedEncoder, parts_of
from ldm.conditioning.text import TextEncoder, WindowedEncoder
from ldm.diffusion.parameterization import per_image
from ldm.system import fingerprint
from ldm.training.data.cache import Entry, TensorCache


class Conditions:
    """The conditions that captions become: all of one length, so that none depends on its batch.

    caption_windows: of the text encoder, that every caption is padded to, and cut to.
    cache: a folder that keeps the states of frozen encoders by tokens, for captions that `prepare` was told of.
    """

    def __init__(self, text: TextEncoder, caption_windows: int = 1, cache: Path | None = None):
        self.caption_windows = caption_windows
        self._long: dict[str, None] = {}  # the captions that were cut, in the order of their coming
        parts = [self._cutting(each) for each in parts_of(text)]
        joined = JoinedEncoder(parts, text.zeros_without_negative) if len(parts) > 1 else None
        self.text: TextEncoder = joined or parts[0]
        self.window = parts[0].window
        fullest = self.window.stretched(caption_windows * self.window.capacity).size
        self.length = fullest if parts[0].stretches else caption_windows * self.window.size
        self.cache = TensorCache(cache) if cache else None

    def prepare(self, captions: Sequence[str]) -> None:
        """Compute the states of all captions to come, as far as known, and of ""; in all processes alike."""
        if not captions:  # they are not known yet
            return
        self.text.length(captions)  # finds those that are cut, whatever is in the cache
        if self.cache is None:
            return
        by_key = {self._key(each): each for each in ("", *captions)}

        def make(keys: Sequence[str]) -> list[Entry]:
            with torch.no_grad():
                made = self._encode([by_key[key] for key in keys])
            return [{name: part[i] for name, part in made.parts().items()} for i in range(made.rows)]

        self.cache.fill(list(by_key), make)

    def __call__(self, captions: Sequence[str], dropped: Tensor) -> Condition:
        """float32 rows (B, ...). dropped: (B,), which captions are left out, as at sampling without a prompt."""
        zeros = self.text.zeros_without_negative
        kept = [c if zeros or not drop else "" for c, drop in zip(captions, dropped.tolist(), strict=True)]
        embedding = self._states(kept).map(lambda part: part.float())
        if not zeros:
            return embedding
        return embedding.map(lambda part: part.masked_fill(per_image(dropped, part).to(part.device), 0))

    def notes(self) -> list[str]:
        """Return what was cut, if anything was."""
        if not self._long:
            return []
        first, count = next(iter(self._long)), len(self._long)
        which, were = ("caption is", "was") if count == 1 else ("captions are", "were")
        room = "one window" if self.caption_windows == 1 else f"{self.caption_windows} windows"
        return [
            f"{count} {which} longer than {room} of {self.window.size} tokens and {were} cut (raise caption_windows to "
            f'keep more): first "{first[:60]}..."'
        ]

    def _cutting(self, encoder: WindowedEncoder) -> WindowedEncoder:
        """The same encoder, which reads the beginning of what is too long, as diffusers' scripts do."""
        whole, room = encoder.tokenize, self.caption_windows * encoder.window.capacity

        def tokenize(text: str) -> list[int]:
            ids = whole(text)
            if len(ids) > room:
                self._long[text] = None
            return ids[:room]

        return replace(encoder, tokenize=tokenize)

    def _encode(self, captions: Sequence[str]) -> Condition:
        return self.text.encode(captions, length=self.length)[0]

    def _states(self, captions: Sequence[str]) -> Condition:
        keys = [self._key(each) for each in captions] if self.cache else []
        if self.cache is None or not all(key in self.cache for key in keys):
            return self._encode(captions)
        entries = [self.cache.read(key) for key in keys]
        # In float32 at once: autocast to bfloat16 refuses to join what is stored in float16.
        parts = {name: torch.stack([each[name].float() for each in entries]) for name in entries[0]}
        return Condition.of(parts)

    @cached_property
    def _made_from(self) -> str:
        return " ".join(fingerprint(module.state_dict()) for module in self.text.modules.values())

    def _key(self, caption: str) -> str:
        """By the tokens, not the caption: how a text is cleaned and split may change, in a new version too."""
        tokens = [each.tokenize(caption) for each in parts_of(self.text)]
        return hashlib.sha256(f"{self._made_from} {self.caption_windows} {tokens}".encode()).hexdigest()[:24]
