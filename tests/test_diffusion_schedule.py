"""Noise schedules, spacings, the prediction table and the training loss, against formulas and diffusers' tables."""

import diffusers
import pytest
import torch

from ldm.diffusion import parameterization
from ldm.diffusion.denoiser import Denoiser, answered
from ldm.diffusion.losses import prediction_loss
from ldm.diffusion.noising import add_noise, shifted
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.spacing import SPACINGS, lcm_timesteps, spaced_sigmas, spaced_timesteps
from ldm.errors import UserError

BETAS = [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 1e-4, 0.02)]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name,start,end", BETAS)
def test_tables_equal_diffusers(name, start, end, zero):
    keys = {"beta_schedule": name, "beta_start": start, "beta_end": end, "rescale_betas_zero_snr": zero}
    theirs = diffusers.EulerDiscreteScheduler(**keys)
    ours = NoiseSchedule.build(**keys)
    # The linear schedule, rescaled, passes the clamp of its last value two steps before it; diffusers'
    # table then has its largest sigma beside the end, ours keeps rising.
    upto = -1 if zero and name == "linear" else None
    assert torch.equal(ours.alphas_cumprod[:upto].float(), theirs.alphas_cumprod[:upto])
    assert torch.allclose(ours.sigmas[:upto].float(), theirs.sigmas[:-1].flip(0)[:upto], rtol=3e-7)
    assert bool((ours.sigmas.diff() > 0).all())


def test_zero_terminal_snr_ends_where_diffusers_clamps():
    schedule = NoiseSchedule.build(rescale_betas_zero_snr=True)
    assert schedule.alphas_cumprod[-1] == 2**-24
    assert schedule.sigma_max == pytest.approx(4096, rel=1e-6)
    assert schedule.sigma_min == NoiseSchedule.build().sigma_min


def test_trained_betas_and_bad_ones():
    betas = torch.linspace(0.001, 0.3, 17)
    schedule = NoiseSchedule.build(trained_betas=betas.tolist())
    assert torch.allclose(schedule.alphas_cumprod.float(), (1 - betas).cumprod(0))
    for wrong in ({"trained_betas": [0.1, 1.5]}, {"beta_start": -1.0}, {"num_train_timesteps": 1}):
        with pytest.raises(UserError, match="between 0 and 1"):
            NoiseSchedule.build(**wrong)
    with pytest.raises(UserError, match="did you mean scaled_linear"):
        NoiseSchedule.build("scaled_linar")


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name,start,end", BETAS)
def test_sigma_and_timestep_are_inverse(name, start, end, zero):
    schedule = NoiseSchedule.build(name, start, end, rescale_betas_zero_snr=zero)
    whole = torch.arange(1000)
    assert torch.equal(schedule.sigma(whole), schedule.sigmas)
    assert torch.equal(schedule.timestep(schedule.sigmas.float()), whole.double())  # exact from float32 too
    between = torch.rand(50, 2, dtype=torch.float64) * 999
    assert torch.allclose(schedule.timestep(schedule.sigma(between)), between, atol=1e-3)
    outside = torch.tensor([0.0, schedule.sigma_max * 2], dtype=torch.float64)
    assert schedule.timestep(outside).tolist() == [0, 999]


@pytest.mark.parametrize("shift", [1.0, 3.0, 20.0])
def test_the_largest_shares_draw_the_last_timestep(shift):
    """Shares as torch.rand gives them, multiples of 2^-24: shifted, the largest are 1 in float32."""
    schedule = NoiseSchedule.build()
    shares = (1 - torch.arange(1, 17, dtype=torch.float64) * 2.0**-24).float()
    assert (shares < 1).all()
    assert schedule.draw(shifted(shares, shift)).tolist() == [999] * 16
    assert schedule.draw(shifted(torch.zeros(1), shift)).tolist() == [0]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 7, 10, 20, 50])
def test_every_spacing_descends_from_noise(spacing, n):
    schedule = NoiseSchedule.build()
    sigmas = spaced_sigmas(schedule, spacing, n, steps_offset=1)
    assert sigmas.shape == (n + 1,) and sigmas.dtype == torch.float64 and sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    if spacing != "leading":
        assert sigmas[0] == pytest.approx(schedule.sigma_max)


def test_spacings_by_hand():
    assert spaced_timesteps("leading", 4, steps_offset=1).tolist() == [751, 501, 251, 1]
    assert spaced_timesteps("leading", 4, extra_point=True).tolist() == [800, 600, 400, 200]
    assert spaced_timesteps("trailing", 4).tolist() == [999, 749, 499, 249]
    assert spaced_timesteps("linspace", 4).tolist() == [999, 666, 333, 0]
    assert spaced_timesteps("linspace", 3, whole=False).tolist() == [999, 499.5, 0]
    assert spaced_timesteps("linspace", 4, extra_point=True).tolist() == [999, 749, 500, 250]
    assert spaced_timesteps("sgm_uniform", 4).tolist() == [999, 749.25, 499.5, 249.75]
    assert lcm_timesteps(4).tolist() == [999, 759, 499, 259]
    schedule = NoiseSchedule.build()
    ten = spaced_sigmas(schedule, "align_your_steps", 10)
    assert schedule.timestep(ten[:-1]).tolist() == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    assert torch.allclose(spaced_sigmas(schedule, "align_your_steps", 20)[:-1:2], ten[:-1])
    ten = spaced_sigmas(schedule, "align_your_steps", 10, is_xl=True)
    assert schedule.timestep(ten[:-1]).tolist() == [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    karras = spaced_sigmas(schedule, "karras", 5, ends=(10.0, 0.1), final=0.03)
    assert karras[[0, 4, 5]].tolist() == pytest.approx([10, 0.1, 0.03])
    assert karras[2] == pytest.approx(((10 ** (1 / 7) + 0.1 ** (1 / 7)) / 2) ** 7)


def test_spacing_errors():
    schedule = NoiseSchedule.build()
    with pytest.raises(UserError, match="did you mean karras"):
        spaced_sigmas(schedule, "karas", 10)
    for n in (0, -1, 1001):
        with pytest.raises(UserError, match="between 1 and 1000"):
            spaced_sigmas(schedule, "trailing", n)
    with pytest.raises(UserError, match="original_inference_steps"):
        lcm_timesteps(51)


def noised(dtype=torch.float64):
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=dtype)
    sigma = torch.tensor([0.03, 0.3, 1.0, 14.0, 150.0], dtype=dtype)
    return x0, noise, sigma, x0 + sigma.view(-1, 1, 1, 1) * noise


@pytest.mark.parametrize("prediction_type", parameterization.PREDICTION_TYPES)
def test_parameterization_round_trip_and_formulas(prediction_type):
    x0, noise, sigma, x = noised()
    target = parameterization.target(prediction_type, x0, x, sigma)
    assert torch.allclose(parameterization.x0_from(prediction_type, target, x, sigma), x0, atol=1e-10)
    s = sigma.view(-1, 1, 1, 1)
    alpha = 1 / (1 + s**2).sqrt()  # the variance-preserving pair: alpha x0 + (alpha s) noise
    score = -noise / (alpha * s)
    formulas = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - alpha * s * x0,
        "score": score,
        "ve_score": -noise / s,  # the variance-exploding pair: x0 + s noise
        "ve_epsilon": noise,
        # data of deviation 1/2 (Karras et al. 2022, eq. 8 with table 1), and a boundary at 0.002
        "edm": (s * x0 - noise / 4) / (s**2 / 4 + 1 / 16).sqrt(),
        "consistency": 2 * (x0 - x / (4 * (s - 0.002) ** 2 + 1)) * (s**2 + 0.25).sqrt() / (s - 0.002),
    }
    assert torch.allclose(target, formulas[prediction_type], rtol=1e-9, atol=1e-9)


def test_epsilon_is_refused_at_zero_terminal_snr():
    schedule = NoiseSchedule.build(rescale_betas_zero_snr=True)
    batch = torch.zeros(1, 1, 2, 2)
    for prediction_type in ("epsilon", "score"):
        with pytest.raises(UserError, match="zero terminal SNR"):
            Denoiser(lambda x, t: x, schedule, prediction_type)
        with pytest.raises(UserError, match="zero terminal SNR"):
            noised = add_noise(batch, batch, torch.tensor([5]), schedule)
            prediction_loss(batch, noised, schedule, prediction_type)
    with pytest.raises(UserError, match="did you mean v_prediction"):
        Denoiser(lambda x, t: x, schedule, "v_predicton")


@pytest.mark.parametrize("prediction_type", parameterization.PREDICTION_TYPES)
def test_denoiser_of_a_perfect_network(prediction_type):
    """A network that puts out the target makes a denoiser that finds x0; it sees unit variance, or x, and t."""
    schedule = NoiseSchedule.build()
    timestep = torch.tensor([0, 1, 300, 998, 999])
    x0, noise = torch.randn(2, 5, 3, 4, 4)
    sigma = schedule.sigma(timestep).float()
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    alpha = schedule.alphas_cumprod[timestep].view(-1, 1, 1, 1)

    def network(x_in, t):
        assert t.dtype == torch.float32 and torch.equal(t, timestep.float())
        seen = (alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise).float()
        seen = x if prediction_type.startswith("ve_") else seen
        if prediction_type in ("edm", "consistency"):
            seen = x / (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1)
        assert torch.allclose(x_in, seen, atol=1e-5)
        return parameterization.target(prediction_type, x0, x, sigma).half()

    denoised = answered(Denoiser(network, schedule, prediction_type)(x, sigma))
    assert denoised.dtype == torch.float32
    error = (denoised - x0).flatten(1).norm(dim=1) / (1 + sigma)
    assert bool((error < 0.02).all())  # as good as half precision allows
