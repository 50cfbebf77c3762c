"""SDXL's conditioning (Podell et al. 2023, sec. 2.1): two CLIP text encoders side by side.

Their penultimate hidden states are joined along the features; the pooled vector is the second's.
The refiner has the second alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm.condition import Condition
from ldm.conditioning.prompts.weighted import Text
from ldm.conditioning.text import TextEncoder, WindowedEncoder
from ldm.errors import UserError


@dataclass
class JoinedEncoder:
    """Encoders whose hidden states are joined along the features; pooled is the last one's.

    zeros_without_negative: `force_zeros_for_empty_prompt` of the folder's model_index.json.
    """

    parts: list[WindowedEncoder]
    zeros_without_negative: bool = True

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {part.name: part.module for part in self.parts}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {part.name: part.tokenizer for part in self.parts}

    def length(self, prompts: Sequence[Text]) -> int:
        return max(part.length(prompts) for part in self.parts)

    def encode(
        self, prompts: Sequence[Text], *, clip_skip: int = 0, length: int = 0
    ) -> tuple[Condition, list[str]]:
        length = max(length, self.length(prompts))
        done = [part.encode(prompts, clip_skip=clip_skip, length=length) for part in self.parts]
        hidden = torch.cat([embedding.text for embedding, _ in done], dim=-1)
        notes = dict.fromkeys(note for _, notes in done for note in notes)
        return Condition(hidden, done[-1][0].pooled), list(notes)


def join(parts: list[WindowedEncoder], zeros_without_negative: bool = True) -> JoinedEncoder:
    """Return SDXL's pair from its parts. Raises UserError where their windows differ."""
    if len({part.window.size for part in parts}) != 1:
        sizes = ", ".join(f"{part.name} {part.window.size}" for part in parts)
        raise UserError(f"the text encoders have windows of different sizes ({sizes}) and can't be joined")
    return JoinedEncoder(parts, zeros_without_negative)


def parts_of(encoder: TextEncoder) -> list[WindowedEncoder]:
    """Return the encoders that read windows of the prompt: one, or SDXL's pair."""
    if isinstance(encoder, JoinedEncoder):
        return encoder.parts
    return [encoder] if isinstance(encoder, WindowedEncoder) else []
