"""A network's arguments as tensors alone, and back: what is traced takes nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.condition import Condition
from ldm.models.denoising import Residuals

_SIDE = 32  # of an example: a size that networks of five levels still halve


@dataclass(frozen=True)
class Form:
    """What the arguments are: equal forms are calls of one graph, whatever their sizes.

    kinds: of each argument "tensor", "none", ("condition", names of parts) or ("residuals", how many). tensors: the
    rank and dtype of each tensor in turn.
    """

    kinds: tuple[Any, ...]
    tensors: tuple[tuple[int, str], ...]

    def arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Return the arguments that `taken_apart` took apart."""
        left, found = iter(tensors), list[Any]()
        for kind in self.kinds:
            if kind == "tensor":
                found.append(next(left))
            elif kind == "none":
                found.append(None)
            elif kind[0] == "condition":
                found.append(Condition.of({name: next(left) for name in kind[1]}))
            else:
                maps = [next(left) for _ in range(kind[1])]
                found.append(Residuals(tuple(maps[:-1]), maps[-1]))
        return found


def taken_apart(arguments: Sequence[Any]) -> tuple[Form, list[Tensor]] | None:
    """Return the form and the tensors of a network's arguments; None where some are of no kind that is known."""
    kinds, tensors = list[Any](), list[Tensor]()
    for each in arguments:
        if isinstance(each, Tensor):
            kinds.append("tensor")
            tensors.append(each)
        elif each is None:
            kinds.append("none")
        elif isinstance(each, Condition):
            parts = each.parts()
            kinds.append(("condition", tuple(parts)))
            tensors += parts.values()
        elif isinstance(each, Residuals):
            kinds.append(("residuals", len(each.down) + 1))
            tensors += [*each.down, each.mid]
        else:
            return None
    return Form(tuple(kinds), tuple((each.ndim, str(each.dtype)) for each in tensors)), tensors


def example(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors like these of two rows, and where all maps are of one size of a small one: quickly computed."""
    sizes = {each.shape[2:] for each in tensors if each.ndim == 4}
    sides = min(sizes.pop()) if len(sizes) == 1 else 0
    cut = sides >= _SIDE
    found = list[Tensor]()
    for each in tensors:
        each = each[[0, -1]].contiguous()
        found.append(each[:, :, :_SIDE, :_SIDE].contiguous() if cut and each.ndim == 4 else each)
    return found
