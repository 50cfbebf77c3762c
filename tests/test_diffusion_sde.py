"""SDEs against the paper's formulas, recomputed, and as the schedules that denoiser, noising and losses need."""

import math

import pytest
import torch

from ldm.diffusion import parameterization
from ldm.diffusion.denoiser import Denoiser, answered
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.sde import VP, LinearBeta, SubVP, TableBeta
from ldm.diffusion.variance_exploding import VE, Ladder
from ldm.errors import UserError

T = torch.linspace(0.01, 1, 23, dtype=torch.float64)
TABLE = NoiseSchedule.build("scaled_linear", 0.00085, 0.012)
SDES = {"vp": VP(), "subvp": SubVP(), "ve": VE(0.01, 50.0), "table": VP.of(TABLE)}


def paper(name, t):
    """alpha, std, drift factor and g^2 of Song et al. 2021, eq. 29-33, with beta 0.1 to 20 and sigma 0.01 to 50."""
    beta, integral = 0.1 + t * 19.9, 0.1 * t + 19.9 * t**2 / 2
    if name == "vp":
        return math.exp(-integral / 2), math.sqrt(1 - math.exp(-integral)), -beta / 2, beta
    if name == "subvp":
        return (
            math.exp(-integral / 2),
            1 - math.exp(-integral),
            -beta / 2,
            beta * (1 - math.exp(-2 * integral)),
        )
    sigma = 0.01 * 5000**t
    return 1.0, sigma, 0.0, sigma**2 * 2 * math.log(5000)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_kernels_and_drifts_are_the_papers(name):
    sde = SDES[name]
    for t in T:
        alpha, std, drift, squared = paper(name, t.item())
        assert sde.alpha(t).item() == pytest.approx(alpha, rel=1e-12)
        assert sde.std(t).item() == pytest.approx(std, rel=1e-12)
        assert sde.diffusion(t).item() ** 2 == pytest.approx(squared, rel=1e-12)
        y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(sde.drift(y, t.repeat(2)), y * drift)


@pytest.mark.parametrize("name", SDES)
def test_kernel_solves_the_sde(name):
    """The mean and variance of a linear SDE: dalpha/dt = f alpha, dstd^2/dt = 2 f std^2 + g^2 (app. B)."""
    sde = SDES[name]
    # between two timesteps of a table, whose rate jumps at each
    t = ((T[:-1] * 999).floor() + 0.4) / 999
    h = 1e-5
    f = sde.drift(torch.ones_like(t), t)
    slope = (sde.alpha(t + h) - sde.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(slope, f * sde.alpha(t), rtol=1e-5, atol=1e-6)
    slope = (sde.std(t + h) ** 2 - sde.std(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(slope, 2 * f * sde.std(t) ** 2 + sde.diffusion(t) ** 2, rtol=1e-5, atol=1e-6)


SCHEDULES = {
    **SDES,
    "ve positional": VE(0.01, 50.0, "positional"),
    "ladder": Ladder(0.01, 1.0, 10),
    "ladder positional": Ladder(0.01, 1.0, 10, "positional"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_protocol(name):
    schedule = SCHEDULES[name].to("cpu")
    u = torch.linspace(0, 1 - 1e-6, 101, dtype=torch.float64)
    timestep = schedule.draw(u)
    sigma = schedule.sigma(timestep)
    assert (sigma.diff() >= 0).all()
    assert sigma[0].item() == pytest.approx(schedule.sigma_min, rel=1e-6)
    assert sigma[-1].item() == pytest.approx(schedule.sigma_max, rel=1e-3)
    # a table takes what lies within a thousandth of a timestep for the timestep
    back = schedule.sigma(schedule.timestep(sigma))
    torch.testing.assert_close(back, sigma, rtol=5e-4 if name == "table" else 1e-6, atol=0)
    assert not schedule.zero_terminal_snr
    levels = schedule.sigmas(10)
    assert len(levels) == 11 and levels[-1] == 0
    assert levels[0] == pytest.approx(schedule.sigma_max) and levels[-2] == pytest.approx(schedule.sigma_min)
    single = schedule.sigma(schedule.draw(u.float()))  # training draws float32
    torch.testing.assert_close(single.double(), sigma, rtol=2e-3, atol=0)


def test_table_is_the_schedule():
    """The SDE through DDPM's table has its noise levels and timesteps, and beta(t) / T near its betas."""
    sde = SDES["table"]
    timestep = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(sde.sigma(timestep), TABLE.sigmas, rtol=1e-9, atol=0)
    assert torch.equal(sde.timestep(TABLE.sigmas).float(), timestep.float())  # as a network is told
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    # -log(1 - beta) is what the step from one timestep to the next adds to B
    rate = sde.beta.rate((timestep[:-1] + 0.5) / 999) / 999
    torch.testing.assert_close(rate, -(1 - betas[1:]).log(), rtol=2e-2, atol=0)
    torch.testing.assert_close(rate[100:], -(1 - betas[101:]).log(), rtol=1e-4, atol=0)


def test_vp_is_ddpm_of_many_steps():
    """App. B: DDPM's linear betas, 0.0001 to 0.02 in 1000 steps, have the SDE's noise levels but for O(1 / T)."""
    ddpm = NoiseSchedule.build("linear", 0.0001, 0.02)
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    sigma = VP().std(steps) / VP().alpha(steps)
    torch.testing.assert_close(sigma[50:], ddpm.sigmas[50:], rtol=6e-2, atol=0)
    torch.testing.assert_close(sigma[-1], ddpm.sigmas[-1], rtol=6e-2, atol=0)


def test_ve_rows_of_the_table():
    """NCSN++ (diffusers' fourier UNet2DModel) sees x as it is, is told sigma, and puts out the score of x."""
    seen = {}

    def network(x, timestep):
        seen["x"], seen["timestep"] = x, timestep
        return -(x - 0.5) / timestep.view(-1, 1, 1, 1) ** 2  # the score of data in one point, 0.5

    x, sigma = torch.randn(2, 1, 2, 2), torch.tensor([0.3, 4.0])
    x0 = answered(Denoiser(network, VE(), "ve_score")(x, sigma))
    torch.testing.assert_close(x0, torch.full_like(x, 0.5), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen["x"], x) and torch.equal(seen["timestep"], sigma)
    noise = torch.randn_like(x)
    noisy = x + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(
        parameterization.target("ve_epsilon", x, noisy, sigma), noise, rtol=1e-4, atol=1e-5
    )
    score = parameterization.target("ve_score", x, noisy, sigma)
    torch.testing.assert_close(score, -noise / sigma.view(-1, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_ladder_draws_its_levels_alone():
    ladder = Ladder(0.01, 1.0, 10, "positional")
    drawn = ladder.draw(torch.rand(1000))
    torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-4)
    assert set(drawn.round().tolist()) == set(range(10))
    assert ladder.ratio == pytest.approx(100 ** (1 / 9))


@pytest.mark.parametrize("make", [lambda: VE(2, 1), lambda: Ladder(0.1, 1, 1), lambda: LinearBeta(3, 1)])
def test_bad_numbers_get_a_line(make):
    with pytest.raises(UserError):
        make()


def test_table_moves():
    assert isinstance(VP.of(TABLE).to("cpu").beta, TableBeta)
