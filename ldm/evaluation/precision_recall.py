"""Precision and recall of a set of pictures against real ones (Kynkäänniemi et al. 2019)."""

import torch
from torch import Tensor

from ldm.errors import UserError

_AT_ONCE = 2**24  # distances that are held at once


def precision_recall(real: Tensor, other: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return the shares of `other` (M, D) that lie among `real` (N, D), and of `real` that lie among `other`.

    A point lies among a set where it is no farther from one of its points than that point's `neighbours`-th nearest in
    the set (eq. 1). Distances are taken in float64. Both shares depend on the number of pictures: compare sets of the
    same size. Raises UserError for too few pictures.
    """
    few = min(len(real), len(other))
    if not 1 <= neighbours < few:
        raise UserError(f"the {neighbours} nearest of each picture need {neighbours + 1} pictures, not {few}")
    centre = real.double().mean(0)
    real, other = real.double() - centre, other.double() - centre
    # Squared distances are sums of products, equal ones only up to their rounding: copies of a picture must count.
    largest = max(float(each.square().sum(1).max()) for each in (real, other))
    slack = 16 * torch.finfo(real.dtype).eps * largest
    reach_of_real, reach_of_other = (_reach(each, neighbours) + slack for each in (real, other))
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    rows = max(1, _AT_ONCE // len(real))
    for some, reach in zip(other.split(rows), reach_of_other.split(rows), strict=True):
        squares = _squares(some, real)
        precise += int((squares <= reach_of_real).any(1).sum())
        recalled |= (squares <= reach[:, None]).any(0)
    return precise / len(other), float(recalled.double().mean())


def _reach(x: Tensor, neighbours: int) -> Tensor:
    """The squared distance of each point to its nearest but so many; the nearest of all is the point itself."""
    parts = x.split(max(1, _AT_ONCE // len(x)))
    return torch.cat([_squares(some, x).kthvalue(neighbours + 1, dim=1).values for some in parts])


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """The squared distances (N, M) of all rows of x (N, D) to all of y (M, D)."""
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
