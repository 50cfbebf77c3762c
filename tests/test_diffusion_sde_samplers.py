"""SDE samplers: the papers' steps recomputed, their order, exact moments, and diffusers' ScoreSdeVeScheduler."""

import math
from itertools import pairwise

import pytest
import torch

from ldm.diffusion.driver import sample
from ldm.diffusion.samplers import ddpm
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.sde import VP, SubVP
from ldm.diffusion.sde_samplers import PREDICTORS, euler_maruyama, predictor_corrector
from ldm.diffusion.variance_exploding import VE
from ldm.errors import UserError
from tests.closed_forms import TWO, Mixture, assert_moments

SDES = {
    "vp": VP(),
    "subvp": SubVP(),
    "ve": VE(0.02, 8.0),
    "table": VP.of(NoiseSchedule.build("scaled_linear", 0.00085, 0.012)),
}
DATA = 0.7  # standard deviation of Gaussian data


def variance_error(sde, steps, predictor, std):
    """Of where sampling ends, at sigma_min, for Gaussian data: exact, as the denoiser is linear."""
    sigmas = sde.sigmas(steps)[:-1]
    sources = steps + 1
    basis = iter(torch.eye(sources, dtype=torch.float64).view(sources, 1, sources, 1, 1))
    first = next(basis) * math.sqrt(std**2 + sigmas[0] ** 2)
    walk = predictor_corrector(
        first, sigmas, lambda: next(basis), sde=sde, predictor=predictor, corrector_steps=0
    )
    last = sample(lambda x, sigma: x * (std**2 / (std**2 + sigma[0].item() ** 2)), walk)
    return last.square().sum().item() - std**2 - sde.sigma_min**2


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_weak_order_is_one(name, predictor):
    """The error of the last variance halves with the step, over data of three widths. (A table's rate jumps.)"""
    errors = [
        math.hypot(*(variance_error(SDES[name], n, predictor, std) for std in (0.2, 0.7, 2.0)))
        for n in (400, 800, 1600)
    ]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    print(f"{name} {predictor}: orders {orders[0]:.2f} {orders[1]:.2f}, last error {errors[-1]:.1e}")
    assert orders[-1] == pytest.approx(1, abs=0.1)


def linear_beta(t):
    return 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2


def score_at(y, alpha, std):
    """The score of y for a denoiser that says x0 = tanh(x)."""
    return (alpha * torch.tanh(y / alpha) - y) / std**2


def run_one(sampler, x, sigmas, noises, **options):
    given = iter(noises)
    steps = sampler(x, sigmas, lambda: next(given), **options)
    return sample(lambda x, sigma: torch.tanh(x), steps)


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_euler_maruyama_step_is_the_papers(name):
    """dy = [f - g^2 score] dt + g dw from t = 0.6 to 0.59, with the formulas of eq. 11 and 12."""
    t, t_next = 0.6, 0.59
    beta, integral = linear_beta(t)
    alpha = math.exp(-integral / 2)
    std, squared = math.sqrt(1 - alpha**2), beta
    sub = name == "subvp"
    if sub:
        std, squared = 1 - alpha**2, beta * (1 - math.exp(-2 * integral))
    x, z = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    y = alpha * x
    y = (
        y
        - (-beta / 2 * y - squared * score_at(y, alpha, std)) * (t - t_next)
        + math.sqrt(squared * (t - t_next)) * z
    )
    alpha_next = math.exp(-linear_beta(t_next)[1] / 2)
    std_next = 1 - alpha_next**2 if sub else math.sqrt(1 - alpha_next**2)
    ours = run_one(euler_maruyama, x, [std / alpha, std_next / alpha_next], [z], sde=SDES[name])
    torch.testing.assert_close(ours, y / alpha_next, rtol=1e-9, atol=1e-9)


def test_vp_predictor_corrector_is_algorithm_3():
    """y' = (2 - sqrt(1 - beta)) y + beta score + sqrt(beta) z, then algorithm 5, in the paper's terms."""
    t, t_next = 0.6, 0.599
    alpha, alpha_next = (math.exp(-linear_beta(each)[1] / 2) for each in (t, t_next))
    beta = 1 - (alpha / alpha_next) ** 2
    assert beta == pytest.approx(linear_beta(0.5995)[0] / 1000, rel=1e-2)  # beta_i of app. B
    x, z, more = (torch.randn(2, 1, 3, 3, dtype=torch.float64) for _ in range(3))
    y = alpha * x
    y = (
        (2 - math.sqrt(1 - beta)) * y
        + beta * score_at(y, alpha, math.sqrt(1 - alpha**2))
        + math.sqrt(beta) * z
    )
    score = score_at(y, alpha_next, math.sqrt(1 - alpha_next**2))
    ratio = 0.16 * more.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
    size = 2 * (1 - linear_beta(t_next)[0] / 1000) * ratio**2
    y = y + size * score + (2 * size).sqrt() * more
    sigmas = [math.sqrt(1 / each**2 - 1) for each in (alpha, alpha_next)]
    ours = run_one(predictor_corrector, x, sigmas, [z, more], sde=SDES["vp"], snr=0.16, measured=True)
    torch.testing.assert_close(ours, y / alpha_next, rtol=1e-9, atol=1e-9)


def test_ve_steps_are_diffusers():
    """ScoreSdeVeScheduler's step_pred and step_correct, on its own ladder; one picture, whose norm is the batch's."""
    from diffusers import ScoreSdeVeScheduler

    theirs = ScoreSdeVeScheduler(num_train_timesteps=50, snr=0.16, sigma_min=0.02, sigma_max=8.0)
    theirs.set_timesteps(50)
    theirs.set_sigmas(50)
    levels = theirs.discrete_sigmas.flip(0).tolist()
    x = torch.randn(1, 3, 4, 4) * 8
    expected, ours = x, x
    for i in range(0, 49, 3):
        # their timestep is looked up by (t (N - 1)), cut off: half of a place is added, as float32 rounds
        t = (49 - i + 0.5) / 49
        sigma = levels[i]
        generator = torch.Generator().manual_seed(i)
        score = (torch.tanh(expected) - expected) / sigma**2
        expected = theirs.step_pred(score, t, expected, generator=generator).prev_sample
        score = (torch.tanh(expected) - expected) / levels[i + 1] ** 2
        expected = theirs.step_correct(score, expected, generator=generator).prev_sample
        generator = torch.Generator().manual_seed(i)
        steps = predictor_corrector(
            ours,
            [sigma, levels[i + 1]],
            lambda g=generator: torch.randn(x.shape, generator=g),
            sde=SDES["ve"],
            snr=0.16,
            measured=True,
        )
        ours = sample(lambda x, sigma: torch.tanh(x), steps)
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)


def test_ancestral_sampling_is_ddpm():
    """Eq. 47, SMLD's ancestral step, is what `ddpm` takes in these coordinates."""
    sigma, sigma_next = 3.0, 2.5
    x, z = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    score = (torch.tanh(x) - x) / sigma**2
    expected = x + (sigma**2 - sigma_next**2) * score
    expected = expected + math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) * z
    torch.testing.assert_close(run_one(ddpm, x, [sigma, sigma_next], [z]), expected)


TWELVE = Mixture.gaussian(
    torch.linspace(-1, 1, 12), torch.diag(torch.linspace(0.3, 2.0, 12) ** 2) + 0.1 * torch.ones(12, 12)
)


@pytest.mark.parametrize("name", SDES)
def test_samples_have_the_exact_moments(name):
    """Euler-Maruyama on a mixture, predictor and corrector on a Gaussian of 12 dimensions, at sigma_min.

    A bias comes from the steps: of 300, by the measured order, at most 2 % of a variance; of the corrector, whose steps
    are 2 r^2 of the noise's variance, no more than r^2 of it.
    """
    sde = SDES[name]
    sigmas = sde.sigmas(300)[:-1]
    x = TWO.draw(3000, sde.sigma_max)
    x = sample(TWO.denoise, euler_maruyama(x, sigmas, lambda: torch.randn_like(x), sde=sde))
    assert_moments(x, TWO, sde.sigma_min, bias=0.04)
    x = TWELVE.draw(2000, sde.sigma_max)
    steps = predictor_corrector(x, sigmas, lambda: torch.randn_like(x), sde=sde, snr=0.05)
    assert_moments(sample(TWELVE.denoise, steps), TWELVE, sde.sigma_min, bias=0.04)


def test_corrector_mends_a_coarse_predictor():
    """With 30 steps the predictor's variance is off; Langevin steps at each level bring it nearer."""
    sde, data = SDES["ve"], Mixture.gaussian(torch.zeros(64), torch.eye(64) * DATA**2)
    sigmas, wrong = sde.sigmas(30)[:-1], []
    for corrector_steps in (0, 3):
        x = data.draw(500, sde.sigma_max)
        steps = predictor_corrector(
            x,
            sigmas,
            lambda x=x: torch.randn_like(x),
            sde=sde,
            corrector_steps=corrector_steps,
            snr=0.15,
            measured=True,
        )
        x = sample(data.denoise, steps)
        wrong.append(abs(x.var().item() / (DATA**2 + sde.sigma_min**2) - 1))
    error = 5 * math.sqrt(2 / (500 * 64))
    assert wrong[0] > 2 * wrong[1] + error, wrong


def test_the_last_step_to_zero_is_the_estimate():
    sde = SDES["vp"]
    x = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    sigmas = sde.sigmas(1)
    ours = sample(TWO.denoise, euler_maruyama(x, sigmas, lambda: torch.randn_like(x), sde=sde))
    torch.testing.assert_close(ours, TWO.denoise(x, torch.tensor(sigmas[:1])))


def test_unknown_predictor_gets_a_line():
    with pytest.raises(UserError, match="reverse_diffusion"):
        next(
            predictor_corrector(
                torch.zeros(1, 1, 1, 1), [1.0, 0.0], torch.ones, sde=SDES["ve"], predictor="revers"
            )
        )
    assert set(PREDICTORS) == {"euler_maruyama", "reverse_diffusion", "none"}


def test_a_row_of_predictor_and_corrector_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 3.0, 9.0])[:, None, None, None]
    sde = SDES["ve"]
    sigmas = sde.sigmas(4)
    noise = [torch.randn_like(x) for _ in range(20)]

    def drawn(rows: slice) -> torch.Tensor:
        each = iter(noise)
        steps = predictor_corrector(x[rows], sigmas, lambda: next(each)[rows], sde=sde, snr=0.2)
        return sample(lambda y, sigma: y / (1 + sigma[:, None, None, None] ** 2), steps)

    together = drawn(slice(None))
    for k in range(3):
        assert torch.allclose(drawn(slice(k, k + 1)), together[k : k + 1], rtol=1e-12, atol=1e-12)
