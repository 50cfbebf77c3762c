"""EDM and consistency models: their scalings, noise levels and losses by the papers, their pictures by diffusers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.condition import Condition
from ldm.diffusion import consistency, parameterization
from ldm.diffusion.edm import EDM, karras_levels
from ldm.diffusion.edm_processes import ConsistencyConfig, EDMConfig
from ldm.diffusion.losses import prediction_loss
from ldm.diffusion.noising import add_noise
from ldm.diffusion.process import read_process
from ldm.errors import UserError
from ldm.models.unet2d import UNet2D
from ldm.models.unet2d_config import UNet2DConfig
from ldm.sampling.plain import draw, prepare
from ldm.system.plain import PlainSystem
from tests.closed_forms import Mixture, assert_moments

TINY = UNet2DConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
)
SIGMA = torch.tensor([0.002, 0.03, 0.5, 4.0, 80.0], dtype=torch.float64)


def tiny(classes: int | None = None) -> UNet2D:
    from dataclasses import replace

    network = UNet2D(replace(TINY, num_class_embeds=classes))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of a range of 2, dB."""
    return 10 * math.log10(4 / (ours.double() - theirs.double()).square().mean().clamp(min=1e-30).item())


def test_scalings_keep_unit_variance_of_what_goes_in_and_out():
    """Karras et al. 2022, app. B.6: c_in and the target have unit variance for data of deviation 0.5."""
    skip, out = parameterization.c_skip_out("edm", SIGMA)
    assert torch.allclose(
        parameterization.c_in("edm", SIGMA) ** 2 * (0.25 + SIGMA**2), torch.ones_like(SIGMA)
    )
    # target = ((1 - skip) x0 - skip sigma noise) / out
    assert torch.allclose(((1 - skip) ** 2 * 0.25 + (skip * SIGMA) ** 2) / out**2, torch.ones_like(SIGMA))


def test_a_consistency_function_is_the_identity_at_its_boundary():
    """Song et al. 2023, eq. 5 and app. C."""
    skip, out = parameterization.c_skip_out("consistency", SIGMA)
    assert skip[0] == 1 and out[0] == 0
    above = SIGMA - 0.002
    assert torch.allclose(skip, 0.25 / (above**2 + 0.25))
    assert torch.allclose(out, 0.5 * above / (SIGMA**2 + 0.25).sqrt())


def test_edm_weighs_its_error_as_the_paper():
    """lambda(sigma) |D(x) - x0|^2 with lambda = (sigma^2 + 0.25) / (0.5 sigma)^2 (Karras et al. 2022, table 1)."""
    schedule, x0, noise = EDM(), torch.randn(5, 1, 2, 2).double(), torch.randn(5, 1, 2, 2).double()
    noised = add_noise(x0, noise, schedule.timestep(SIGMA), schedule)
    output = torch.randn(5, 1, 2, 2)
    level = SIGMA.view(-1, 1, 1, 1).float()
    d = 0.25 / (level**2 + 0.25) * noised.x + level * 0.5 / (level**2 + 0.25).sqrt() * output
    weight = (SIGMA**2 + 0.25) / (0.5 * SIGMA) ** 2
    expected = weight * (d - noised.x0).double().square().flatten(1).mean(1)
    found = prediction_loss(output, noised, schedule, "edm")
    # At 0.002 D - x0 is a difference of numbers of size 1: float32's 6e-8 of its 1e-3, twice.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_levels_and_what_a_network_is_told():
    schedule = EDM()
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(torch.tensor(schedule.sigmas(18), dtype=torch.float64)[:-1], expected)
    assert schedule.sigmas(18)[-1] == 0 and schedule.sigmas(1) == [pytest.approx(80), 0]
    assert torch.allclose(schedule.timestep(SIGMA), SIGMA.log() / 4)
    thousand = EDM(scale=1000)
    assert torch.allclose(thousand.sigma(thousand.timestep(SIGMA)), SIGMA)
    assert torch.allclose(consistency.levels(18), expected.flip(0))
    assert torch.allclose(karras_levels(1, 3, torch.tensor([0.5]), rho=1), torch.tensor([2.0]))


def test_training_draws_a_normal_logarithm():
    shares = torch.arange(2**16) / 2**16
    drawn = EDM().sigma(EDM().draw(shares)).log()
    assert drawn.isfinite().all() and (drawn.diff() > 0).all()
    # The mean of quantiles at even shares: short of the normal by its outermost 2^-16.
    assert abs(drawn.mean() + 1.2) < 1e-3 and abs(drawn.std() - 1.2) < 2e-3
    assert abs(drawn[2**15] + 1.2) < 1e-4


@pytest.mark.parametrize("sampler", [None, "heun", "dpmpp_2m", "ddpm"])
def test_edm_draws_the_data(sampler: str | None):
    data = Mixture.gaussian(torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.4]]))
    torch.manual_seed(0)
    x = EDMConfig().plan(250, sampler).sample(data.denoise, lambda: torch.randn(3000, 2, 1, 1))
    assert_moments(x, data, bias=0.05)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("clip", [True, False])
@torch.no_grad()
def test_pictures_of_consistency_models_are_diffusers(
    tmp_path: Path, classes: int | None, clip: bool
) -> None:
    """Saved by us, drawn by diffusers, saved by diffusers, drawn by us: 1, 2, 4 steps and all, from the same noise."""
    import diffusers

    process = ConsistencyConfig(num_train_timesteps=18, clip_denoised=clip)
    PlainSystem(tiny(classes), process, labels=list("abcd") if classes else []).save(tmp_path / "ours")
    theirs = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs.scheduler, diffusers.CMStochasticIterativeScheduler)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    told = Condition(labels=torch.tensor([2])) if classes else Condition()
    for folder in ("ours", "theirs"):
        system = PlainSystem.load(tmp_path / folder)
        for steps in (1, 2, 4, 7, 18):
            generator = torch.Generator().manual_seed(5)
            drawn = theirs(
                num_inference_steps=steps,
                generator=generator,
                class_labels=2 if classes else None,
                output_type="pt",
            )[0]
            assert ((drawn > 0) & (drawn < 1)).float().mean() > 0.3  # something to compare
            ours = draw(system, prepare(system, system.process.plan(steps), told, [5]))
            assert psnr((ours / 2 + 0.5).clamp(0, 1) * 2, drawn * 2) > 80, steps


@torch.no_grad()
def test_pictures_of_edm_are_diffusers_scheduler(tmp_path: Path) -> None:
    import diffusers

    made = PlainSystem(tiny(), EDMConfig())
    made.save(tmp_path)
    system = PlainSystem.load(tmp_path)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    for steps in (1, 2, 7, 18):
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample
        ours = draw(system, prepare(system, system.process.plan(steps), Condition(), [5]))
        assert psnr(ours / x.abs().max(), x / x.abs().max()) > 80, steps


def test_on_disk_and_back() -> None:
    import diffusers

    own = EDMConfig(timestep_scale=1000), ConsistencyConfig(timestep_scale=1)
    for config in (EDMConfig(p_mean=-0.8, rho=5), ConsistencyConfig(), *own):
        assert read_process(config.to_dict()) == config
    theirs: Any = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=201, clip_denoised=False)
    found = read_process({"_class_name": "CMStochasticIterativeScheduler", **theirs.config})
    assert found == ConsistencyConfig(num_train_timesteps=201, clip_denoised=False)
    # What diffusers' class would tell otherwise is not written as its class.
    for config in own:
        assert not hasattr(diffusers, config.to_dict()["_class_name"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, "sigma_data"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "prediction_type"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"}, "sigma_schedule"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90}, "sigma_min"),
        ({"_class_name": "EDMEulerScheduler", "rho": 0}, "rho"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 0.01}, "boundary"),
        ({"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 1}, "num_train_timesteps"),
    ],
)
def test_files_of_other_values_get_a_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_process(given)


def test_plans_that_a_consistency_model_has_not() -> None:
    with pytest.raises(UserError, match="none of a consistency model"):
        ConsistencyConfig().plan(2, "heun")
    with pytest.raises(UserError, match="between 1 and 40"):
        ConsistencyConfig().plan(41)
