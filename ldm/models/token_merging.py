"""Token merging for Stable Diffusion (Bolya & Hoffman 2023, arXiv:2303.17604): an approximation that saves attention.

At the finest resolution that a U-Net attends at, the self-attention sees fewer tokens: those that are most like another
one are merged with it before, and get its output after. The destinations of merging are one token in each 2x2 window
(sec. 4.1 there). In the paper they are drawn at random at every step; here they are one pattern for all steps and
pictures, pseudo-random and fixed, so that a picture depends on its own settings alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork
from ldm.models.layers import SpatialTransformer, TransformerBlock
from ldm.models.unet import UNet

MOST = 0.75  # of the tokens: the destinations, one in each 2x2 window, stay
_WINDOW = 2  # tokens along a side


@dataclass(frozen=True)
class Merging:
    """Which of N tokens of B rows are merged with which, by bipartite soft matching.

    kept: (B, K), places of the tokens that stay as they are. merged: (B, M), of those that are merged. into: (B, M),
    the number of the destination of each. destinations: (D,), their places, the same for all rows. K + M + D = N.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor
    destinations: Tensor

    @classmethod
    def of(cls, x: Tensor, size: tuple[int, int], ratio: float) -> "Merging":
        """Find the `ratio` of the tokens (B, N, C) that are most like a destination, by cosine similarity.

        size: (h, w), h * w = N. As many tokens as are no destination are merged at the most.
        """
        destinations, sources = (each.to(x.device) for each in _pattern(*size))
        unit = F.normalize(x, dim=-1)
        likeness = unit[:, sources] @ unit[:, destinations].transpose(1, 2)  # (B, N - D, D)
        best, into = likeness.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        merged, kept = order.tensor_split([min(int(ratio * x.shape[1]), len(sources))], dim=1)
        return cls(sources[kept], sources[merged], into.gather(1, merged), destinations)

    def merge(self, x: Tensor) -> Tensor:
        """Merge tokens (B, N, C) to (B, K + D, C): a destination becomes the mean of itself and what is merged in."""
        into = _wide(self.into, x)
        found = x[:, self.destinations].scatter_reduce(1, into, x.gather(1, _wide(self.merged, x)), "mean")
        return torch.cat([x.gather(1, _wide(self.kept, x)), found], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """Give each of the N tokens its own, or its destination's, of (B, K + D, C)."""
        kept, found = x.tensor_split([self.kept.shape[1]], dim=1)
        whole = x.new_empty(len(x), x.shape[1] + self.merged.shape[1], x.shape[2])
        whole[:, self.destinations] = found
        whole.scatter_(1, _wide(self.kept, x), kept)
        return whole.scatter_(1, _wide(self.merged, x), found.gather(1, _wide(self.into, x)))


def _wide(places: Tensor, x: Tensor) -> Tensor:
    """Places (B, M) for all channels of `x` (B, N, C)."""
    return places[..., None].expand(-1, -1, x.shape[-1])


@cache
def _pattern(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The places of the destinations, one in each whole window, and of all other tokens, both in order."""
    rows, columns = height // _WINDOW, width // _WINDOW
    drawn = torch.randint(_WINDOW**2, (rows, columns), generator=torch.Generator().manual_seed(0))
    y = torch.arange(rows)[:, None] * _WINDOW + drawn // _WINDOW
    x = torch.arange(columns) * _WINDOW + drawn % _WINDOW
    is_destination = torch.zeros(height * width, dtype=torch.bool)
    is_destination[(y * width + x).flatten()] = True
    return is_destination.nonzero()[:, 0], (~is_destination).nonzero()[:, 0]


@contextmanager
def merged_tokens(network: nn.Module, ratio: float) -> Iterator[None]:
    """Merge so much of the tokens in the finest self-attentions of a network, within the context; 0 changes nothing."""
    with ExitStack() as stack:
        for each in finest(network) if ratio else ():
            _attach(each, ratio, stack)
        yield


def _attach(transformer: SpatialTransformer, ratio: float, stack: ExitStack) -> None:
    """Have hooks merge what a transformer's self-attentions see, and unmerge what they say, while `stack` is open."""
    size: list[tuple[int, int]] = []
    now: list[Merging] = []

    def sized(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        size[:] = [inputs[0].shape[-2:]]

    def merge(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if min(size[0]) < _WINDOW:  # no window, and none to merge with
            return inputs
        now[:] = [Merging.of(inputs[0], size[0], ratio)]
        return (now[0].merge(inputs[0]),)

    def unmerge(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return now.pop().unmerge(output) if now else output

    handles = [transformer.register_forward_pre_hook(sized)]
    for block in transformer.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        handles += [block.attn1.register_forward_pre_hook(merge), block.attn1.register_forward_hook(unmerge)]
    for handle in handles:
        stack.callback(handle.remove)


def finest(network: nn.Module) -> list[SpatialTransformer]:
    """Return the transformers of a U-Net's finest level that has any; none of other networks."""
    if not isinstance(network, UNet):
        return []
    for level in zip(network.down_blocks, reversed(network.up_blocks), strict=True):
        found = [each for block in level for each in block.modules() if isinstance(each, SpatialTransformer)]
        if found:
            return found
    return []


def check(network: DenoisingNetwork) -> None:
    """Raise UserError for a network without self-attention whose tokens could be merged."""
    if not finest(network):
        raise UserError(
            f"token_merging is for U-Nets with attention, and this model's network, a {type(network).__name__}, is "
            "none: leave it out"
        )
