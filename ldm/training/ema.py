"""Exponential moving average of weights, with the half-life in pictures seen (Karras et al. 2022, sec. 5)."""

import copy

import torch
from torch import nn


class EMA:
    """Keeps `model`, a float32 copy that follows the trained one.

    half_life: in pictures; early on it is shortened to a tenth of what was seen, so that the random start is
    forgotten.
    """

    def __init__(self, model: nn.Module, half_life: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.half_life = half_life

    @torch.no_grad()
    def update(self, trained: nn.Module, batch_size: int, seen: int) -> None:
        """After a step on `batch_size` pictures, `seen` in all."""
        half_life = min(self.half_life, 0.1 * seen)
        weight = 1 - 0.5 ** (batch_size / max(half_life, 1e-8))
        for mine, theirs in zip(self.model.parameters(), trained.parameters(), strict=True):
            mine.lerp_(theirs, weight)
        for mine, theirs in zip(self.model.buffers(), trained.buffers(), strict=True):
            mine.copy_(theirs)
