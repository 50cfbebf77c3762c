"""The processes that share a batch: each one's part, and the random numbers of its rows."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> "PartialState":
    """The processes that train together. Accelerate chooses the device; the CPU where asked for, or nothing else is."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked = parse_flag_from_env("ACCELERATE_USE_CPU")  # accelerate launch --cpu
    return PartialState(cpu=asked or not torch.accelerator.is_available())


def rows_of(size: int, process: int, processes: int) -> slice:
    """The rows of a batch of `size` that one of several processes takes. Raises UserError if it doesn't divide."""
    if size % processes:
        raise UserError(
            f"a batch of {size} pictures can't be shared by {processes} processes: make loop.batch_size a "
            f"multiple of {processes}"
        )
    share = size // processes
    return slice(process * share, (process + 1) * share)


class Draws:
    """Random numbers for `rows` of a batch of `size` pictures, a function of (seed, size) and the order of calls.

    They are drawn for the whole batch and then cut, so that a picture has the same noise however many processes
    share its batch. On the CPU, whatever the accelerator.
    """

    def __init__(self, seed: int, size: int, rows: slice):
        self.generator = torch.Generator().manual_seed(seed)
        self.size, self.rows = size, rows

    def uniform(self) -> Tensor:
        """A number in [0, 1) each: (rows,)."""
        return torch.rand(self.size, generator=self.generator)[self.rows]

    def normal(self, *shape: int) -> Tensor:
        """Unit noise of a shape each: (rows, *shape)."""
        return torch.randn(self.size, *shape, generator=self.generator)[self.rows]

    def integers(self, high: int) -> Tensor:
        """A whole number in [0, high) each: (rows,)."""
        return torch.randint(high, (self.size,), generator=self.generator)[self.rows]
