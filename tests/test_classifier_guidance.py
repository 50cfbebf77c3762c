"""Guidance by a classifier's gradient: the paper's two algorithms step by step, and closed forms of Gaussians."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion import driver
from ldm.diffusion.classifier_guidance import LogLikelihood, by_mean, by_score, gradient
from ldm.diffusion.denoiser import Denoise, Denoiser, answered, awaited
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.parameterization import per_image, unit_variance
from ldm.diffusion.samplers import SAMPLERS, Variance
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.classifier import ClassifierConfig, NoisyClassifier
from ldm.models.unet2d import UNet2D
from ldm.models.unet2d_config import UNet2DConfig

LEVELS = [900, 700, 500, 300, 100, 0]  # timesteps of a respaced chain
SCALE = 2.5
LABELS = torch.tensor([0, 2])


def noisy(module: nn.Module) -> nn.Module:
    """Random weights everywhere, in float64, so that a formula is told from another by more than rounding."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.double().eval()


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """A network that predicts noise and a variance, and a classifier."""
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    down = ("DownBlock2D", "AttnDownBlock2D")
    unet = UNet2DConfig(
        in_channels=2,
        out_channels=4,
        down_block_types=down,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )
    classifier = ClassifierConfig(8, 2, 3, attention_head_dim=8, down_block_types=down, **blocks)
    return noisy(UNet2D(unet)), noisy(NoisyClassifier(classifier))


SCHEDULE = NoiseSchedule.build("linear", 1e-4, 0.02)


def log_p(classifier: nn.Module, labels: Tensor) -> LogLikelihood:
    def of(x: Tensor, sigma: Tensor) -> Tensor:
        logits = classifier(x * per_image(unit_variance(sigma), x), SCHEDULE.timestep(sigma))
        return logits.log_softmax(1)[torch.arange(len(labels)), labels]

    return of


# The paper, in its own coordinates: x_t of unit variance, alpha_bar_t


def paper_gradient(classifier: nn.Module, x_t: Tensor, t: int) -> Tensor:
    with torch.enable_grad():
        at = x_t.clone().requires_grad_()
        logits = classifier(at, torch.full((len(at),), t))
        chosen = logits.log_softmax(1)[torch.arange(len(at)), LABELS].sum()
        return torch.autograd.grad(chosen, at)[0]


def paper_mean_step(
    unet: nn.Module, classifier: nn.Module, x: Tensor, t: int, to: int, variance: str, z: Tensor
):
    """Algorithm 1: x_{t-1} ~ N(mu + s Sigma grad log p(y | x_t), Sigma), with beta of the whole way from t to `to`."""
    here, before = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[to]
    alpha = here / before
    beta = 1 - alpha
    epsilon, v = unet(x, torch.full((len(x),), t), Condition()).chunk(2, dim=1)
    x0 = (x - (1 - here).sqrt() * epsilon) / here.sqrt()
    mean = before.sqrt() * beta / (1 - here) * x0 + alpha.sqrt() * (1 - before) / (1 - here) * x
    small = beta * (1 - before) / (1 - here)
    share = (v + 1) / 2
    sigma = {
        "fixed_small": small,
        "fixed_large": beta,
        "learned_range": (
            share * beta.log() + (1 - share) * small.log()
        ).exp(),  # Nichol & Dhariwal 2021, eq. 15
    }[variance]
    return mean + SCALE * sigma * paper_gradient(classifier, x, t) + sigma.sqrt() * z


def paper_score_step(unet: nn.Module, classifier: nn.Module, x: Tensor, t: int, to: int) -> Tensor:
    """Algorithm 2: DDIM with eps - sqrt(1 - alpha_bar) s grad log p(y | x_t)."""
    here, before = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[to]
    epsilon = unet(x, torch.full((len(x),), t), Condition()).chunk(2, dim=1)[0]
    epsilon = epsilon - (1 - here).sqrt() * SCALE * paper_gradient(classifier, x, t)
    x0 = (x - (1 - here).sqrt() * epsilon) / here.sqrt()
    return before.sqrt() * x0 + (1 - before).sqrt() * epsilon


def ours(networks: tuple[nn.Module, nn.Module], learned: bool) -> tuple[Denoiser, LogLikelihood]:
    unet, classifier = networks
    denoiser = Denoiser(lambda x, t: unet(x, t, Condition()), SCHEDULE, "epsilon", learned_variance=learned)
    return denoiser, log_p(classifier, LABELS)


def chain(step: Callable[[Tensor, int, int, Tensor], Tensor], x: Tensor, noises: list[Tensor]) -> Tensor:
    for t, to, z in zip(LEVELS, LEVELS[1:], noises, strict=False):
        x = step(x, t, to, z)
    return x


def drawn() -> tuple[list[float], Tensor, list[Tensor]]:
    sigmas = SCHEDULE.sigma(torch.tensor(LEVELS)).tolist()
    torch.manual_seed(0)
    x, *noises = torch.randn(len(LEVELS), 2, 2, 8, 8, dtype=torch.float64)
    return sigmas, x, noises


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@torch.no_grad()
def test_the_mean_form_is_algorithm_1(networks, variance: Variance) -> None:
    denoiser, likelihood = ours(networks, variance == "learned_range")
    sigmas, x, noises = drawn()
    expected = chain(lambda *a: paper_mean_step(*networks, *a[:3], variance, a[3]), x, noises)
    plain = chain(
        lambda *a: paper_mean_step(
            networks[0], lambda x, t: 0 * x.sum((2, 3)).repeat(1, 2), *a[:3], variance, a[3]
        ),
        x,
        noises,
    )
    denoise = by_mean(denoiser, likelihood, sigmas, SCALE, variance)
    coming = iter(noises)
    steps = SAMPLERS["ddpm"].solve(
        x * math.sqrt(1 + sigmas[0] ** 2), sigmas, lambda: next(coming), variance=variance
    )
    found = driver.sample(denoise, steps) / math.sqrt(1 + sigmas[-1] ** 2)
    # float64, but for timesteps and the schedule's inverse in float32
    assert float((found - expected).abs().max()) < 1e-5 < 1e-2 < float((plain - expected).abs().max())


@torch.no_grad()
def test_the_score_form_is_algorithm_2(networks) -> None:
    denoiser, likelihood = ours(networks, False)
    sigmas, x, noises = drawn()
    expected = chain(lambda *a: paper_score_step(*networks, *a[:3]), x, noises)
    denoise = by_score(denoiser, likelihood, SCALE)
    steps = SAMPLERS["ddim"].solve(x * math.sqrt(1 + sigmas[0] ** 2), sigmas, lambda: x)
    found = driver.sample(denoise, steps) / math.sqrt(1 + sigmas[-1] ** 2)
    unguided = SAMPLERS["ddim"].solve(x * math.sqrt(1 + sigmas[0] ** 2), sigmas, lambda: x)
    plain = driver.sample(denoiser, unguided) / math.sqrt(1 + sigmas[-1] ** 2)
    assert float((found - expected).abs().max()) < 1e-5 < 1e-2 < float((plain - expected).abs().max())


def test_gradients_are_there_without_gradients_and_in_inference_mode(networks) -> None:
    denoiser, likelihood = ours(networks, False)
    guided = by_score(denoiser, likelihood, SCALE)
    x, sigma = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        expected = answered(awaited(guided(x, sigma)))
        assert not torch.is_grad_enabled() and not expected.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(answered(awaited(guided(x.clone(), sigma.clone()))), expected)
    assert not torch.allclose(expected, answered(denoiser(x, sigma)).detach(), atol=1e-3)


@torch.no_grad()
def test_rows_have_scales_of_their_own_and_an_interval_holds_guidance_off(networks) -> None:
    denoiser, likelihood = ours(networks, False)
    x, sigma = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    plain = answered(denoiser(x, sigma))
    full = answered(awaited(by_score(denoiser, likelihood, SCALE)(x, sigma)))
    for options in ({"scale": torch.tensor([0.0, SCALE])}, {"scale": SCALE, "interval": (1.0, 3.0)}):
        for wrap in (by_score, lambda d, p, **o: by_mean(d, p, [3.0, 2.9, 1.0, 0.5], **o)):
            found = answered(awaited(wrap(denoiser, likelihood, **options)(x, sigma)))
            assert torch.equal(found[0], plain[0]) and not torch.allclose(found[1], plain[1], atol=1e-3)
    half = answered(awaited(by_score(denoiser, likelihood, SCALE / 2)(x, sigma)))
    torch.testing.assert_close(half - plain, (full - plain) / 2)
    none = by_mean(denoiser, likelihood, [3.0, 0.0], SCALE)
    assert torch.equal(answered(awaited(none(x, sigma))), plain)  # the last step has no variance


@torch.no_grad()
def test_it_goes_around_classifier_free_guidance(networks) -> None:
    """Each adds its own: x0 of the one, and the other's shift, which does not depend on it."""
    unet, _ = networks
    denoiser = Denoiser(
        lambda x, t: unet(x, t, Condition()) * torch.linspace(1, 2, len(x))[:, None, None, None], SCHEDULE
    )
    likelihood = ours(networks, False)[1]
    x, sigma = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    free = classifier_free(denoiser, 4.0)
    both = answered(awaited(by_score(free, likelihood, SCALE)(x, sigma)))
    shift = per_image(SCALE * sigma**2, x) * gradient(likelihood, x, sigma)
    torch.testing.assert_close(both, answered(awaited(free(x, sigma))) + shift)


# Closed forms: a mixture of two Gaussians in two dimensions, with the exact denoiser and the exact classifier

MEANS = torch.tensor([[-1.0, 0.5], [1.5, -0.5]], dtype=torch.float64)
SPREAD = torch.tensor([0.4, 0.7], dtype=torch.float64)
WEIGHTS = torch.tensor([0.7, 0.3], dtype=torch.float64)


def class_logits(x: Tensor, sigma: Tensor) -> Tensor:
    """log p(y) + log p(x | y) of points (B, 2, 1, 1)."""
    variance = SPREAD**2 + sigma[:, None] ** 2  # (B, 2)
    squared = (x.flatten(1)[:, None] - MEANS).square().sum(2)
    return WEIGHTS.log() - variance.log() - squared / (2 * variance)


def of_class(y: Tensor) -> Denoise:
    """E[x0 | x, y] of classes y (B,)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        mean, variance = MEANS[y].view(-1, 2, 1, 1), SPREAD[y] ** 2
        return mean + (x - mean) * per_image(variance / (variance + sigma**2), x)

    return denoise


def of_all(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x]."""
    shares = class_logits(x, sigma).softmax(1)
    one, other = (answered(awaited(of_class(torch.full((len(x),), k))(x, sigma))) for k in (0, 1))
    return per_image(shares[:, 0], x) * one + per_image(shares[:, 1], x) * other


def of_labels(y: Tensor) -> LogLikelihood:
    return lambda x, sigma: class_logits(x, sigma).log_softmax(1).gather(1, y[:, None])[:, 0]


def test_the_exact_classifier_makes_the_exact_conditional_denoiser() -> None:
    torch.manual_seed(0)
    x, sigma = 3 * torch.randn(50, 2, 1, 1, dtype=torch.float64), torch.linspace(0.01, 30, 50).double()
    y = torch.arange(50) % 2
    found = answered(awaited(by_score(of_all, of_labels(y))(x, sigma)))
    torch.testing.assert_close(found, of_class(y)(x, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["score", "mean"])
@torch.no_grad()
def test_guided_points_have_the_moments_of_their_class(form: str) -> None:
    """From the unconditional model, at scale 1: within five standard errors and what the steps' length costs.

    DDPM's steps err by a part of their beta, which is 0.08 at the most.
    """
    torch.manual_seed(0)
    count = 1500
    y = torch.arange(2 * count) // count
    noise = lambda: torch.randn(2 * count, 2, 1, 1, dtype=torch.float64)  # noqa: E731
    if form == "score":
        levels = (80 ** (1 / 7) + torch.linspace(0, 1, 60).double() * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        sigmas, name, denoise = [*levels.tolist(), 0.0], "heun", by_score(of_all, of_labels(y))
    else:
        schedule = NoiseSchedule.build("linear", 4e-4, 0.08, 250)
        sigmas, name = [*schedule.sigmas.flip(0).tolist(), 0.0], "ddpm"
        denoise = by_mean(of_all, of_labels(y), sigmas)
    drawn = driver.sample(denoise, SAMPLERS[name].solve(noise() * sigmas[0], sigmas, noise)).flatten(1)
    for k, points in enumerate(drawn.split(count)):
        error = SPREAD[k].item() / math.sqrt(count)
        torch.testing.assert_close(points.mean(0), MEANS[k], rtol=0, atol=5 * error + 0.04)
        spread = SPREAD[k].expand(2)
        torch.testing.assert_close(points.std(0), spread, rtol=0, atol=5 * error / math.sqrt(2) + 0.04)
        assert abs(float(torch.corrcoef(points.T)[0, 1])) < 5 / math.sqrt(count)
