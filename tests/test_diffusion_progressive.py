"""Progressive distillation's target against the paper's algorithm, in its own alpha and sigma, and on a Gaussian."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion.plan import plan
from ldm.diffusion.progressive import target
from ldm.diffusion.samplers import straight_step
from ldm.diffusion.scheduler_config import SchedulerConfig

Teacher = Callable[[Tensor, Tensor], Tensor]
MEAN, STD = 0.3, 0.5


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of x0 where the data are normal."""
    share = STD**2 / (STD**2 + sigma.view(-1, 1, 1, 1) ** 2)
    return MEAN + share * (x - MEAN)


def wavy(x: Tensor, sigma: Tensor) -> Tensor:
    """A network of no use, which is linear in nothing."""
    level = sigma.view(-1, 1, 1, 1)
    return torch.sin(x / (1 + level**2).sqrt() * 3) + 0.1 * torch.cos(level.log1p())


def levels(*rows: Sequence[float], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Falling levels, given one list a picture."""
    return list(torch.tensor(rows, dtype=dtype).T)


def paper_target(teacher: Teacher, x: Tensor, sigmas: list[Tensor]) -> Tensor:
    """Salimans & Ho 2022, algorithm 2, in float64: z = alpha x with alpha^2 + sigma^2 = 1; DDIM is their eq. 8."""

    def alpha_sigma(ratio: Tensor) -> tuple[Tensor, Tensor]:
        ratio = ratio.double().view(-1, 1, 1, 1)
        return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()

    alpha, sigma = alpha_sigma(sigmas[0])
    z = begin = alpha * x.double()
    a_next, s_next = alpha, sigma
    for ratio, following in pairwise(sigmas):
        (a, s), (a_next, s_next) = alpha_sigma(ratio), alpha_sigma(following)
        found = teacher(z / a, ratio.double())
        z = a_next * found + s_next / s * (z - a * found)
    share = s_next / sigma
    return (z - share * begin) / (a_next - share * alpha)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("teacher", [exact, wavy])
def test_it_is_the_papers_target(teacher: Teacher, steps: int) -> None:
    x = 3 * torch.randn(3, 2, 4, 4, dtype=torch.float64)
    grid = [
        [float(each) for each in torch.linspace(*ends, steps + 1)] for ends in ((9, 4), (2, 0), (0.2, 0.1))
    ]
    sigmas = levels(*grid)
    torch.testing.assert_close(
        target(teacher, x, sigmas), paper_target(teacher, x, sigmas), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("steps", [2, 3])
def test_a_student_that_says_it_takes_the_teachers_steps_in_one(steps: int) -> None:
    x = 3 * torch.randn(2, 2, 4, 4, dtype=torch.float64)
    sigmas = levels([9, 5, 3, 2][: steps + 1], [1, 0.7, 0.3, 0.1][: steps + 1])
    end = x
    for sigma, sigma_next in pairwise(sigmas):
        end = straight_step(end, wavy(end, sigma), sigma, sigma_next)
    one = straight_step(x, target(wavy, x, sigmas), sigmas[0], sigmas[-1])
    torch.testing.assert_close(one, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terminal", [4096.0, 2.0**24])
@pytest.mark.parametrize("after", [[60.0, 30.0], [2.0, 1.0], [1.0, 0.0], [4095.0, 4090.0]])
def test_at_zero_terminal_snr_float32_keeps_it(terminal: float, after: list[float]) -> None:
    """float32 rounds each estimate, weight and product to 6e-8; the states' difference would be off by 2 and more."""
    x = (terminal * torch.randn(2, 2, 4, 4)).float()
    sigmas = levels([terminal, *after], [terminal, *after], dtype=torch.float32)
    found = target(exact, x, sigmas)
    assert found.dtype == torch.float32
    wanted = paper_target(exact, x, [each.double() for each in sigmas])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_on_a_gaussian_students_of_students_take_all_of_the_teachers_steps() -> None:
    """Rounds of 8, 4, 2 and 1 steps, each student exact: the last one's step is the product of 16, by the formula."""
    scheduler = SchedulerConfig("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False})
    grids = {n: torch.tensor(plan(scheduler, n).sigmas, dtype=torch.float64) for n in (16, 8, 4, 2, 1)}

    def student(n: int) -> Teacher:
        if n == 16:
            return exact

        def estimate(x: Tensor, sigma: Tensor) -> Tensor:
            index = int((grids[n] - sigma[0]).abs().argmin())
            assert grids[2 * n][2 * index] == grids[n][index] == sigma[0]
            fine = grids[2 * n][2 * index : 2 * index + 3]
            return target(student(2 * n), x, [each.expand(len(x)) for each in fine])

        return estimate

    x = grids[1][0] * torch.randn(5, 1, 2, 2, dtype=torch.float64)
    end = student(1)(x, grids[1][:1].expand(5))
    kept = [(STD**2 + high * low) / (STD**2 + high**2) for high, low in pairwise(grids[16].tolist())]
    factor = math.prod(kept)
    torch.testing.assert_close(end, MEAN + factor * (x - MEAN), rtol=1e-10, atol=1e-10)
    assert factor * grids[1][0].item() > 0.1  # 16 steps of Euler's keep a part of the spread, not none
