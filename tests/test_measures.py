"""Measures of picture sets: closed forms, torch-fidelity's arithmetic, statistics in files, and the command.

What torch-fidelity gives was recorded once, in an environment of its own (it needs torchvision): version 0.4.0 with
torch 2.13.0, its functions `fid_features_to_statistics` and `fid_statistics_to_metric`, `isc_features_to_metric`,
`kid_features_to_metric` and `prc_features_to_metric` on the features below, its module `FeatureExtractorInceptionV3`
with the weights of `formula_weights`. Features, weights and pictures come from whole numbers (`numbers`), so they are
the same everywhere.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.frechet import frechet_distance, gaussian_distance
from ldm.evaluation.inception_score import inception_score
from ldm.evaluation.kernel_distance import kernel_distance, squared_discrepancy
from ldm.evaluation.precision_recall import precision_recall
from ldm.models.inception import InceptionV3, resize_like_tensorflow


def numbers(*shape: int, key: int) -> Tensor:
    """Numbers in [0, 1) that look random, float64, of products and shifts of whole numbers."""
    x = (torch.arange(math.prod(shape)) * 2654435761 + key * 40503 + 12345) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 2246822519) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 3266489917) & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() / 2**32).reshape(shape)


REAL = numbers(200, 16, key=1)
OTHER = 0.9 * numbers(150, 16, key=2) + 0.1
LOGITS = 4 * numbers(130, 12, key=3)


# --- torch-fidelity's arithmetic ------------------------------------------------------------------------------


def test_the_frechet_distance_is_torch_fidelitys():
    expected = pytest.approx(0.11946235867077348, abs=1e-9)
    assert frechet_distance(REAL, OTHER) == expected
    moments = [(each.mean(0), torch.cov(each.T)) for each in (REAL, OTHER)]
    assert gaussian_distance(*moments[0], *moments[1]) == expected


@pytest.mark.parametrize(
    ("splits", "mean", "deviation"),
    [(10, 1.4801400314877398, 0.055922454381835365), (3, 1.5083688367527295, 0.020612414877009325)],
)
def test_the_inception_score_is_torch_fidelitys(splits: int, mean: float, deviation: float):
    assert inception_score(LOGITS, splits) == pytest.approx((mean, deviation), abs=1e-9)


def test_the_kernel_distance_is_torch_fidelitys():
    found = kernel_distance(REAL, OTHER, subsets=20, size=50)
    assert found == pytest.approx((0.01173089805892109, 0.009658191793534035), abs=1e-9)


@pytest.mark.parametrize(
    ("neighbours", "precision", "recall"), [(3, 144 / 150, 145 / 200), (5, 148 / 150, 171 / 200)]
)
def test_precision_and_recall_are_torch_fidelitys(neighbours: int, precision: float, recall: float):
    """It gives 0.9599999785423279 and 0.7250000238418579, 0.9866666793823242 and 0.8550000190734863: in float32."""
    assert precision_recall(REAL, OTHER, neighbours) == pytest.approx((precision, recall), abs=1e-12)


# --- closed forms ---------------------------------------------------------------------------------------------


def test_the_distance_of_gaussians_has_a_closed_form():
    """Of covariances that commute it is |m1 - m2|^2 + the sum of (s1 - s2)^2 over standard deviations."""
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    one, other = torch.rand(6).double() + 0.1, torch.rand(6).double() * 3
    mean = torch.randn(6).double()
    found = gaussian_distance(mean, turn * one**2 @ turn.T, -mean, turn * other**2 @ turn.T)
    expected = float((2 * mean).square().sum() + (one - other).square().sum())
    assert found == pytest.approx(expected, rel=1e-10)
    # Of one dimension beside many that never differ: a covariance without full rank.
    flat = torch.zeros(50, 50).double()
    flat[0, 0] = 4
    assert gaussian_distance(torch.zeros(50), flat, torch.ones(50), flat / 4) == pytest.approx(
        50 + 1, rel=1e-12
    )


def test_a_set_of_fewer_pictures_than_features_gives_the_same_by_its_moments():
    few, other = torch.randn(7, 40).double(), torch.randn(9, 40).double() + 1
    moments = [(each.mean(0), torch.cov(each.T)) for each in (few, other)]
    assert gaussian_distance(*moments[0], *moments[1]) == pytest.approx(
        frechet_distance(few, other), rel=1e-9
    )
    assert gaussian_distance(*moments[0], *moments[0]) == pytest.approx(0, abs=1e-9)


def test_the_inception_score_of_sure_and_of_unsure_predictions():
    assert inception_score(torch.zeros(40, 8), 4) == pytest.approx((1, 0), abs=1e-12)
    one_hot = 1e4 * F.one_hot(torch.arange(64) % 8, 8).double()
    assert inception_score(one_hot, 1) == pytest.approx((8, 0), rel=1e-12)  # all classes, each surely
    assert inception_score(one_hot[::8], 2) == pytest.approx((1, 0), abs=1e-12)  # one class only
    with pytest.raises(UserError, match="3 pictures can't be 10 parts"):
        inception_score(torch.zeros(3, 8))


def test_the_kernel_distance_is_the_mean_over_pairs():
    x, y = torch.randn(5, 3).double(), torch.randn(4, 3).double() + 0.5

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum((float(a[i] @ b[j]) / 3 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert squared_discrepancy(x, y) == pytest.approx(expected, rel=1e-12)


def test_the_kernel_distance_has_no_bias():
    """Of 400 pairs of sets of one distribution: their mean is 0 within four standard errors, and half lie below 0."""
    found = np.array([squared_discrepancy(torch.randn(20, 4), torch.randn(30, 4)) for _ in range(400)])
    assert abs(found.mean()) < 4 * found.std() / 20
    assert 0.3 < (found < 0).mean() < 0.9
    x = torch.randn(2000, 4).double()
    y = torch.randn(2000, 4).double() + 1
    assert squared_discrepancy(x, y) > 10 * found.std()


def test_precision_and_recall_of_equal_and_of_far_sets():
    x = torch.randn(100, 32)
    assert precision_recall(x, x) == precision_recall(x, x[torch.randperm(100)]) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    assert precision_recall(x[:50], torch.cat([x[:50], x[:50] + 1000])) == (0.5, 1)
    assert precision_recall(torch.cat([x, x + 1000]), x) == (1, 0.5)
    copies = 1e3 + x[:4].repeat(8, 1)  # of a picture to which the third nearest are copies
    assert precision_recall(copies, copies[:16]) == (1, 1)
    with pytest.raises(UserError, match="4 pictures, not 3"):
        precision_recall(x[:3], x)


def test_precision_and_recall_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch):
    """Equation 1 of Kynkäänniemi et al., pair by pair; and the same where few distances fit into memory at once."""
    real, other = torch.randn(60, 3).double(), 1.5 * torch.randn(40, 3).double()

    def share(of: Tensor, among: Tensor) -> float:
        reach = [sorted(float((a - b).norm()) for b in among)[3] for a in among]
        return sum(
            any(float((x - a).norm()) <= r for a, r in zip(among, reach, strict=True)) for x in of
        ) / len(of)

    expected = share(other, real), share(real, other)
    assert 0 < expected[0] < expected[1] <= 1
    assert precision_recall(real, other) == pytest.approx(expected)
    monkeypatch.setattr("ldm.evaluation.precision_recall._AT_ONCE", 130)
    assert precision_recall(real, other) == pytest.approx(expected)


# --- the Inception network ------------------------------------------------------------------------------------


def formula_weights() -> dict[str, Tensor]:
    """Weights for the Inception network, by the order and the names that torch-fidelity's module has them in."""
    names = [name for name in InceptionV3().state_dict()]
    made: dict[str, Tensor] = {}
    shapes = {name: each.shape for name, each in InceptionV3().state_dict().items()}
    return made | shapes | {name: None for name in names}
