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
    shift = a.mean(0) - b.mean(0)
    a, b = (a - a.mean(0)) / (len(a) - 1) ** 0.5, (b - b.mean(0)) / (len(b) - 1) ** 0.5
    return _distance(shift, a, b)


def gaussian_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Return the same of two Gaussians by their moments: means (D,) and covariances (D, D), in float64."""
    shift = mean_1.double() - mean_2.double()
    return _distance(shift, _root(covariance_1.double()), _root(covariance_2.double()))


def _distance(shift: Tensor, a: Tensor, b: Tensor) -> float:
    """The distance of Gaussians whose covariances are C1 = a'a and C2 = b'b, of a (R, D) and b (S, D)."""
    # The eigenvalues of C1 C2 are the squared singular values of a b'.
    root = torch.linalg.svdvals(a @ b.T).sum()
    return float((shift.square().sum() + a.square().sum() + b.square().sum() - 2 * root).clamp_min(0))


def _root(covariance: Tensor) -> Tensor:
    """A matrix a (R, D) with a'a = covariance, of as many rows as its rank."""
    values, vectors = torch.linalg.eigh(covariance)
    # Eigenvalues that are 0 but for rounding have square roots that are not small: left in, they would add up.
    real = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return (vectors[:, real] * values[real].sqrt()).T
