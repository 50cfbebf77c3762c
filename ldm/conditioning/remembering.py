"""Texts that are asked for again, embedded once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import nn

from ldm.condition import Condition
from ldm.conditioning.prompts.weighted import Text
from ldm.conditioning.text import TextEncoder

_KEPT = 64  # embeddings; one of SDXL takes 0.6 MB


class Remembering:
    """A TextEncoder that gives what another one gives, and keeps the last embeddings.

    state: what else an embedding depends on, such as the weights of LoRAs; asked at every call. Whatever else changes
    the encoder needs a new one of these.
    """

    def __init__(self, encoder: TextEncoder, state: Callable[[], Hashable] = lambda: None):
        self._encoder, self._state = encoder, state
        self._kept: OrderedDict[Hashable, tuple[Condition, list[str]]] = OrderedDict()

    @property
    def zeros_without_negative(self) -> bool:
        return self._encoder.zeros_without_negative

    @property
    def modules(self) -> dict[str, nn.Module]:
        return self._encoder.modules

    @property
    def tokenizers(self) -> dict[str, Any]:
        return self._encoder.tokenizers

    def length(self, prompts: Sequence[Text]) -> int:
        return self._encoder.length(prompts)

    def encode(
        self, prompts: Sequence[Text], *, clip_skip: int = 0, length: int = 0
    ) -> tuple[Condition, list[str]]:
        key = (self._state(), tuple(prompts), clip_skip, length)
        if key not in self._kept:
            self._kept[key] = self._encoder.encode(prompts, clip_skip=clip_skip, length=length)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        condition, notes = self._kept[key]
        return condition, list(notes)
