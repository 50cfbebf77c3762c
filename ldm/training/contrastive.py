"""The loss of CLIP (Radford et al. 2021, fig. 3), and how well pictures and captions find each other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Return the symmetric InfoNCE of each pair: (B,), the mean of picture to text and text to picture, in nats.

    logits: (B, B), of each picture (a row) with each text (a column); the pairs are the diagonal. same: (B, B), which
    pairs have equal captions: off the diagonal these are no negatives, and are left out of the sums.
    """
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.float().masked_fill(same.to(logits.device) & ~own, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    forth, back = (F.cross_entropy(each, target, reduction="none") for each in (logits, logits.T))
    return (forth + back) / 2


def equal_captions(captions: Sequence[str]) -> Tensor:
    """Return which of B captions are equal: (B, B) of bool."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    each = torch.tensor([numbers[caption] for caption in captions])
    return each[:, None] == each[None]


def retrieved(logits: Tensor, same: Tensor) -> Tensor:
    """Return of each picture whether its best text, by the logits (B, B), is its own, or equal to it: (B,) of bool."""
    best = logits.argmax(1, keepdim=True)
    return same.to(logits.device).gather(1, best)[:, 0]
