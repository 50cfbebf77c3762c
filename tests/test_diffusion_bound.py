"""The variational bound: the papers' formulas in float64, the authors' code where it is installed, and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr
from scipy.stats import norm

from ldm.diffusion.bound import LN2, Bound, bound_terms, prior_term, variational_bound
from ldm.diffusion.decoder import log_likelihood
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.driver import Noise
from ldm.diffusion.guidance import limited
from ldm.diffusion.losses import LossConfig, prediction_loss
from ldm.diffusion.noising import add_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.training.data.arrays import DigitsConfig
from ldm.training.data.on_disk import PicturesConfig
from ldm.training.objectives import diffusion, text_to_image

STEPS = 30
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


# The decoder of pixels


def levels() -> np.ndarray:
    """The 256 values of a pixel of 8 bits, in [-1, 1], as pictures come."""
    return np.arange(256) / 127.5 - 1


@pytest.mark.parametrize("mean,deviation", [(0.1, 0.5), (-1.2, 0.02), (0.998, 1e-4), (0.0, 30.0)])
@pytest.mark.parametrize("decoder", ["discretized", "discretized_tanh"])
@pytest.mark.parametrize("count", [256, 17])
def test_the_decoder_of_pixels_is_a_distribution_over_their_levels(mean, deviation, decoder, count):
    x0 = torch.linspace(-1, 1, count)
    log_variance = torch.tensor(2 * math.log(deviation))
    found = log_likelihood(x0, torch.tensor(mean).expand(count), log_variance, decoder, count)
    # The approximation has each level's probability at 1e-12 or above.
    assert found.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("decoder", ["discretized", "discretized_tanh"])
@pytest.mark.parametrize("count", [2, 4096, 65536])
def test_pixels_of_more_bits_or_fewer_have_two_levels_that_reach_to_infinity(decoder, count):
    x0 = torch.linspace(-1, 1, count, dtype=torch.float64)
    mean, log_variance = torch.tensor([0.9, 2 * math.log(0.05)], dtype=torch.float64)
    found = log_likelihood(x0, mean.expand(count), log_variance, decoder, count)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_decoder_of_pixels_is_the_integral_of_the_paper():
    """Ho et al. 2020, eq. 13: from half a level below to half above, to infinity at both ends; by scipy, in float64."""
    means, deviations = np.meshgrid(np.linspace(-1.1, 1.1, 12), [1e-3, 0.01, 0.05, 0.3, 2.0])
    x0 = levels()[:, None, None]
    below = np.where(x0 == -1, -np.inf, (x0 - 1 / 255 - means) / deviations)
    above = np.where(x0 == 1, np.inf, (x0 + 1 / 255 - means) / deviations)
    with np.errstate(divide="ignore"):  # a level far away has no probability in this form
        direct = np.log(norm.cdf(above) - norm.cdf(below))
    shape = (256, *means.shape)
    arguments = (
        torch.from_numpy(each.copy()) for each in np.broadcast_arrays(x0, means, 2 * np.log(deviations))
    )
    found = log_likelihood(*arguments, "discretized").numpy()
    assert found.shape == shape and np.isfinite(found).all()
    near = direct > -15  # the subtraction in float64 has 9 digits left there
    assert near.mean() > 0.2
    np.testing.assert_allclose(found[near], direct[near], rtol=1e-8, atol=1e-8)
    # Far away the level's inner border says it all.
    inner = -np.minimum(np.abs(below), np.abs(above))
    far = (inner < -30) & (deviations < 0.005) & ((below > 0) | (above < 0))
    assert far.any()
    np.testing.assert_allclose(found[far], log_ndtr(inner)[far], rtol=1e-6)


def test_the_approximated_decoder_is_near_the_exact_one_and_gradients_are_finite():
    x0 = torch.from_numpy(levels()).float()
    mean = torch.zeros(256, requires_grad=True)
    log_variance = torch.full((256,), -9.0, requires_grad=True)  # what is learned may be narrow
    exact = log_likelihood(x0, mean, log_variance, "discretized")
    gradients = torch.autograd.grad(exact.sum(), [mean, log_variance])
    assert all(bool(each.isfinite().all()) for each in gradients)
    wide = torch.full((256,), -2.0)
    exact, close = (log_likelihood(x0, mean.detach(), wide, f"discretized{end}") for end in ("", "_tanh"))
    assert 1e-5 < (exact - close).abs().mean() < 1e-2  # two things, if near each other


# The loop over all timesteps, as the papers have it


class Network(torch.nn.Module):
    """A small network of pictures and timesteps, in the precision of what it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.into, self.out = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        told = (timestep.to(x.dtype) / STEPS).view(-1, 1, 1, 1)
        return self.out(torch.sin(self.into(x) + told))


class Taped(Noise):
    """Noise that keeps what it drew."""

    def __call__(self) -> torch.Tensor:
        drawn = super().__call__()
        self.tape = [*getattr(self, "tape", []), drawn]
        return drawn


def pictures(count: int = 3) -> torch.Tensor:
    whole = torch.randint(256, (count, 3, 6, 6), generator=torch.Generator().manual_seed(5))
    whole[0, 0, 0, :2] = torch.tensor([0, 255])
    return whole / 127.5 - 1


def schedule_of(steps: int = STEPS) -> NoiseSchedule:
    return NoiseSchedule.build("linear", 0.1 / steps, 20 / steps, steps)


def written_out(x0, noise, network, variance, clip, decoder, schedule):
    """The whole bound in float64, from betas on: Ho et al. 2020, eq. 5-8 and 13; Nichol & Dhariwal 2021, eq. 15."""
    alpha_bars = schedule.alphas_cumprod.tolist()
    flat, terms, x0_errors, eps_errors = (1, 2, 3), [], [], []
    for t in range(len(alpha_bars)):
        alpha_bar, before = alpha_bars[t], alpha_bars[t - 1] if t else 1.0
        beta = 1 - alpha_bar / before
        second = (1 - alpha_bars[1] / alpha_bars[0]) * (1 - alpha_bars[0]) / (1 - alpha_bars[1])
        tilde = beta * (1 - before) / (1 - alpha_bar) if t else second
        x = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise[t]
        output = network(x, torch.full((len(x0),), t))
        eps = output[:, :3]
        found = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
        found = found.clamp(-1, 1) if clip else found
        share = (output[:, 3:] + 1) / 2
        if variance == "learned_range":
            log_variance = share * math.log(beta) + (1 - share) * math.log(tilde)
        else:
            fixed = beta if variance == "fixed_large" and t else tilde
            log_variance = torch.full_like(x, math.log(fixed))

        def mean(clean, b=beta, p=before, a=alpha_bar, x=x):
            return (math.sqrt(p) * b * clean + math.sqrt(a / p) * (1 - p) * x) / (1 - a)

        if t:
            one = torch.distributions.Normal(mean(x0), torch.full_like(x, math.sqrt(tilde)))
            other = torch.distributions.Normal(mean(found), (log_variance / 2).exp())
            term = torch.distributions.kl_divergence(one, other)
        elif decoder == "gaussian":
            term = -torch.distributions.Normal(mean(found), (log_variance / 2).exp()).log_prob(x0)
        else:
            scale = (-log_variance / 2).exp()
            ends = [(scale * (x0 + side / 255 - mean(found))).numpy() for side in (-1, 1)]
            if decoder == "discretized":
                low, high = norm.cdf(ends[0]), norm.cdf(ends[1])
            else:
                low, high = (0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)) for z in ends)
            low, high = np.where(x0 == -1, 0, low), np.where(x0 == 1, 1, high)
            term = -torch.from_numpy(np.log(high - low))
        terms.append(term.mean(flat))
        x0_errors.append((found - x0).square().mean(flat))
        back = (x / math.sqrt(alpha_bar) - found) / math.sqrt(
            1 / alpha_bar - 1
        )  # the noise that found stands for
        eps_errors.append((back - noise[t]).square().mean(flat))
    last = alpha_bars[-1]
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(math.sqrt(last) * x0, math.sqrt(1 - last)),
        torch.distributions.Normal(torch.zeros_like(x0), 1.0),
    )
    return prior.mean(flat), *(torch.stack(each, 1) for each in (terms, x0_errors, eps_errors))


@torch.no_grad()
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    "decoder,clip", [("gaussian", False), ("discretized", True), ("discretized_tanh", True)]
)
def test_the_bound_is_that_of_the_papers_written_out(variance, decoder, clip):
    network, schedule = Network(6 if variance == "learned_range" else 3), schedule_of()
    denoise = Denoiser(network, schedule, learned_variance=variance == "learned_range")
    denoise = limited(denoise, lambda x0: x0.clamp(-1, 1)) if clip else denoise
    x0, noise = pictures(), Taped([1, 2, 3], (3, 6, 6))
    found = variational_bound(denoise, x0, schedule, noise, variance, decoder, together=7)
    double = [each.double() for each in noise.tape]
    prior, terms, x0_mse, eps_mse = written_out(
        x0.double(), double, network.double(), variance, clip, decoder, schedule
    )
    assert found.timesteps.tolist() == [list(range(STEPS))] * 3
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.prior, prior, **close)
    torch.testing.assert_close(found.terms, terms, **close)
    torch.testing.assert_close(found.x0_mse, x0_mse, **close)
    torch.testing.assert_close(found.eps_mse, eps_mse, **close)
    torch.testing.assert_close(found.total, prior + terms.sum(1), **close)


@torch.no_grad()
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_bound_equals_the_authors_code(variance, monkeypatch):
    """calc_bpd_loop of OpenAI's guided-diffusion, which PyPI has as guided-diffusion-sdk 1.0.0; skipped without it."""
    theirs = pytest.importorskip("guided_diffusion.gaussian_diffusion")
    schedule, learned = schedule_of(), variance == "learned_range"
    network = Network(6 if learned else 3)
    diffusion = theirs.GaussianDiffusion(
        betas=np.linspace(0.1 / STEPS, 20 / STEPS, STEPS),
        model_mean_type=theirs.ModelMeanType.EPSILON,
        model_var_type=theirs.ModelVarType[variance.upper()],
        loss_type=theirs.LossType.RESCALED_MSE,
    )
    x0, noise = pictures(), Taped([1, 2, 3], (3, 6, 6))
    denoise = limited(Denoiser(network, schedule, learned_variance=learned), lambda found: found.clamp(-1, 1))
    ours = variational_bound(denoise, x0, schedule, noise, variance, "discretized_tanh")
    drawn = iter(noise.tape[::-1])  # it goes from the last timestep to the first
    monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
    reference = diffusion.calc_bpd_loop(network, x0, clip_denoised=True)
    pairs = {
        "total_bpd": ours.total / LN2,
        "prior_bpd": ours.prior / LN2,
        "vb": ours.terms.flip(1) / LN2,
        "xstart_mse": ours.x0_mse.flip(1),
        "mse": ours.eps_mse.flip(1),
    }
    for name, figure in pairs.items():
        torch.testing.assert_close(figure, reference[name].double(), rtol=1e-5, atol=1e-5)
    if learned:
        timestep = torch.tensor([0, 7, STEPS - 1])
        their_loss = diffusion.training_losses(network, x0, timestep, noise=noise.tape[0])["loss"]
        noised = add_noise(x0, noise.tape[0], timestep, schedule)
        config = LossConfig(variance=True, decoder="discretized_tanh")
        our_loss = prediction_loss(
            network(noised.sample("epsilon"), timestep), noised, schedule, "epsilon", config
        )
        torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_hybrid_loss_holds_the_decoder_of_its_data():
    """Nichol & Dhariwal 2021, eq. 16: the squared error of the noise, and 0.001 of the bound in bits, of T terms."""
    schedule, network, x0 = schedule_of(), Network(6).double(), pictures(1).double()
    noise = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    _, terms, _, eps_mse = written_out(
        x0, [noise] * STEPS, network, "learned_range", False, "discretized", schedule
    )
    for t in (0, 11):
        noised = add_noise(x0, noise, torch.tensor([t]), schedule)
        output = network.float()(noised.sample("epsilon"), noised.timestep)
        loss = prediction_loss(
            output, noised, schedule, config=LossConfig(variance=True, decoder="discretized")
        )
        expected = eps_mse[0, t] + 0.001 * STEPS * terms[0, t] / LN2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# Closed forms: of Gaussian data the best denoiser is known, and the whole reverse chain


DEVIATIONS = torch.tensor([0.05, 0.4, 0.9, 1.0], dtype=torch.float64).view(
    1, 4, 1, 1
)  # of the data's coordinates


def gaussian_denoise(schedule, true_variance=False):
    """The posterior mean of N(0, DEVIATIONS^2), and the true variance of its reverse steps, as a learned one."""

    def denoise(x, sigma):
        level, data = sigma.double().view(-1, 1, 1, 1) ** 2, DEVIATIONS**2
        found = x * (data / (data + level))
        if not true_variance:
            return found
        timestep = schedule.timestep(sigma).long()
        alpha_bar = schedule.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        before = torch.where(timestep > 0, schedule.alphas_cumprod[timestep - 1], 1.0).view(-1, 1, 1, 1)
        beta = 1 - alpha_bar / before
        # x_{t-1} given x_t, both Gaussian: conditioning of a pair (alpha = alpha_bar / before).
        here, there = alpha_bar * data + 1 - alpha_bar, before * data + 1 - before
        true = there - (alpha_bar / before) * there**2 / here
        first, second = schedule.alphas_cumprod[:2].tolist()
        low = beta * (1 - before) / (1 - alpha_bar)
        low = torch.where(low > 0, low, (1 - second / first) * (1 - first) / (1 - second))
        share = (true.log() - low.log()) / (beta.log() - low.log())
        return torch.cat([found, (2 * share - 1).expand_as(found)], 1)

    return denoise


def entropy() -> float:
    """Of the data, nats an element: what no model's bound can be below on average."""
    return float((0.5 * math.log(2 * math.pi * math.e) + DEVIATIONS.log()).mean())


def prior_gap(schedule) -> float:
    """KL(q(x_T) || N(0, I)), nats an element: all that a true reverse chain leaves between the bound and the data."""
    variance = 1 + schedule.alphas_cumprod[-1] * (DEVIATIONS**2 - 1)
    return float(0.5 * (variance - 1 - variance.log()).mean())


def prior_mean(schedule) -> float:
    """L_T over all data."""
    alpha_bar = schedule.alphas_cumprod[-1]
    return float((0.5 * (alpha_bar * DEVIATIONS**2 - alpha_bar - torch.log1p(-alpha_bar))).mean())


def expected_terms(schedule, variance) -> torch.Tensor:
    """The terms over all data of the exact denoiser, whose error of x0 has the posterior's variance v: (T,)."""
    sigma2 = schedule.sigmas.view(-1, 1) ** 2
    v = (DEVIATIONS.view(1, -1) ** 2 * sigma2) / (DEVIATIONS.view(1, -1) ** 2 + sigma2)
    alpha_bar = schedule.alphas_cumprod.view(-1, 1)
    before = torch.cat([torch.ones(1, 1), alpha_bar[:-1]])
    beta, snr = 1 - alpha_bar / before, alpha_bar / (1 - alpha_bar)
    tilde = beta * (1 - before) / (1 - alpha_bar)
    tilde[0] = tilde[1]
    large = torch.cat([tilde[:1], beta[1:]])
    model = {"fixed_small": tilde, "fixed_large": large, "beta": beta}[variance]
    likelihood = 0.5 * ((2 * math.pi * model[:1]).log() + v[:1] / model[:1])
    # (SNR(t-1) - SNR(t)) v / 2, Kingma et al. 2021, where the variances are the same.
    error = (snr[:-1] - snr[1:]) * v[1:] * (tilde / model)[1:]
    divergence = 0.5 * (error + (tilde / model)[1:] - 1 - (tilde / model)[1:].log())
    return torch.cat([likelihood, divergence.expand(-1, 4)]).mean(1)


def drawn(rows: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return DEVIATIONS * torch.randn(rows, 4, 4, 4, generator=generator, dtype=torch.float64)


def within(values: torch.Tensor, expected: float, errors: float = 4.5) -> bool:
    """Whether a mean over rows is as expected, within so many of its standard errors."""
    return abs(values.mean().item() - expected) < errors * values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_of_gaussian_data_are_those_of_the_closed_form(variance):
    schedule = schedule_of()
    found = variational_bound(
        gaussian_denoise(schedule), drawn(400), schedule, Noise(range(400), (4, 4, 4)), variance, together=10
    )
    expected = expected_terms(schedule, variance)
    for t in range(STEPS):
        assert within(found.terms[:, t], expected[t].item()), t
    assert within(found.prior, prior_mean(schedule))
    assert within(found.total, prior_mean(schedule) + expected.sum().item())


def test_the_bound_of_the_true_reverse_chain_is_tight():
    """With the true means and variances nothing is lost but the prior's divergence, at any number of steps."""
    for steps in (25, 60):
        schedule = schedule_of(steps)
        denoise, noise = gaussian_denoise(schedule, True), Noise(range(400), (4, 4, 4))
        found = variational_bound(denoise, drawn(400), schedule, noise, "learned_range")
        assert within(found.total, entropy() + prior_gap(schedule)), steps
        # Without L_0 it is of the data under the least noise, whose entropy is known as well.
        there = (DEVIATIONS**2 + schedule.sigma_min**2).sqrt()
        under_noise = float((0.5 * math.log(2 * math.pi * math.e) + there.log()).mean())
        assert within(found.noised(schedule.sigma_min), under_noise + prior_gap(schedule)), steps


def test_the_bound_falls_to_the_exact_value_from_above():
    """One process in more and more steps: to the exact value, as 1 / steps (Kingma et al. 2021, sec. 4.2).

    The variance is beta at the first step too: Ho et al.'s choice there stays 0.15 nats above the exact value.
    """
    x0, gaps = drawn(100), list[float]()
    exact = -torch.distributions.Normal(0.0, DEVIATIONS).log_prob(x0).flatten(1).mean(1)
    for steps in (100, 400, 1600):
        time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        schedule = NoiseSchedule((-0.1 * time - 19.9 / 2 * time**2).exp())
        best = gaussian_denoise(schedule)
        found = variational_bound(
            lambda x, sigma, best=best: torch.cat([best(x, sigma), torch.ones_like(x)], 1),
            x0,
            schedule,
            Noise(range(100), (4, 4, 4)),
            "learned_range",
            together=20,
        )
        over = found.total - exact  # of the same pictures, so that their own spread is out of it
        gaps.append(prior_mean(schedule) + float(expected_terms(schedule, "beta").sum()) - entropy())
        assert within(over, gaps[-1])
        assert steps > 100 or over.mean() > 4.5 * over.std() / 10  # above, and seen to be
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0, gaps


# A part of the terms


def test_a_part_of_the_terms_estimates_their_sum_with_an_honest_error():
    schedule, rows = schedule_of(60), 600
    denoise, x0 = gaussian_denoise(schedule), drawn(rows)
    expected = expected_terms(schedule, "fixed_small")
    found = variational_bound(denoise, x0, schedule, Noise(range(rows), (4, 4, 4)), evaluations=9, together=4)
    assert found.counts.sum() == 60 and found.counts[0] == found.counts[1] == 1 and len(found.counts) <= 9
    assert bool((found.timesteps[:, 0] == 0).all()) and found.terms.shape == (rows, len(found.counts))
    assert within(found.steps, expected[1:].sum().item())
    # Honest: of 60 runs over ten pictures, about 95 % have the true sum within two errors (t of 9 degrees: 2.26).
    inside = [within(found.steps[k : k + 10], expected[1:].sum().item(), 2.26) for k in range(0, rows, 10)]
    assert 50 <= sum(inside) <= 60
    assert found.timesteps.unique().tolist() == list(range(60))  # every one of them comes up


def test_a_row_has_the_same_bound_in_any_batch():
    schedule, network = schedule_of(), Network(3)
    denoise, x0 = Denoiser(network, schedule), pictures()
    whole = variational_bound(denoise, x0, schedule, Noise([1, 2, 3], (3, 6, 6)), evaluations=7, together=3)
    alone = [
        variational_bound(denoise, x0[k : k + 1], schedule, Noise([k + 1], (3, 6, 6)), evaluations=7)
        for k in range(3)
    ]
    joined = Bound.joined(alone)
    assert torch.equal(whole.timesteps, joined.timesteps)
    torch.testing.assert_close(whole.total, joined.total, rtol=1e-5, atol=1e-5)


def test_a_chain_of_fewer_steps_asks_for_its_own_timesteps():
    schedule, told = schedule_of(), set[float]()

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        told.update(timestep.tolist())
        return torch.zeros_like(x)

    short = schedule.respaced(5)
    assert torch.equal(short.alphas_cumprod, schedule.alphas_cumprod[[0, 7, 14, 22, 29]])
    variational_bound(Denoiser(network, schedule), pictures(1), short, Noise([0], (3, 6, 6)))
    assert told == {0, 7, 14, 22, 29}
    with pytest.raises(UserError, match="2 to 30"):
        schedule.respaced(31)


def test_a_variance_that_was_not_learned_is_told_in_a_line():
    schedule, x0 = schedule_of(), pictures(1)
    with pytest.raises(UserError, match="fixed_small"):
        bound_terms(x0, x0, torch.tensor([3]), schedule, "learned_range")
    denoise = Denoiser(Network(3), schedule, learned_variance=True)
    with pytest.raises(UserError, match="fixed_small"):
        variational_bound(denoise, x0, schedule, Noise([0], (3, 6, 6)), "learned_range")
    assert prior_term(x0, schedule).item() > 0


def test_a_decoder_of_pixels_is_refused_for_latents():
    for config in (
        text_to_image.Config(
            "bundled", PicturesConfig("nowhere", 64), loss=LossConfig(decoder="discretized")
        ),
        diffusion.Config(DigitsConfig(), autoencoder="nowhere", loss=LossConfig(decoder="discretized")),
        diffusion.Config(DigitsConfig(), loss=LossConfig(decoder="discretized", levels=1)),
    ):
        with pytest.raises(UserError, match="loss"):
            config.check()
