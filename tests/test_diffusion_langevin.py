"""Langevin dynamics against the papers' steps, and against data whose score is known."""

import math

import pytest
import torch

from ldm.diffusion import langevin
from ldm.diffusion.driver import sample
from ldm.diffusion.variance_exploding import Ladder
from ldm.errors import UserError
from tests.closed_forms import TWO, Mixture, assert_moments


def noise_like(x):
    return lambda: torch.randn_like(x)


def test_step_is_ncsns():
    """Song & Ermon 2019, algorithm 1, line by line: its network puts out the score."""
    ladder, epsilon = Ladder(0.01, 1.0, 10), 2e-5
    x = start = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    noises = [torch.randn_like(x) for _ in range(10 * 3)]
    levels = [10 ** (-2 * i / 9) for i in range(10)]  # sigma_1 = 1 to sigma_L = 0.01

    def score(x, sigma):
        return -torch.tanh(x) / sigma**2

    given = iter(noises)
    for level in levels:
        alpha = epsilon * level**2 / levels[-1] ** 2
        for _ in range(3):
            x = x + alpha / 2 * score(x, level) + math.sqrt(alpha) * next(given)

    given = iter(noises)
    steps = langevin.annealed_langevin(
        start,
        ladder.sigmas(),
        lambda: next(given),
        step=epsilon / (2 * ladder.sigma_min**2),
        steps_per_level=3,
        denoise=False,
    )
    ours = sample(lambda x, s: x + s[0] ** 2 * score(x, s[0]), steps)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_final_denoising_and_span():
    """x + sigma_L^2 score (Song & Ermon 2020, algorithm 1); a span goes on where another ended."""
    ladder = Ladder(0.1, 1.0, 4).sigmas()
    x = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    quiet = torch.zeros_like

    def run(x, **options):
        steps = langevin.annealed_langevin(x, ladder, lambda: quiet(x), steps_per_level=2, **options)
        return sample(TWO.denoise, steps)

    whole = run(x)
    torch.testing.assert_close(whole, TWO.denoise(run(x, denoise=False), torch.tensor([0.1])))
    rest = run(run(x, span=range(0, 2)), span=range(2, 4))
    torch.testing.assert_close(rest, whole)


def test_spread_of_a_level_is_proposition_3():
    """By the walk itself, whose last variance is exact for a linear denoiser (data in one point)."""
    for ratio, count, step in ((1.3, 5, 0.1), (1.05, 3, 0.02), (2.0, 10, 0.3)):
        sources = iter(torch.eye(count + 1, dtype=torch.float64).view(count + 1, 1, count + 1, 1, 1))
        first = next(sources) * ratio
        last = sample(
            lambda x, sigma: x * 0, langevin.sgld(first, 1.0, lambda s=sources: next(s), [step] * count)
        )
        assert langevin.spread_after(step, ratio, count) == pytest.approx(
            last.square().sum().item(), rel=1e-12
        )


def test_step_size_is_the_best():
    """Technique 4; for CIFAR-10's 232 levels from 50 to 0.01 and 5 steps each the paper gives epsilon 6.2e-6."""
    ratio = Ladder(0.01, 50.0, 232).ratio
    step = langevin.step_size(ratio, 5)
    assert step * 0.01**2 == pytest.approx(6.2e-6, rel=0.02)
    for other in (step * 0.9, step * 1.1):
        assert abs(langevin.spread_after(step, ratio, 5) - 1) < abs(
            langevin.spread_after(other, ratio, 5) - 1
        )


def test_levels_of_cifar():
    """Technique 2 for 3072 elements: neighbours overlap by a half, "about" which the paper's own 232 levels do."""
    ladder = langevin.geometric_levels(0.01, 50.0, 3072)
    assert langevin.overlap(ladder.ratio, 3072) == pytest.approx(0.5, abs=0.01)
    assert langevin.overlap(Ladder(0.01, 50.0, 232).ratio, 3072) == pytest.approx(0.5, abs=0.07)
    assert 215 < ladder.count < 232
    assert langevin.overlap(1.0, 3072) == pytest.approx(math.erf(3 / math.sqrt(2)))


def test_largest_level():
    points = torch.randn(50, 2, 1, 1)
    expected = max((a - b).norm().item() for a in points for b in points)
    assert langevin.largest_level(points) == pytest.approx(expected, rel=1e-5)


def test_plain_langevin_has_the_bias_of_its_step():
    """One size of step: variance v / (1 - a / (2v)) of Gaussian data, exactly, after many steps."""
    std, sigma, step = 0.8, 0.6, 0.3
    variance, a = std**2 + sigma**2, step * sigma**2
    count = 400
    sources = iter(torch.eye(count + 1, dtype=torch.float64).view(count + 1, 1, count + 1, 1, 1))
    walk = langevin.sgld(next(sources), sigma, lambda: next(sources), [step] * count)
    last = sample(lambda x, s: x * (std**2 / variance), walk)
    assert last.square().sum().item() == pytest.approx(variance / (1 - a / (2 * variance)), rel=1e-9)


def test_decaying_steps_take_the_bias_away():
    """SGLD of Welling & Teh: a Gaussian is reached within its Monte Carlo error, with the bias of the last step."""
    data = Mixture.gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[0.5, 0.3], [0.3, 0.4]]))
    steps = langevin.decaying(600, 0.5, 0.02)
    assert steps[0] == 0.5 and steps[-1] == pytest.approx(0.02) and steps == sorted(steps, reverse=True)
    x = torch.zeros(8000, 2, 1, 1, dtype=torch.float64)
    x = sample(data.denoise, langevin.sgld(x, 0.5, noise_like(x), steps))
    # a / (2v) with a = 0.02 * 0.25 and v no less than the smallest eigenvalue, 0.146, and the noise's 0.25
    assert_moments(x, data, sigma=0.5, bias=0.02 * 0.25 / (2 * 0.396))


def test_annealing_reaches_a_mixture():
    """Modes 2.2 apart keep their weights, 0.3 and 0.7: plain Langevin dynamics from the data's noise would not."""
    ladder = Ladder(0.02, 6.0, 20)
    x = ladder.sigma_max * torch.randn(6000, 2, 1, 1, dtype=torch.float64)
    walk = langevin.annealed_langevin(
        x, ladder.sigmas(), noise_like(x), step=0.05, steps_per_level=60, denoise=False
    )
    # The walk's own variance is too large by a / (2v) < step / 2 where the modes part.
    assert_moments(sample(TWO.denoise, walk), TWO, sigma=0.02, bias=0.025)


@pytest.mark.parametrize("bad", [(1, 0.5, 0.1), (10, 0.1, 0.5), (10, 0.5, 0.1, 0.5)])
def test_bad_steps_get_a_line(bad):
    with pytest.raises(UserError, match="decaying"):
        langevin.decaying(*bad)
