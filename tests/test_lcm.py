"""Latent consistency sampling against diffusers' LCMScheduler: its timesteps, its picture, the way from a picture.

The reference is computed in float64 and the noise is the same, as in `test_diffusion_parity`, whose MARGIN holds here.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_diffusion_parity import MARGIN, SEEDS, SHAPE, STABLE, distance, in_float64, network, ours, theirs
from test_pipeline_pictures import picture, psnr, seeded
from tiny import tiny_pipeline_folder
from torch import Tensor

from ldm.diffusion.driver import Noise
from ldm.diffusion.plan import Plan, plan
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.sampling.editing import first_step
from pipelines import TextToImagePipeline

LCM: dict[str, Any] = {**STABLE, "_class_name": "LCMScheduler", "set_alpha_to_one": True}
V = {"prediction_type": "v_prediction"}
PREDICTIONS = [{}, V, {**V, "rescale_betas_zero_snr": True}, {"prediction_type": "sample"}]


def planned(mapping: dict[str, Any], n: int, **names: Any) -> Plan:
    return plan(SchedulerConfig.from_dict(mapping), n, **names)


def timesteps(made: Plan) -> list[float]:
    return made.schedule.timestep(torch.tensor(made.sigmas[:-1], dtype=torch.float64)).tolist()


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=["epsilon", "v", "v zero snr", "sample"])
def test_the_picture_is_diffusers(prediction: dict[str, Any], n: int) -> None:
    assert distance(LCM | prediction, n) < MARGIN


@pytest.mark.parametrize("extra", [{"original_inference_steps": k} for k in (8, 30, 100, 1000)])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_the_steps_that_the_model_knows(extra: dict[str, Any], n: int) -> None:
    """Of 30, the timesteps are 33 apart and begin at 989; 8 of 8 are all of them."""
    scheduler = diffusers.LCMScheduler.from_config(LCM | extra)
    scheduler.set_timesteps(n)
    assert timesteps(planned(LCM | extra, n)) == pytest.approx(scheduler.timesteps.tolist(), abs=1e-6)
    assert distance(LCM | V | extra, n) < MARGIN


@pytest.mark.parametrize(
    "extra",
    [
        {"timestep_scaling": 0.001},  # so that c_skip has a say at all timesteps
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"thresholding": True, "sample_max_value": 2.0},
        {"num_train_timesteps": 500, "original_inference_steps": 20},
        {"set_alpha_to_one": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 4])
def test_the_other_keys(extra: dict[str, Any], n: int) -> None:
    assert distance(LCM | extra, n) < MARGIN


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("n", [3, 7])
def test_a_spacing_that_is_named_is_diffusers_with_these_timesteps(spacing: str, n: int) -> None:
    chosen = [round(each) for each in timesteps(planned(LCM, n, schedule=spacing))]
    assert timesteps(planned(LCM, n, schedule=spacing)) == pytest.approx(chosen, abs=1e-6)
    reference = theirs(diffusers.LCMScheduler.from_config(LCM), n, chosen)
    found = ours(LCM, n, schedule=spacing)
    assert (found - reference).norm() < MARGIN * reference.norm()
    assert (found - ours(LCM, n)).norm() > 0.01 * reference.norm()


def their_picture_from(x0: Tensor, mapping: dict[str, Any], n: int, strength: float) -> Tensor:
    """As StableDiffusionImg2ImgPipeline has it: the last steps of the whole, with noise of the first of them."""
    scheduler = diffusers.LCMScheduler.from_config(mapping)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    noise = torch.cat([torch.randn((1, *SHAPE), generator=each) for each in generators]).double()
    with in_float64(scheduler):
        scheduler.set_timesteps(n)
        begin = max(n - min(int(n * strength), n), 0)
        scheduler.set_begin_index(begin)
        chosen = scheduler.timesteps[begin:]
        x = scheduler.add_noise(x0, noise, chosen[:1])
        for t in chosen:
            x = scheduler.step(network(x, t), t, x, generator=generators).prev_sample
    return x


@pytest.mark.parametrize(("n", "strength"), [(1, 1.0), (4, 0.3), (4, 0.8), (8, 0.5), (8, 1.0)])
@pytest.mark.parametrize("prediction", PREDICTIONS[:3], ids=["epsilon", "v", "v zero snr"])
def test_from_a_picture(prediction: dict[str, Any], n: int, strength: float) -> None:
    x0 = torch.randn((len(SEEDS), *SHAPE), generator=torch.Generator().manual_seed(1)).double()
    reference = their_picture_from(x0, LCM | prediction, n, strength)
    whole = planned(LCM | prediction, n)
    some = whole.part(first_step(whole, strength))
    found = some.sample(some.denoiser(network), Noise(SEEDS, SHAPE), x0=x0).double()
    assert (found - reference).norm() < MARGIN * reference.norm()


@pytest.mark.parametrize(("n", "strength"), [(1, 0.02), (3, 0.5), (4, 0.83), (8, 1.0)])
@pytest.mark.parametrize("original", [50, 30])
def test_the_shorter_way_from_a_picture(n: int, strength: float, original: int) -> None:
    """Of LatentConsistencyModelImg2ImgPipeline: all steps are taken, from a lower timestep."""
    mapping = {**LCM, "original_inference_steps": original}
    scheduler = diffusers.LCMScheduler.from_config(mapping)
    if int(original * strength) < n:
        with pytest.raises(ValueError):
            scheduler.set_timesteps(n, strength=strength)
        with pytest.raises(UserError, match=f"strength {strength} leaves 0 of the {original} steps"):
            planned(mapping, n, strength=strength)
        return
    scheduler.set_timesteps(n, strength=strength)
    found = timesteps(planned(mapping, n, strength=strength))
    assert found == pytest.approx(scheduler.timesteps.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("LatentConsistencyModelImg2ImgPipeline", [(4, 0.5), (1, 0.3), (3, 1.0)]),
        ("StableDiffusionImg2ImgPipeline", [(4, 0.5), (1, 1.0), (8, 0.8)]),
    ],
)
def test_the_picture_from_a_picture_is_that_of_the_class(
    tmp_path: Path, kind: str, cases: list[tuple[int, float]]
) -> None:
    """Rounding in float32 through a U-Net and a decoder is below 1e-5 of a pixel's range: 100 dB."""
    consistent = kind.startswith("Latent")
    told = {"kind": "LatentConsistencyModelPipeline", "time_cond_proj_dim": 32} if consistent else {}
    folder = tiny_pipeline_folder(tmp_path, "sd1", {"_class_name": "LCMScheduler"}, **told)
    reference = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True)
    reference.set_progress_bar_config(disable=True)
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu")
    for n, strength in cases:
        shared: dict[str, Any] = {"image": picture(), "strength": strength, "num_inference_steps": n}
        shared |= {"guidance_scale": 3.0, "output_type": "np"}
        expected = reference("the cat", generator=seeded(3), **shared).images
        assert psnr(pipe("the cat", seed=3, progress=False, **shared).images, expected) > 90


@pytest.mark.parametrize(
    ("extra", "n", "words"),
    [
        ({}, 51, "num_inference_steps 51 is more than original_inference_steps, 50"),
        ({"original_inference_steps": 1001}, 1, "original_inference_steps 1001 is more than"),
    ],
)
def test_what_diffusers_refuses(extra: dict[str, Any], n: int, words: str) -> None:
    with pytest.raises(ValueError):
        diffusers.LCMScheduler.from_config(LCM | extra).set_timesteps(n)
    with pytest.raises(UserError, match=words):
        planned(LCM | extra, n)
