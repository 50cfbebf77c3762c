"""Consistency models in formulas: the papers' schedules, weights and metrics recomputed."""

import math

import pytest
import torch

from ldm.diffusion import consistency
from ldm.diffusion.consistency import Doubling, Fixed, Growing
from ldm.errors import UserError

PICTURES = 400_000


def test_growing_levels_are_those_of_the_first_paper():
    """From N(0) = ceil(s0 - 1) + 1 = s0 to N(K) = ceil(s1 + 1 - 1) + 1 = s1 + 1 (app. C); mu0 at the first."""
    each = Growing(PICTURES, start=2, end=150, decay=0.9)
    counts = [each.count(seen) for seen in range(0, PICTURES + 1, 1000)]
    assert counts[0] == 2 and counts[-1] == 151 and counts == sorted(counts)
    assert each.count(2 * PICTURES) == 151  # a run that goes on
    # Half of the way: sqrt((151^2 - 4) / 2 + 4) = 106.78
    assert each.count(PICTURES // 2) == 107
    assert each.target_decay(0) == pytest.approx(0.9)
    assert each.target_decay(PICTURES) == pytest.approx(0.9 ** (2 / 151))
    assert Growing(PICTURES, decay=0.0).target_decay(5) == 0


def test_doubling_levels_are_those_of_the_second_paper():
    """10, 20, ... 1280 steps, an eighth of the training each (table 1: s0 = 10, s1 = 1280)."""
    each = Doubling(PICTURES)
    stage = PICTURES // 8
    for number in range(8):
        for seen in (number * stage, (number + 1) * stage - 1):
            assert each.count(seen) == 10 * 2**number + 1
    assert each.count(PICTURES) == 1281 and each.target_decay(3) == 0
    # An end that is no power of two times the start: floor(log2(floor(150 / 20)) + 1 = 3.8 stages.
    odd = Doubling(PICTURES, 20, 150)
    stage = math.floor(PICTURES / (math.log2(7) + 1))
    assert [odd.count(k * stage) for k in range(4)] == [21, 41, 81, 151]


def test_fixed_levels_stay():
    each = Fixed(18, 0.95)
    assert each.count(0) == each.count(PICTURES) == 18
    assert each.target_decay(7) == 0.95


@pytest.mark.parametrize(
    ("each", "said"),
    [
        (Fixed(1), "levels"),
        (Fixed(18, 1.0), "decay"),
        (Growing(9, 5, 4), "start"),
        (Doubling(9, 0, 4), "start"),
    ],
)
def test_curricula_that_can_not_be_get_a_line(each: Fixed | Growing | Doubling, said: str):
    with pytest.raises(UserError, match=said):
        each.check("method.levels")


def test_steps_are_drawn_as_a_normal_logarithm_falls_between_the_levels():
    sigmas = consistency.levels(11)
    weights = consistency.lognormal_weights(sigmas)
    normal = torch.distributions.Normal(torch.tensor(-1.1).double(), torch.tensor(2.0).double())
    mass = normal.cdf(sigmas.log()).diff()
    torch.testing.assert_close(weights, mass / mass.sum())
    # Every share goes to the step whose part of [0, 1) it lies in.
    share = (torch.arange(100_000) + 0.5) / 100_000
    steps = consistency.chosen(share, weights)
    assert steps.min() == 0 and steps.max() == 9
    counted = torch.bincount(steps, minlength=10) / len(share)
    assert (counted - weights).abs().max() < 2e-5  # of a grid of 1e-5, an edge on both sides
    uniform = consistency.chosen(torch.tensor([0.0, 0.24, 0.26, 0.999]), torch.full((4,), 0.25))
    assert uniform.tolist() == [0, 0, 1, 3]


def test_steps_weigh_as_they_are_short():
    sigmas = consistency.levels(5)
    weights = consistency.step_weight(sigmas[:-1], sigmas[1:])
    assert torch.allclose(weights * sigmas.diff(), torch.ones_like(weights)) and (weights.diff() < 0).all()


def test_metrics():
    x, y = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    square = (x - y).flatten(1).norm(dim=1) ** 2
    torch.testing.assert_close(consistency.squared_l2(x, y), square)
    c = 0.00054 * math.sqrt(48)
    torch.testing.assert_close(consistency.pseudo_huber(x, y), (square + c**2).sqrt() - c)
    assert consistency.huber_constant(3072) == pytest.approx(0.03, rel=0.01)  # the paper's, of CIFAR-10
    # Near 0 it is |x - y|^2 / 2c, which the formula with a minus would round away in float32.
    near = consistency.pseudo_huber(x, x + 1e-6)
    torch.testing.assert_close(near, torch.full((6,), 48e-12 / (2 * c)), rtol=0.3, atol=0)


def test_one_noise_at_both_levels():
    x0, noise = torch.randn(3, 2, 1, 1), torch.randn(3, 2, 1, 1)
    low, high = torch.tensor([0.1, 1.0, 5.0]), torch.tensor([0.2, 2.0, 9.0])
    below, above = consistency.noised_pair(x0, noise, low, high)
    torch.testing.assert_close((above - below) / (high - low).view(-1, 1, 1, 1), noise)
    torch.testing.assert_close(below - low.view(-1, 1, 1, 1) * noise, x0)
