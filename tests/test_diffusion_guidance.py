"""Guidance and the other wrappers: what they call, and what comes out."""

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from ldm.diffusion import consistency, guidance
from ldm.diffusion.denoiser import Denoiser, answered
from ldm.diffusion.driver import sample
from ldm.diffusion.parameterization import x0_from
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.build()
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
SIGMA = SCHEDULE.sigma(torch.tensor([900, 300, 40])).float()


class TwoConditions:
    """A toy network whose first rows of a doubled batch are unconditional; it counts its calls and rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t):
        self.rows.append(len(x))
        cond = torch.sin(2 * x) + t.view(-1, 1, 1, 1) / 1000
        if len(x) == len(X):
            return cond
        return torch.cat([torch.cos(x[: len(X)]), cond[len(X) :]])


def outputs(prediction_type):
    """(uncond, cond) by the network alone."""
    network = TwoConditions()
    denoiser = Denoiser(network, SCHEDULE, prediction_type)
    return answered(denoiser.output(torch.cat([X, X]), torch.cat([SIGMA, SIGMA]))).chunk(2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_equals_diffusers(prediction_type, rescale):
    network = TwoConditions()
    denoise = guidance.classifier_free(Denoiser(network, SCHEDULE, prediction_type), 7.5, rescale)
    uncond, cond = outputs(prediction_type)
    output = uncond + 7.5 * (cond - uncond)
    if rescale:
        output = rescale_noise_cfg(output, cond, rescale)
    assert torch.allclose(answered(denoise(X, SIGMA)), x0_from(prediction_type, output, X, SIGMA), atol=1e-4)
    assert network.rows == [6]  # one call for both


def test_linear_guidance_commutes_with_the_step_to_x0():
    uncond, cond = (x0_from("v_prediction", each, X, SIGMA) for each in outputs("v_prediction"))
    denoise = guidance.classifier_free(Denoiser(TwoConditions(), SCHEDULE, "v_prediction"), 3.0)
    assert torch.allclose(answered(denoise(X, SIGMA)), uncond + 3 * (cond - uncond), atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.0, torch.ones(3)])
def test_no_guidance_runs_no_unconditional_pass(scale):
    network = TwoConditions()
    denoiser = Denoiser(network, SCHEDULE)
    denoise = guidance.classifier_free(denoiser, scale, rescale=0.5)
    assert torch.equal(answered(denoise(X, SIGMA)), answered(denoiser(X, SIGMA)))
    assert network.rows == [3, 3]


def test_scale_of_each_image():
    denoiser = Denoiser(TwoConditions(), SCHEDULE)
    mixed = answered(guidance.classifier_free(denoiser, torch.tensor([1.0, 2.0, 9.0]))(X, SIGMA))
    for k, scale in enumerate((1.0, 2.0, 9.0)):
        alone = answered(guidance.classifier_free(denoiser, scale)(X, SIGMA))
        assert torch.allclose(mixed[k], alone[k], atol=1e-5)


def test_interval():
    network = TwoConditions()
    denoiser = Denoiser(network, SCHEDULE)
    denoise = guidance.classifier_free(denoiser, 5.0, interval=(0.3, 2.0))
    inside = answered(guidance.classifier_free(denoiser, 5.0)(X, SIGMA))
    outside = answered(denoiser(X, SIGMA))
    network.rows.clear()
    assert (SIGMA > 0.3).tolist() == [True, True, False] and (SIGMA <= 2.0).tolist() == [False, True, True]
    result = answered(denoise(X, SIGMA))
    assert torch.allclose(result[1], inside[1])
    assert torch.allclose(result[[0, 2]], outside[[0, 2]], atol=1e-5)
    answered(denoise(X, torch.full((3,), 10.0)))
    assert network.rows == [6, 3]  # outside of it, no unconditional pass


def test_thresholds():
    x0 = torch.randn(2, 3, 8, 8) * torch.tensor([0.1, 4.0]).view(-1, 1, 1, 1)
    clipped = guidance.threshold_x0(x0, 0.9, limit=3.0)
    assert torch.equal(clipped[0], x0[0])  # below 1 it is a plain clip to [-1, 1]
    assert clipped.abs().max() == 1
    bound = min(torch.quantile(x0[1].abs().flatten(), 0.9).item(), 3.0)
    assert torch.allclose(clipped[1], x0[1].clamp(-bound, bound) / bound)
    limited = guidance.limited(lambda x, sigma: x, lambda x: x.clamp(-0.5, 0.5))
    assert answered(limited(x0, torch.ones(2))).abs().max() == 0.5


def test_known_pixels_stay_known():
    known, mask = torch.rand(1, 4, 8, 8), (torch.rand(1, 1, 8, 8) > 0.5).float()
    denoise = guidance.known_pixels(lambda x, sigma: torch.tanh(x), known, mask)
    sigmas = [10.0, 3.0, 1.0, 0.3, 0.0]
    drawn = sample(denoise, SAMPLERS["dpmpp_2m"].solve(known + 10 * X, sigmas, lambda: X))
    outside = (mask == 0).expand_as(drawn)
    assert torch.allclose(drawn[outside], known.expand_as(drawn)[outside])
    free = sample(
        lambda x, sigma: torch.tanh(x), SAMPLERS["dpmpp_2m"].solve(known + 10 * X, sigmas, lambda: X)
    )
    assert torch.allclose(drawn[~outside], free[~outside], atol=1e-6)


def test_consistency_boundary():
    denoise = consistency.latent_boundary(lambda x, sigma: torch.zeros_like(x), SCHEDULE)
    at_zero = answered(denoise(X, torch.full((3,), SCHEDULE.sigma_min)))
    assert torch.allclose(at_zero, X / (1 + SCHEDULE.sigma_min**2) ** 0.5, atol=1e-6)  # f(x, 0) = x
    assert answered(denoise(X, torch.full((3,), SCHEDULE.sigma_max))).abs().max() < 1e-6
