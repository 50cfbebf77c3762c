"""How weights act on hidden states, by each program's formula. z: the states of a window, (S, D); w: a weight a token.

AUTOMATIC1111: z * w, and then ("original") times mean(z) / mean(z * w), over the whole window.
ComfyUI: e + (z - e) * w, where e are the states of an empty window at the same places.
compel: ComfyUI's formula, and for each piece of a weight under 1 as well the same of the window in which the encoder
does not see that piece; these have the share tan((1 - w) * pi / 2) to 1 in their mean. So w = 0.5 lies halfway to
the text without the piece, and w = 0 is that text.

Tokens of weight 1 keep their states but for the mean's factor. Special tokens and padding have weight 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning.prompts.chunks import Chunk
from ldm.conditioning.prompts.weighted import WeightedText, named
from ldm.errors import UserError

_LEAST = 1e-5  # compel's least weight of a piece: at 0 its share would be infinite


class Weights:
    """The weights of chunks, a window each, and what else an encoder has to run for their sake.

    start: places before the first token of a text in a window.
    """

    def __init__(self, chunks: Sequence[Chunk], start: int):
        self._chunks, self._start = chunks, start
        # Of each piece to hide its chunk, and the places in the window.
        self.hidden: list[tuple[int, frozenset[int]]] = []
        self._shares: dict[int, list[tuple[int, float]]] = {}
        for place, chunk in enumerate(chunks):
            if _syntax(chunk) == "compel":
                light = {p: w for p, w in zip(chunk.pieces, chunk.weights, strict=True) if w < 1}
                for piece, weight in light.items():
                    share = math.tan((1 - max(weight, _LEAST)) * math.pi / 2)
                    self._shares.setdefault(place, []).append((len(self.hidden), share))
                    tokens = (start + k for k, each in enumerate(chunk.pieces) if each == piece)
                    self.hidden.append((place, frozenset(tokens)))

    @property
    def wants_empty(self) -> bool:
        """Whether the states of an empty window are needed."""
        return any(chunk.weighted and _syntax(chunk) in ("comfyui", "compel") for chunk in self._chunks)

    def apply(self, states: Tensor, empty: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the states (N, S, D) of the chunks under their weights.

        empty: (S, D), where wanted. hidden: (M, S, D), of the windows of `self.hidden`. Raises UserError where the
        result is not finite.
        """
        if not any(chunk.weighted for chunk in self._chunks):
            return states
        rows = list(states)
        for place, chunk in enumerate(self._chunks):
            if chunk.weighted:
                others = [(hidden[k], share) for k, share in self._shares.get(place, [])]
                rows[place] = self._row(chunk, states[place], empty, others)
        return torch.stack(rows)

    def _row(
        self, chunk: Chunk, states: Tensor, empty: Tensor | None, others: Sequence[tuple[Tensor, float]]
    ) -> Tensor:
        z, w = states.float(), torch.ones(len(states), 1, device=states.device)
        w[self._start : self._start + len(chunk.weights), 0] = torch.tensor(chunk.weights, device=w.device)
        assert isinstance(chunk.source, WeightedText)
        if empty is None or _syntax(chunk) == "a1111":
            found = z * w
            if chunk.source.emphasis == "original":
                found = found * (z.mean() / found.mean())
        else:
            from_empty = [(_towards(z, w, empty.float()), 1.0)]
            from_empty += [(_towards(other.float(), w, empty.float()), share) for other, share in others]
            total = sum(share for _, share in from_empty)
            found = torch.stack([each * (share / total) for each, share in from_empty]).sum(0)
        found = found.to(states.dtype)
        if not found.isfinite().all():
            raise UserError(
                f"{named(chunk.source.text)}: its weights leave no finite numbers in {states.dtype}: give smaller ones"
            )
        return found


def _towards(z: Tensor, w: Tensor, empty: Tensor) -> Tensor:
    return torch.where(w == 1, z, empty + (z - empty) * w)


def _syntax(chunk: Chunk) -> str:
    return chunk.source.syntax if isinstance(chunk.source, WeightedText) else "plain"
