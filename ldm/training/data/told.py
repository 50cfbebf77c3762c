"""What a network without text is told of a picture: a section of a config whose `kind` says which class it is.

In training a share of the pictures is told nothing, so that the model can be guided (Ho & Salimans 2022).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.errors import UserError
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import Batch, Examples


@dataclass(frozen=True)
class Nothing:
    """The network learns pictures by themselves."""

    kind: ClassVar[str] = "nothing"

    @property
    def left_out(self) -> float:
        """The share of pictures of which the network is told nothing."""
        return 0.0

    def check(self, where: str, examples: Examples) -> None:
        """Raise UserError for data that it does not go with."""

    def sized(self, config: Any, examples: Examples) -> Any:
        """Return a network's settings, changed to take what it is told."""
        return config

    def condition(self, batch: Batch, dropped: Tensor, examples: Examples) -> Condition:
        """Return what the network is told of a batch. dropped: (B,), of which pictures it is told nothing."""
        return Condition()

    def names(self, examples: Examples) -> list[str]:
        """Return the classes' names, for a model that knows classes."""
        return []


@dataclass(frozen=True)
class Labels(Nothing):
    """The network is told each picture's class, but for a share of `dropout`, which has the class of no class."""

    kind: ClassVar[str] = "labels"

    dropout: float = 0.1

    @property
    def left_out(self) -> float:
        return self.dropout

    def check(self, where: str, examples: Examples) -> None:
        refuse_outside(where, self, ("dropout",), 0, 1)
        if not examples.labels:
            raise UserError(
                f"{where}: these data have no classes: name their column in data.label_column, or take kind: nothing"
            )

    def sized(self, config: Any, examples: Examples) -> Any:
        return replace(config, num_class_embeds=len(examples.labels) + bool(self.dropout))

    def condition(self, batch: Batch, dropped: Tensor, examples: Examples) -> Condition:
        assert batch.labels is not None
        null = torch.full_like(batch.labels, len(examples.labels))
        return Condition(labels=torch.where(dropped.to(null.device), null, batch.labels))

    def names(self, examples: Examples) -> list[str]:
        return examples.labels
