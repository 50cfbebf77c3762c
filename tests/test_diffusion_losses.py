"""The training loss against the papers' formulas, written out, and against diffusers' own pieces."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm.diffusion.bound import Posterior, bound_terms
from ldm.diffusion.losses import (
    LossConfig,
    loss_weight,
    prediction_loss,
)
from ldm.diffusion.noising import add_noise, shifted
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError

WEIGHTINGS = ("unit", "snr", "truncated_snr", "snr_plus_one", "min_snr", "p2", "vlb")
TIMESTEPS = torch.tensor([1, 10, 400, 999])


def diffusion_loss(
    network, x0, noise, timestep, schedule, prediction_type="epsilon", config=None, seen_noise=None
):
    """Noise, a network's output and its loss, as an objective puts them together."""
    noised = add_noise(x0, noise, timestep, schedule, seen_noise)
    output = network(noised.sample(prediction_type), noised.timestep)
    return prediction_loss(output, noised, schedule, prediction_type, config)


def roots(schedule: NoiseSchedule, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alpha_bar = schedule.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def betas_of(schedule: NoiseSchedule, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """beta, alpha, alpha_bar and the alpha_bar before, of Ho et al. 2020, sec. 2."""
    alpha_bar, before = schedule.alphas_cumprod[timestep], schedule.alphas_cumprod[timestep - 1]
    return 1 - alpha_bar / before, alpha_bar / before, alpha_bar, before


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loss_equals_the_direct_formula(prediction_type, weighting):
    schedule = NoiseSchedule.build()
    x0, noise, output = torch.randn(3, 4, 3, 6, 6, dtype=torch.float64)
    alpha, std = roots(schedule, TIMESTEPS)
    target = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - std * x0}[prediction_type]
    beta, step, alpha_bar, before = betas_of(schedule, TIMESTEPS)
    snr = alpha_bar / (1 - alpha_bar)
    variance = beta * (1 - before) / (1 - alpha_bar)
    # Of the noise's error; an error of the output makes one of the noise that is sqrt(noise_of) times as large.
    noise_of = {"epsilon": torch.ones_like(snr), "sample": snr, "v_prediction": alpha_bar}[prediction_type]
    of_noise = {
        "unit": 1 / noise_of,
        "snr": torch.ones_like(snr),
        "truncated_snr": (alpha / std).square().clamp(min=1).flatten() / snr,  # Salimans & Ho 2022, sec. 4
        "snr_plus_one": 1 / (snr * (1 - alpha_bar)),
        "min_snr": snr.clamp(max=5) / snr,
        "p2": 1 / (1 + snr),
        "vlb": beta**2 / (2 * variance * step * (1 - alpha_bar)),  # Ho et al. 2020, eq. 12
    }[weighting]
    seen = []
    loss = diffusion_loss(
        lambda x, t: seen.append((x, t)) or output,
        x0,
        noise,
        TIMESTEPS,
        schedule,
        prediction_type,
        LossConfig(weighting),
    )
    assert loss.shape == (4,) and loss.dtype == torch.float32
    expected = of_noise * noise_of * (output - target).square().mean((1, 2, 3))
    assert torch.allclose(loss.double(), expected, rtol=1e-4)
    assert torch.allclose(seen[0][0].double(), alpha * x0 + std * noise, atol=1e-6)
    assert seen[0][1].tolist() == TIMESTEPS.tolist()


def test_weights_of_the_bound_are_halved_differences_of_the_snr():
    """Kingma et al. 2021, eq. 13: for x0's error (SNR(t-1) - SNR(t)) / 2."""
    schedule = NoiseSchedule.build()
    snr = schedule.sigmas**-2
    timesteps = torch.arange(1, 1000)
    weight = loss_weight(timesteps, schedule, "sample", LossConfig("vlb"))
    torch.testing.assert_close(weight, (snr[:-1] - snr[1:]) / 2)
    assert loss_weight(torch.tensor([0]), schedule, "sample", LossConfig("vlb")).isfinite()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_at_zero_terminal_snr_is_finite(weighting):
    schedule = NoiseSchedule.build(rescale_betas_zero_snr=True)
    x0, noise = torch.randn(2, 2, 3, 4, 4)
    timestep = torch.tensor([999, 0])
    loss = diffusion_loss(
        lambda x, t: -x0, x0, noise, timestep, schedule, "v_prediction", LossConfig(weighting)
    )
    assert bool(loss.isfinite().all()) and loss[0] < 1e-5  # v is -x0 where there is no signal


def test_an_unknown_weighting_is_named():
    with pytest.raises(UserError, match="min_snr"):
        loss_weight(TIMESTEPS, NoiseSchedule.build(), "epsilon", LossConfig("minsnr"))  # type: ignore[arg-type]


def test_min_snr_weights_of_the_paper():
    schedule = NoiseSchedule(torch.tensor([20 / 21, 1 / 2, 1 / 5], dtype=torch.float64))  # SNR 20, 1, 1/4
    timestep, config = torch.arange(3), LossConfig("min_snr")
    assert loss_weight(timestep, schedule, "epsilon", config).tolist() == pytest.approx([5 / 20, 1, 1])
    assert loss_weight(timestep, schedule, "sample", config).tolist() == pytest.approx([5, 1, 0.25])
    weights = loss_weight(timestep, schedule, "v_prediction", config)
    assert weights.tolist() == pytest.approx([5 / 21, 1 / 2, 0.2])


@pytest.mark.parametrize("weighting", ["unit", "min_snr"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradient_equal_those_of_diffusers_scripts(prediction_type, weighting):
    """add_noise, get_velocity, compute_snr and the weights of diffusers' text-to-image training, on one network."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    x0, noise = torch.randn(2, 6, 4, 8, 8)
    timesteps = torch.tensor([3, 77, 250, 500, 801, 999])
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )
    output = network(scheduler.add_noise(x0, noise, timesteps))
    is_v = prediction_type == "v_prediction"
    target = scheduler.get_velocity(x0, noise, timesteps) if is_v else noise
    theirs = torch.nn.functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    if weighting == "min_snr":
        snr = compute_snr(scheduler, timesteps)
        theirs = theirs * snr.clamp(max=5.0) / (snr + 1 if is_v else snr)
    expected = torch.autograd.grad(theirs.mean(), list(network.parameters()))
    losses = diffusion_loss(
        lambda x, t: network(x),
        x0,
        noise,
        timesteps,
        NoiseSchedule.build(),
        prediction_type,
        LossConfig(weighting),
    )
    found = torch.autograd.grad(losses.mean(), list(network.parameters()))
    assert losses.mean().item() == pytest.approx(theirs.mean().item(), rel=1e-5)
    for ours, reference in zip(found, expected, strict=True):
        assert (ours - reference).norm() < 1e-5 * reference.norm()


# A learned variance


def test_learned_variances_of_the_reference():
    """The values of diffusers' own test of `learned_range`, for a network that puts out 0.5."""
    schedule, timestep = NoiseSchedule.build("squaredcos_cap_v2"), torch.tensor([1, 487, 999])
    found = Posterior.at(timestep, schedule).learned_log_variance(torch.full((3,), 0.5))
    wanted = torch.tensor(
        [-10.1712790, -5.7998052, -0.0010011]
    )  # from float32, in which the first beta has 3 digits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=2e-5)


def test_the_bound_is_the_divergence_of_the_two_gaussians():
    schedule = NoiseSchedule.build()
    x0, found, noise, fraction = torch.randn(4, 4, 3, 6, 6, dtype=torch.float64)
    alpha, std = roots(schedule, TIMESTEPS)
    x = alpha * x0 + std * noise
    beta, step, alpha_bar, before = (each.view(-1, 1, 1, 1) for each in betas_of(schedule, TIMESTEPS))
    variance = beta * (1 - before) / (1 - alpha_bar)

    def mean(clean: torch.Tensor) -> torch.Tensor:  # Ho et al. 2020, eq. 7
        return (before.sqrt() * beta * clean + step.sqrt() * (1 - before) * x) / (1 - alpha_bar)

    share = (fraction + 1) / 2
    learned = (share * beta.log() + (1 - share) * variance.log()).exp()
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean(x0), variance.sqrt().expand_as(x)),
        torch.distributions.Normal(mean(found), learned.sqrt()),
    )
    bound = bound_terms(found, x0, TIMESTEPS, schedule, "learned_range", fraction)
    torch.testing.assert_close(bound, divergence.mean((1, 2, 3)))
    # The last term: what x0 has of likelihood under the first step backwards.
    zero, second = torch.zeros(4, dtype=torch.long), schedule.alphas_cumprod[:2]
    low = (1 - second[1] / second[0]) * (1 - second[0]) / (1 - second[1])
    learned = (share * (1 - second[0]).log() + (1 - share) * low.log()).exp()
    likelihood = -torch.distributions.Normal(found, learned.sqrt()).log_prob(x0)
    bound = bound_terms(found, x0, zero, schedule, "learned_range", fraction)
    torch.testing.assert_close(bound, likelihood.mean((1, 2, 3)))


# True is the paper's weight, whose unit is bits (guided-diffusion divides the bound by ln 2); a number counts nats.
@pytest.mark.parametrize("variance,nats", [(0.001, 0.001), (True, 0.001 / math.log(2))])
def test_the_hybrid_loss_teaches_the_variance_and_leaves_the_mean_alone(variance, nats):
    schedule, config = NoiseSchedule.build(), LossConfig(variance=variance)
    x0, noise = torch.randn(2, 4, 3, 6, 6)
    output = torch.randn(4, 6, 6, 6, requires_grad=True)
    hybrid = diffusion_loss(lambda x, t: output, x0, noise, TIMESTEPS, schedule, "epsilon", config)
    simple = diffusion_loss(lambda x, t: output[:, :3], x0, noise, TIMESTEPS, schedule, "epsilon")
    (both,) = torch.autograd.grad(hybrid.sum(), output, retain_graph=True)
    (alone,) = torch.autograd.grad(simple.sum(), output)
    assert torch.equal(both[:, :3], alone[:, :3]) and bool(both[:, 3:].abs().sum() > 0)
    found = (x0 + schedule.sigma(TIMESTEPS).view(-1, 1, 1, 1) * (noise - output[:, :3])).float()
    bound = bound_terms(found, x0, TIMESTEPS, schedule, "learned_range", output[:, 3:])
    expected = nats * 1000 * bound  # lambda, and the T terms that one timestep stands for
    assert torch.allclose(hybrid - simple, expected, rtol=1e-3, atol=1e-5)


# Other noise


def test_perturbed_input_has_an_unperturbed_target():
    """Ning et al. 2023, algorithm 1: the network sees more noise than it should predict."""
    schedule = NoiseSchedule.build()
    x0, noise, more = torch.randn(3, 4, 3, 6, 6)
    seen = []
    loss = diffusion_loss(
        lambda x, t: seen.append(x) or noise,
        x0,
        noise,
        TIMESTEPS,
        schedule,
        seen_noise=noise + 0.1 * more,
    )
    alpha, std = roots(schedule, TIMESTEPS)
    assert torch.allclose(seen[0].double(), alpha * x0 + std * (noise + 0.1 * more), atol=1e-5)
    assert bool((loss < 1e-8).all())  # the very noise is the target


def test_shifted_timesteps_have_the_distribution_of_the_formula():
    shares = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.allclose(shifted(shares, 1.0), shares, rtol=0, atol=1e-15)
    schedule = NoiseSchedule.build()
    assert torch.equal(schedule.draw(shares), torch.arange(1000))
    for shift in (0.5, 3.0):
        moved = schedule.draw(shifted(shares, shift))
        assert moved.min() >= 0 and moved.max() <= 999
        for share in (0.25, 0.5, 0.9):
            wanted = share / (shift - (shift - 1) * share)
            assert float((moved < 1000 * share).double().mean()) == pytest.approx(wanted, abs=2e-3)
