"""The Fréchet distance between two sets of features, each taken for a Gaussian (Dowson & Landau 1982).

Heusel et al. (2017) call it FID when the features are those of Inception-v3; over other features it has no such name,
and its values can't be compared with published ones.
"""

import torch
from torch import Tensor

from ldm.errors import UserError


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Return the distance of features (N, D) and (M, D): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64.

    With fewer pictures than features it is biased upward: compare only sets of the same size. Raises UserError for
    fewer than two pictures.
    """
    if min(len(one), len(other)) < 2:
        raise UserError("a Fréchet distance needs two pictures or more on either side")
    a, b = one.double(), other.double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = (a - a.mean(0)) / (len(a) - 1) ** 0.5, (b - b.mean(0)) / (len(b) - 1) ** 0.5
    # With C1 = a'a and C2 = b'b, the eigenvalues of C1 C2 are the squared singular values of a b'.
    root = torch.linalg.svdvals(a @ b.T).sum()
    return float((shift + a.square().sum() + b.square().sum() - 2 * root).clamp_min(0))
