"""What the training loop asks of an objective: all that one file in `ldm/training/objectives` has to give."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.training.distributed import BatchGenerator


class Objective(Protocol):
    """An aim of training: what is trained, on what, towards what.

    The parameters of `model` that require a gradient are trained.
    """

    model: nn.Module
    watched: str  # the figure, positive, by whose rise a run that diverges is told: "loss", or a part of it

    def helpers(self) -> Mapping[str, nn.Module]:
        """Return the frozen networks that training keeps in memory, by name; parts of `model` may be among them."""
        ...

    def prepare(self, device: torch.device, batch_size: int) -> None:
        """Move the frozen networks that help to where the training runs, and do what takes long, such as caches.

        Called once, before the model is wrapped; batch_size: that of every later call of `batch`.
        """
        ...

    def batch(self, start: int, size: int, rows: slice) -> Any:
        """Return the `rows` of pictures `start` .. `start + size` of the endless, deterministic data order."""
        ...

    def loss(self, model: nn.Module, batch: Any, rng: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss, a mean over the batch's rows, and named scalars for the log. Calls `model` once."""
        ...

    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Return figures, and write pictures into `folder`, of the averaged weights. In the main process alone."""
        ...

    def export(self, model: nn.Module, folder: Path, config: str) -> None:
        """Write the finished network as others read it. In the main process alone.

        config: the run's whole configuration as text, to go along where there is a place for it.
        """
        ...

    def notes(self) -> list[str]:
        """Return what the user should be told, such as pictures that were skipped.

        Asked for after `prepare` and at the end; each is told once.
        """
        ...
