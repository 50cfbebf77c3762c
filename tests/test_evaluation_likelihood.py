"""Likelihoods of pictures under whole systems: closed forms, the arithmetic of the first stage, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.condition import Condition
from ldm.data.pictures import open_pictures
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.evaluation.exact import measure_exact
from ldm.evaluation.likelihood import Estimate, Settings, measure
from ldm.evaluation.likelihood_report import evaluate
from ldm.evaluation.subjects import OnDisk, Shown, TextSubject, open_subject
from ldm.system import System
from tests.tiny import tiny_pipeline_folder

STD = 0.4  # of the Gaussian data's elements


class Gaussian:
    """A subject whose data is Gaussian, and whose network is the best there is."""

    channels, side, variance_type, autoencoder = 2, 3, None, None
    prediction_type, device = "sample", torch.device("cpu")

    def __init__(self) -> None:
        time = torch.arange(1, 301, dtype=torch.float64) / 300
        self.schedule = NoiseSchedule((-0.1 * time - 19.9 / 2 * time**2).exp())

    def condition(self, shown: Shown) -> Condition:
        return Condition(labels=torch.zeros(len(shown.pictures)))

    def bind(self, condition: Condition):
        def network(x, timestep):
            level = self.schedule.sigma(timestep).view(-1, 1, 1, 1) ** 2
            return (x * (1 + level).sqrt() * STD**2 / (STD**2 + level)).to(x.dtype)

        return network

    def __len__(self) -> int:
        return 40

    def read(self, start: int, size: int) -> Shown:
        drawn = torch.randn(40, 2, 3, 3, generator=torch.Generator().manual_seed(1)) * STD
        return Shown(drawn[start : start + size], [""] * size)


def test_the_bound_of_gaussian_data_is_above_their_exact_likelihood():
    subject = Gaussian()
    settings = Settings(levels=None, draws=3, batch=64)
    found = measure(subject, subject, settings)
    exact = measure_exact(subject, subject, settings, found, 8, 2, 1e-6)
    # Exact: of the data under the least noise, whose rows it draws from the pictures' seeds.
    sigma = subject.schedule.sigma_min
    noise = torch.stack([torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(8)])
    noised = (subject.read(0, 8).pictures + sigma * noise).double()
    std = math.sqrt(STD**2 + sigma**2)
    nll = -torch.distributions.Normal(0.0, std).log_prob(noised).flatten(1).mean(1)
    # The chain's last state is not quite N(0, I): 4e-5 of the signal is left.
    torch.testing.assert_close(exact.ode, nll, atol=1e-3, rtol=0)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(std)
    over = found.bound.noised(sigma).view(40, 3).mean(1) + 0.0
    assert over.mean() > entropy - 4.5 * over.std() / math.sqrt(40)
    assert exact.bound.shape == exact.over.shape == (8,)
    assert torch.equal(exact.bound, over[:8])


class Mixed(Gaussian):
    """Estimates that mix the elements: their trace is not what a probe says of it."""

    def bind(self, condition: Condition):
        best, by = (
            super().bind(condition),
            torch.randn(18, 18, generator=torch.Generator().manual_seed(3)) / 5,
        )

        def network(x, timestep):
            found = best(x, timestep)
            return found + 0.3 * (found.flatten(1) @ by).tanh().view(x.shape)

        return network


def test_a_picture_s_exact_likelihood_is_the_same_in_any_batch_and_its_probes_are_its_own():
    subject = Mixed()
    settings = Settings(levels=None, evaluations=2)
    found = measure(subject, subject, settings)
    alone, whole, exact = (
        measure_exact(subject, subject, replace(settings, batch=batch), found, 12, probes, 1e-5)
        for batch, probes in ((1, 2), (12, 2), (12, 200))
    )
    torch.testing.assert_close(alone.ode, whole.ode, rtol=0, atol=1e-3)
    # The mean's error is that of so many independent ones. (With probes in common it was three times that.)
    error = whole.probes.square().mean().sqrt() / math.sqrt(12)
    assert (alone.ode - exact.ode).mean().abs() < 3.5 * error


def test_errors_of_a_mean_tell_pictures_from_noise():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(4000, 1, generator=generator, dtype=torch.float64) * 3
    values = pictures + 2 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    found = Estimate.of(values)
    assert found.error == pytest.approx(math.sqrt((9 + 4 / 5) / 4000), rel=0.05)
    assert found.noise == pytest.approx(2 / math.sqrt(20000), rel=0.05)
    assert Estimate.of(values[:, :1]).noise is None and Estimate.of(values[:1]).error is None


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> System:
    return System.load(tiny_pipeline_folder(tmp_path_factory.mktemp("sd"), "sd1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k, caption in enumerate(("a cat", "the dog", "a cat")):
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(made / f"{k}.png")
        (made / f"{k}.txt").write_text(caption)
    return made


def pictures(folder: Path, subject: TextSubject) -> OnDisk:
    return OnDisk(open_pictures(folder), subject.side)


def test_a_picture_has_the_same_figures_in_any_batch(system, folder):
    subject = TextSubject(system)
    one, whole = (
        measure(subject, pictures(folder, subject), Settings(evaluations=5, draws=2, batch=batch))
        for batch in (1, 24)
    )
    assert one.bound.prior.shape == (6,) and one.first_stage is not None and whole.first_stage is not None
    assert torch.equal(one.bound.timesteps, whole.bound.timesteps)
    torch.testing.assert_close(one.bound.total, whole.bound.total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.first_stage.kl, whole.first_stage.kl, rtol=1e-4, atol=1e-3)


def test_the_first_stage_s_bound_is_that_of_the_paper(system, folder):
    """Kingma & Welling 2013, eq. 3 and app. B, by torch's distributions; the scale is the likeliest."""
    subject, autoencoder = TextSubject(system), system.autoencoder
    shown = pictures(folder, subject).read(0, 3)
    posterior = autoencoder.encode(shown.pictures)
    q = torch.distributions.Normal(posterior.mean.double(), (posterior.logvar.double() / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    unit = 1 / autoencoder.config.scaling_factor
    entropy = (q.entropy() - math.log(unit)).flatten(1).sum(1)
    for observation, kind in (
        ("gaussian", torch.distributions.Normal),
        ("laplace", torch.distributions.Laplace),
    ):
        found = measure(
            subject,
            pictures(folder, subject),
            Settings(evaluations=2, batch=3, observation=observation),
        ).first_stage
        assert found is not None
        torch.testing.assert_close(found.kl, kl.detach(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.entropy, entropy.detach(), rtol=1e-4, atol=1e-3)
        # A picture whose every pixel is as far off as the mean has this likelihood.
        off = found.distance.mean() / found.elements
        off = off.sqrt() if observation == "gaussian" else off
        zero = torch.zeros((), dtype=torch.float64)
        least = -kind(zero, found.scale).log_prob(off) * found.elements
        assert found.reconstruction.mean().item() == pytest.approx(least.item(), rel=1e-9)
        other = found.__class__(found.distance, kl, entropy, found.elements, observation, 1.1 * found.scale)
        assert other.reconstruction.mean() > found.reconstruction.mean()


def test_a_report_is_a_table_a_file_of_figures_and_a_plot(system, folder, tmp_path):
    pytest.importorskip("matplotlib")
    subject = TextSubject(system)
    settings = Settings(evaluations=4, batch=8, draws=2, sample_posterior=True)
    text = evaluate(subject, pictures(folder, subject), tmp_path, settings, ode=1, tolerance=0.1)
    assert "L_0, the decoder's" in text and "in place of N(0, I)" in text and "probability-flow" in text
    found = json.loads((tmp_path / "bound.json").read_text())
    terms = found["bound"]
    parts = terms["L_T"]["mean"] + terms["steps"]["mean"] + terms["L_0"]["mean"]
    assert terms["total"]["mean"] == pytest.approx(parts, rel=1e-9)
    first = found["first_stage"]
    assert first["elbo"]["mean"] == pytest.approx(first["reconstruction"]["mean"] + first["kl"]["mean"])
    assert (tmp_path / "bound.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_measured_is_told_in_a_line(system, folder, tmp_path):
    subject = TextSubject(system)
    with pytest.raises(UserError, match="fixed_small"):
        measure(subject, pictures(folder, subject), Settings(variance="learned_range"))
    for wrong in (
        *(Settings(draws=0), Settings(evaluations=1), Settings(scale=-1.0), Settings(levels=1)),
        *(Settings(draws=10**11), Settings(seed=2**64), Settings(seed=-(10**400)), Settings(scale=math.nan)),
    ):
        with pytest.raises(UserError):
            wrong.check()
    Settings(seed=-(2**62)).check()
    for ode, tolerance in ((-1, 1e-4), (1, math.nan), (1, 0.0), (1, -1.0)):
        with pytest.raises(UserError, match="ODE"):  # before the bound, which takes the time
            evaluate(subject, Gaussian(), tmp_path, Settings(), ode, tolerance)
    with pytest.raises(UserError, match="3 channels"):
        measure(subject, Gaussian(), Settings(evaluations=2))
    with pytest.raises(UserError):
        open_subject(str(tmp_path))
