"""The kernel distance of two sets of features (Bińkowski et al. 2018): KID when they are those of Inception-v3."""

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.inception_score import SEED

SUBSET = 1000  # pictures of a subset, as published figures have them


def kernel_distance(
    real: Tensor, other: Tensor, subsets: int = 100, size: int = SUBSET, seed: int = SEED
) -> tuple[float, float]:
    """Return the squared maximum mean discrepancy of features (N, D) and (M, D): mean and deviation over subsets.

    The estimator is unbiased (eq. 4 of Bińkowski et al.): for sets of one distribution it is 0 on average, and so below
    0 half of the time. Each subset has `size` pictures of either set; the deviation is between subsets, which share
    pictures, and no standard error. Raises UserError for sets of fewer pictures, or fewer than two.
    """
    few = min(len(real), len(other))
    if not 2 <= size <= few:
        raise UserError(
            f"a kernel distance over subsets of {size} needs as many pictures, two or more, not {few}"
        )
    rng = np.random.RandomState(seed)  # its numbers never change, NumPy promises
    found: list[float] = []
    for _ in range(subsets):
        # In torch-fidelity's order, with what was made first.
        y = other[torch.from_numpy(rng.choice(len(other), size, replace=False))].double()
        x = real[torch.from_numpy(rng.choice(len(real), size, replace=False))].double()
        found.append(squared_discrepancy(x, y))
    return float(np.mean(found)), float(np.std(found))


def squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate of MMD^2 of x (N, D) and y (M, D) by the kernel (x'y / D + 1)^3, in float64."""
    x, y = x.double(), y.double()
    within = [(_kernel(a, a).sum() - _kernel_of_itself(a).sum()) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(within[0] + within[1] - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_itself(x: Tensor) -> Tensor:
    """The kernel of each row with itself."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
