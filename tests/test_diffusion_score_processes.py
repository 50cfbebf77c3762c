"""Processes of continuous noise: on disk and back, their samplers on data that is known, their losses, one training."""

import math

import pytest
import torch

from ldm.diffusion.losses import LossConfig, loss_weight, prediction_loss
from ldm.diffusion.noising import add_noise
from ldm.diffusion.process import DDPMConfig, read_process
from ldm.diffusion.score_processes import NCSNConfig, SubVPConfig, VEConfig, VPConfig
from ldm.errors import UserError
from tests.closed_forms import Mixture, assert_moments

PROCESSES = {
    "vp": VPConfig(beta_min=0.2, snr=0.05),
    "subvp": SubVPConfig(snr=0.05),
    "ve": VEConfig(sigma_max=20.0, snr=0.05),
    "ncsn": NCSNConfig(sigma_max=10.0, levels=60, steps_per_level=8),
}
DATA = Mixture.gaussian(torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.4]]))


@pytest.mark.parametrize("name", PROCESSES)
def test_on_disk_and_back(name):
    process = PROCESSES[name].process()
    written = process.to_dict()
    assert read_process(written) == process
    # diffusers' own file has keys of its discrete steps
    assert read_process({**written, "num_train_timesteps": 2000, "_diffusers_version": "0.30.0"}) == process


def test_reads_diffusers_ve():
    from diffusers import ScoreSdeVeScheduler

    theirs = ScoreSdeVeScheduler(sigma_max=8.0)
    found = read_process({"_class_name": "ScoreSdeVeScheduler", **theirs.config})
    assert (
        isinstance(found, VEConfig)
        and found.sigma_max == 8
        and found.snr == 0.15
        and found.correct_steps == 1
    )
    ours = ScoreSdeVeScheduler.from_config(found.to_dict())
    assert ours.config.sigma_max == 8 and ours.config.sampling_eps == 1e-5


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *((name, None) for name in PROCESSES),
        ("vp", "predictor_corrector"),
        ("subvp", "heun"),
        ("ve", "ddpm"),
        ("ve", "reverse_diffusion"),
    ],
)
def test_draws_the_data(name, sampler):
    """From the prior, whose difference from the noisy data is below 1/100 of a deviation, in 250 steps."""
    drawing = PROCESSES[name].plan(250, sampler)
    x = drawing.sample(DATA.denoise, lambda: torch.randn(3000, 2, 1, 1))
    assert_moments(x, DATA, bias=0.05)


def test_levels_of_a_ladder_are_its_own():
    process = PROCESSES["ncsn"]
    ladder = set(process.schedule.levels.tolist())
    for steps in (1, 7, 60, 100):
        sigmas = process.plan(steps).sigmas
        assert set(sigmas[:-1]) <= ladder and len(sigmas) == min(steps, 60) + 1
    assert process.plan(60).sigmas[0] == pytest.approx(10) and process.plan(60).sigmas[-2] == pytest.approx(
        0.01
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_score_matching_is_weighted_by_the_variance(name):
    """The weight snr: sigma^2 |score - its target|^2 (Song & Ermon 2019, eq. 5-6), whatever the network puts out."""
    process = PROCESSES[name]
    schedule, x0, noise = process.schedule, torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    noised = add_noise(x0, noise, schedule.draw(torch.tensor([0.3, 0.5, 0.7, 0.9])), schedule)
    output = torch.randn_like(x0)
    config = LossConfig(weighting="snr")
    loss = prediction_loss(output, noised, schedule, process.prediction_type, config)
    sigma = noised.sigma.view(-1, 1, 1, 1)
    score = output if name in ("ve", "ncsn") else -output / sigma  # of x
    expected = (sigma * (score + noise / sigma)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_likelihood_weighting_is_g_squared(name):
    """g^2 / 2 on the error of the score of y = alpha x; and the limit of DDPM's own weights of many steps."""
    process = PROCESSES[name]
    sde, t = process.schedule, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    timestep = sde.timestep(sde.std(t) / sde.alpha(t))
    weight = loss_weight(timestep, sde, "sample", LossConfig(weighting="likelihood"))
    expected = (
        sde.diffusion(t) ** 2 / 2 * (sde.alpha(t) / sde.std(t) ** 2) ** 2
    )  # score of y: (alpha x0 - y) / std^2
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=0)
    h = 1e-5
    snr = [(sde.alpha(each) / sde.std(each)) ** 2 for each in (t - h, t + h)]
    torch.testing.assert_close(weight, (snr[0] - snr[1]) / (2 * h) / 2, rtol=1e-4, atol=0)


def test_bad_settings_get_a_line():
    with pytest.raises(UserError, match="beta_min"):
        VPConfig(beta_min=-1).process()
    with pytest.raises(UserError, match="sigma_min"):
        VEConfig(sigma_min=3, sigma_max=2).process()
    with pytest.raises(UserError, match="steps_per_level"):
        NCSNConfig(step=2).process()
    with pytest.raises(UserError, match="did you mean ve_score"):
        VEConfig(prediction_type="ve_scor").process()
    with pytest.raises(UserError, match="did you mean predictor_corrector"):
        VEConfig().plan(10, "predictor_correcter")
    with pytest.raises(UserError, match="at least 1"):
        VEConfig().plan(0)
    with pytest.raises(UserError, match="at most 100,000"):
        VEConfig().plan(10**11)
    with pytest.raises(UserError, match="100,000 at the most"):
        NCSNConfig(levels=10**11).process()
    with pytest.raises(UserError, match="sigma_max"):
        read_process({"_class_name": "ScoreSdeVeScheduler", "sigma_max": "high"})
    schedule = DDPMConfig().process().schedule
    with pytest.raises(UserError, match="continuous time"):
        loss_weight(torch.tensor([3]), schedule, "epsilon", LossConfig(weighting="likelihood"))
    assert math.isfinite(VEConfig().schedule.first_std)


@pytest.mark.parametrize(
    ("process", "message"),
    [
        *((VPConfig(sampling_eps=eps), "sampling_eps") for eps in (0.0, -1.0, 1.0, 2.0, math.nan)),
        *((VEConfig(sampling_eps=eps), "sampling_eps") for eps in (-1e-9, 1.0, math.nan)),
        (SubVPConfig(sampling_eps=0.0), "sampling_eps"),
        *(
            (each(snr=snr), "snr")
            for each in (VPConfig, SubVPConfig, VEConfig)
            for snr in (0.0, -1.0, math.nan)
        ),
        (VEConfig(correct_steps=-1), "correct_steps"),
        *(
            (each(beta_max=high), "too strong")
            for each in (VPConfig, SubVPConfig)
            for high in (1e3, 1e6, math.inf)
        ),
        *((each(sigma_max=1e30), "too strong") for each in (VEConfig, NCSNConfig)),
    ],
)
def test_settings_that_would_draw_nothing_or_change_nothing_are_refused(process, message):
    with pytest.raises(UserError, match=message):
        process.process()


def test_settings_at_the_edge_of_what_can_be_draw_finite_points():
    edges = (
        VPConfig(beta_max=160.0),
        SubVPConfig(sampling_eps=1e-8),
        VEConfig(sampling_eps=0.0, correct_steps=0),
    )
    for each in edges:
        plan = each.process().plan(3)
        drawn = plan.sample(DATA.denoise, lambda: torch.ones(2, 2, 1, 1))
        assert drawn.isfinite().all()
