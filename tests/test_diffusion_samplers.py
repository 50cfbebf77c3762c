"""Samplers against closed forms: order of convergence, exact variance, golden values; the driver and its noise."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from ldm.diffusion.denoiser import answered
from ldm.diffusion.driver import Noise, sample
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.plan import plan
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError

STD = torch.linspace(0.3, 2.0, 12, dtype=torch.float64).view(1, 3, 2, 2)
MEAN = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(1, 3, 2, 2)


def gaussian(x, sigma):
    """The ideal denoiser of data drawn from N(MEAN, STD^2)."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (STD**2 * x + variance * MEAN) / (STD**2 + variance)


def quiet():
    raise AssertionError("a deterministic sampler drew noise")


def error_after(solve, n, start=5.0, end=0.2, **options):
    """Distance from the closed solution of the probability-flow ODE, on log-uniform noise levels."""
    sigmas = torch.linspace(math.log(start), math.log(end), n + 1, dtype=torch.float64).exp().tolist()
    x = MEAN + torch.linspace(3, 7, 12, dtype=torch.float64).view(1, 3, 2, 2)
    exact = MEAN + (x - MEAN) * ((STD**2 + end**2) / (STD**2 + start**2)).sqrt()
    if options.pop("prk", False):
        options["midpoints"] = [math.sqrt(a * b) for a, b in pairwise(sigmas[:4])]
    return (sample(gaussian, solve(x, sigmas, quiet, **options)) - exact).norm().item()


ORDERS = {
    "euler": (1, {}),
    "ddim": (1, {}),
    "heun": (2, {}),
    "lms": (2, {}),
    "dpmpp_2m": (2, {"lower_order_final": False}),
    "dpmpp_2s": (2, {"lower_order_final": False}),
    "unipc": (3, {"lower_order_final": False}),  # the corrector adds one to the order of the predictor
    "pndm": (2, {}),  # its weights are those of even steps in sigma
    "pndm (v)": (
        1,
        {"prediction_type": "v_prediction"},
    ),  # diffusers' average of v, turned to noise here and now
    "pndm (prk)": (2, {"prk": True}),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order_of_convergence(case):
    order, options = ORDERS[case]
    solve = SAMPLERS[case.split()[0]].solve
    errors = [error_after(solve, n, **options) for n in (64, 128, 256)]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    print(f"{case}: orders {measured[0]:.2f} {measured[1]:.2f}, last error {errors[-1]:.1e}")
    assert measured[-1] > order - 0.15
    if order == 1:
        assert measured[-1] < 1.15


def coefficients(solve, sigmas, factor, **options):
    """How the last x depends on the first x and on each noise drawn: exact, for a linear denoiser.

    Element k of the state carries the coefficient of source k, source 0 being the first x.
    """
    sources = 3 * len(sigmas)
    basis = iter(torch.eye(sources, dtype=torch.float64).view(sources, 1, sources, 1, 1))
    x = solve(next(basis), sigmas, lambda: next(basis), **options)
    return sample(lambda x, sigma: x * factor(sigma.item()), x).flatten()


LEVELS = torch.linspace(math.log(14.6), math.log(0.03), 26, dtype=torch.float64).exp().tolist()
DATA = 0.7  # standard deviation of the data


def gain(sigma):
    return DATA**2 / (DATA**2 + sigma**2)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("last", [0.0, 0.03])
def test_variance_of_ddim_and_ddpm(eta, last):
    """Against DDPM's posterior (Ho et al. 2020, eq. 7) and DDIM's (Song et al. 2020, eq. 12), in their terms."""
    sigmas = [*LEVELS[:-1], last]
    weights = coefficients(SAMPLERS["euler_ancestral"].solve, sigmas, gain, eta=eta)
    bars = [1 / (1 + s**2) for s in sigmas]
    variance = bars[0] * (DATA**2 + sigmas[0] ** 2)  # of the unit-variance state
    for bar, bar_next in pairwise(bars):
        x0 = gain(math.sqrt(1 / bar - 1)) / math.sqrt(bar)  # x0 = x0 * x_t
        posterior = (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
        noise = (1 - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        factor = math.sqrt(bar_next) * x0 + math.sqrt(max(1 - bar_next - eta**2 * posterior, 0)) * noise
        if eta == 1:
            beta = 1 - bar / bar_next
            ho = math.sqrt(bar_next) * beta / (1 - bar) * x0
            ho += math.sqrt(bar / bar_next) * (1 - bar_next) / (1 - bar)
            assert factor == pytest.approx(ho, rel=1e-12)
        variance = factor**2 * variance + eta**2 * posterior
    ours = weights[0] ** 2 * (DATA**2 + sigmas[0] ** 2) + weights[1:].square().sum()
    assert ours.item() == pytest.approx(variance / bars[-1], rel=1e-10)


def test_variance_of_lcm():
    sigmas = [*LEVELS[:-1], 0.0]
    weights = coefficients(SAMPLERS["lcm"].solve, sigmas, gain)
    variance = DATA**2 + sigmas[0] ** 2
    for sigma, sigma_next in pairwise(sigmas):
        variance = gain(sigma) ** 2 * variance + sigma_next**2
    ours = weights[0] ** 2 * (DATA**2 + sigmas[0] ** 2) + weights[1:].square().sum()
    assert ours.item() == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("last", [0.0, 0.03])
def test_variance_of_dpmpp_2m_sde(last):
    """The covariance of (x, previous x0), by the update of Lu et al. 2022 (SDE-DPM-Solver++2M) in alpha, sigma, h."""
    sigmas = [*LEVELS[:-1], last]
    weights = coefficients(SAMPLERS["dpmpp_2m_sde"].solve, sigmas, gain, lower_order_final=False)
    alphas = [1 / math.sqrt(1 + s**2) for s in sigmas]
    pair = torch.diag(torch.tensor([alphas[0] ** 2 * (DATA**2 + sigmas[0] ** 2), 0.0], dtype=torch.float64))
    h_last = math.nan
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        alpha, alpha_next = alphas[i], alphas[i + 1]
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        x0 = gain(sigma) / alpha
        decay, pull = (alpha_next * sigma_next) / (alpha * sigma) * math.exp(-h), 1 - math.exp(-2 * h)
        correction = 0.5 * h / h_last if i > 0 and sigma_next > 0 else 0.0
        matrix = torch.tensor(
            [
                [decay + alpha_next * pull * (1 + correction) * x0, -alpha_next * pull * correction],
                [x0, 0.0],
            ],
            dtype=torch.float64,
        )
        pair = matrix @ pair @ matrix.T
        pair[0, 0] += (alpha_next * sigma_next) ** 2 * pull
        h_last = h
    ours = weights[0] ** 2 * (DATA**2 + sigmas[0] ** 2) + weights[1:].square().sum()
    assert (alphas[-1] ** 2 * ours).item() == pytest.approx(pair[0, 0].item(), rel=1e-10)


@pytest.mark.parametrize("last", [0.0, 0.03])
def test_variance_of_dpmpp_sde(last):
    sigmas = [*LEVELS[:-1], last]
    weights = coefficients(SAMPLERS["dpmpp_sde"].solve, sigmas, gain)
    variance = DATA**2 + sigmas[0] ** 2
    for sigma, sigma_next in pairwise(sigmas):
        if sigma_next == 0:
            variance *= gain(sigma) ** 2
            continue
        middle = math.sqrt(sigma * sigma_next)
        down, up = middle**2 / sigma, middle * math.sqrt(1 - middle**2 / sigma**2)
        half, half_noise = gain(sigma) + (1 - gain(sigma)) * down / sigma, up
        down, up = sigma_next**2 / sigma, sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2)
        pull = (1 - down / sigma) * gain(middle)
        shared = math.sqrt((sigma - middle) / (sigma - sigma_next))  # correlation of the two noises
        variance = (down / sigma + pull * half) ** 2 * variance
        variance += (pull * half_noise) ** 2 + up**2 + 2 * pull * half_noise * up * shared
    ours = weights[0] ** 2 * (DATA**2 + sigmas[0] ** 2) + weights[1:].square().sum()
    assert ours.item() == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("name", ["euler_ancestral", "ddpm", "dpmpp_2m_sde", "dpmpp_sde"])
def test_variance_tends_to_that_of_the_data(name):
    wanted = DATA**2 + 0.03**2

    def error(n):
        sigmas = torch.linspace(math.log(14.6), math.log(0.03), n + 1, dtype=torch.float64).exp().tolist()
        weights = coefficients(SAMPLERS[name].solve, sigmas, gain)
        variance = weights[0] ** 2 * (DATA**2 + sigmas[0] ** 2) + weights[1:].square().sum()
        return abs(variance.item() / wanted - 1)

    print(f"{name}: relative error of the variance {error(50):.1e} -> {error(200):.1e}")
    assert error(200) < 0.04 and error(200) < error(50) / 3


# Golden values: diffusers' own scheduler tests (the same toy model, through our own code).
FULL = torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / (4 * 3 * 8 * 8)
FLIPPED = torch.arange(4 * 3 * 8 * 8).flip(0).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / (4 * 3 * 8 * 8)
LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
MULTI = {
    "_class_name": "DPMSolverMultistepScheduler",
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",
}
SINGLE = {"_class_name": "DPMSolverSinglestepScheduler", "final_sigmas_type": "sigma_min"}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}
DDIM, PNDM, DDPM = ({"_class_name": f"{name}Scheduler"} for name in ("DDIM", "PNDM", "DDPM"))
LCM = {
    "_class_name": "LCMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
GOLDEN = [
    ("ddim", DDIM, 10, 172.0067, 0.223967),
    ("ddim v", {**DDIM, **V}, 10, 52.5302, 0.0684),
    ("ddim alpha to one", {**DDIM, "beta_start": 0.01, "set_alpha_to_one": True}, 10, 149.8295, 0.1951),
    ("ddim alpha off", {**DDIM, "beta_start": 0.01, "set_alpha_to_one": False}, 10, 149.0784, 0.1941),
    ("ddpm", DDPM, 1000, 258.9606, 0.3372),
    ("ddpm v", {**DDPM, **V}, 1000, 202.0296, 0.2631),
    ("dpmpp_2m", MULTI, 10, None, 0.3301),
    ("dpmpp_2m v", {**MULTI, **V}, 10, None, 0.2251),
    ("dpmpp_2m karras v", {**MULTI, **KARRAS, **V}, 10, None, 0.2096),
    ("dpmpp_2s", SINGLE, 10, None, 0.2791),
    ("dpmpp_2s v", {**SINGLE, **V}, 10, None, 0.1453),
    ("dpmpp_2s karras", {**SINGLE, **KARRAS}, 10, None, 0.2248),
    ("unipc", UNIPC, 10, None, 0.2464),
    ("unipc v", {**UNIPC, **V}, 10, None, 0.1014),
    ("unipc karras", {**UNIPC, **KARRAS}, 10, None, 0.2925),
    ("pndm", PNDM, 10, 198.1318, 0.2580),
    ("pndm v", {**PNDM, **V}, 10, 67.3986, 0.0878),
    ("lcm 1", LCM, 1, 18.7097, 0.0244),
    ("lcm 10", LCM, 10, 197.7616, 0.2575),
]


def golden_network(x, t):
    return x * (t / (t + 1)).view(-1, 1, 1, 1)


def shared_noise():
    """diffusers' tests draw the whole batch from one generator."""
    generator = torch.manual_seed(0)
    return lambda: torch.randn(FULL.shape, generator=generator)


@pytest.mark.parametrize("name,keys,n,total,mean", GOLDEN, ids=[case[0] for case in GOLDEN])
def test_golden_values(name, keys, n, total, mean):
    steps = plan(SchedulerConfig.from_dict({**LINEAR, **keys}), n)
    result = steps.sample(steps.denoiser(golden_network), shared_noise(), latents=FULL).abs()
    if total is not None:
        assert result.sum().item() == pytest.approx(total, abs=1e-2)
    assert result.mean().item() == pytest.approx(mean, abs=1e-3)


def test_golden_ddim_from_step_8():
    steps = plan(SchedulerConfig.from_dict({**LINEAR, **DDIM}), 10)
    sigmas = steps.sigmas[8:]
    x = FULL + sigmas[0] * FLIPPED
    options = {**steps.options, "stops": steps.options["stops"][8:]}
    denoise = steps.denoiser(golden_network)
    result = sample(denoise, SAMPLERS["ddim"].solve(x, sigmas, quiet, **options)).abs()
    assert result.sum().item() == pytest.approx(354.5418, abs=1e-2)


def test_a_correct_euler_loop():
    """168.05 is what diffusers' Euler gives where its loop scales a copy of x and not x itself."""
    config = SchedulerConfig.from_dict(
        {"_class_name": "EulerDiscreteScheduler", **LINEAR, "num_train_timesteps": 1100}
    )
    steps = plan(config, 10)
    result = steps.sample(steps.denoiser(golden_network), quiet, latents=FULL)
    assert result.abs().sum().item() == pytest.approx(168.05, abs=0.01)


def test_ddpm_variances_of_the_paper():
    """The noise of one ancestral step, at unit variance, is DDPM's fixed small variance."""
    schedule = NoiseSchedule.build("linear", 1e-4, 0.02)
    for t, wanted in ((487, 0.00979), (999, 0.02)):
        sigmas = [schedule.sigmas[t].item(), schedule.sigmas[t - 1].item()]
        weights = coefficients(SAMPLERS["ddpm"].solve, sigmas, lambda sigma: 0.0)
        assert weights[1].item() ** 2 / (1 + sigmas[1] ** 2) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_of_a_batch_equals_its_seed_alone(name):
    network = lambda x, t: torch.sin(3 * x.roll(1, -1) + t.view(-1, 1, 1, 1) / 90)  # noqa: E731
    steps = plan(SchedulerConfig.from_dict({"_class_name": "PNDMScheduler", **LINEAR}), 6, sampler=name)
    run = partial(steps.sample, steps.denoiser(network))
    batch = run(Noise([3, 1, 4, 1, 5, 9, 2, 6], (3, 8, 8)))
    assert bool(batch.isfinite().all())
    assert (run(Noise([5], (3, 8, 8)))[0] - batch[4]).abs().max() < 1e-5
    assert torch.equal(batch[1], batch[3])
    if name not in ("euler_ancestral", "ddpm", "dpmpp_2m_sde", "dpmpp_sde", "lcm"):  # those draw on their way
        assert torch.equal(run(quiet, latents=Noise([9], (3, 8, 8))())[0], run(Noise([9], (3, 8, 8)))[0])


def test_noise_is_what_a_cpu_generator_draws():
    noise = Noise([7, 2**63 + 5], (4, 8, 8))
    first, second = noise(), noise()
    for k, seed in enumerate([7, 2**63 + 5]):
        generator = torch.Generator("cpu").manual_seed(seed)
        assert torch.equal(first[k : k + 1], torch.randn((1, 4, 8, 8), generator=generator))
        assert torch.equal(second[k : k + 1], torch.randn((1, 4, 8, 8), generator=generator))
    assert torch.equal(Noise([torch.Generator("cpu").manual_seed(7)], (4, 8, 8))()[0], first[0])


@pytest.mark.parametrize("name,evaluations", [("euler", 9), ("heun", 17), ("pndm", 18), ("dpmpp_sde", 17)])
def test_callback_sees_every_prediction_and_may_stop(name, evaluations):
    steps = plan(
        SchedulerConfig.from_dict({"_class_name": "EulerDiscreteScheduler", **LINEAR}), 9, sampler=name
    )
    assert steps.evaluations == evaluations
    seen = []
    denoise = steps.denoiser(lambda x, t: 0.1 * x)
    steps.sample(denoise, Noise([0], (3, 4, 4)), seen.append)
    assert [step.index for step in seen] == list(range(evaluations))
    assert seen[0].sigma == steps.sigmas[0] and seen[0].x.shape == seen[0].x0.shape == (1, 3, 4, 4)
    stopped = steps.sample(denoise, Noise([0], (3, 4, 4)), lambda step: step.index < 3)
    assert torch.equal(stopped, seen[3].x0 * steps.final_scale)


def test_runs_stand_side_by_side():
    """Two coroutines served in turns, at their own noise levels, end as they do alone."""
    a = plan(SchedulerConfig.from_dict({"_class_name": "UniPCMultistepScheduler", **LINEAR}), 5)
    b = plan(
        SchedulerConfig.from_dict({"_class_name": "EulerDiscreteScheduler", **LINEAR}), 8, sampler="dpmpp_2m"
    )
    denoise = a.denoiser(lambda x, t: torch.cos(x + t.view(-1, 1, 1, 1) / 200))
    starts = [Noise([k], (3, 4, 4))() * steps.initial_scale for k, steps in enumerate((a, b))]
    alone = [sample(denoise, steps.steps(x, quiet)) for steps, x in zip((a, b), starts, strict=True)]
    runs = dict(enumerate(steps.steps(x, quiet) for steps, x in zip((a, b), starts, strict=True)))
    asked, done = {k: next(run) for k, run in runs.items()}, {}
    while runs:
        x = torch.cat([asked[k][0] for k in runs])
        x0 = answered(denoise(x, torch.tensor([asked[k][1] for k in runs])))
        for row, k in enumerate(list(runs)):
            try:
                asked[k] = runs[k].send(x0[row : row + 1])
            except StopIteration as stop:
                done[k] = stop.value
                del runs[k]
    assert all(torch.allclose(done[k], alone[k], atol=1e-5) for k in done)


# A learned variance


def p_sample_loop(network, betas, timesteps, noise, scale=None):
    """guided-diffusion's `p_sample_loop` by the papers' formulas (Nichol & Dhariwal 2021, eq. 15), in float64.

    Betas are those of the kept timesteps alone, as its respacing makes them; x0 is clipped. `scale`: classifier-free
    guidance as GLIDE has it, over a network of pairs: the variance is the conditional one.
    """
    bars = (1 - betas).cumprod(0)[timesteps]
    before = torch.cat([torch.ones(1, dtype=bars.dtype), bars[:-1]])
    beta = 1 - bars / before
    posterior = beta * (1 - before) / (1 - bars)
    low = torch.cat([posterior[1:2], posterior[1:]]).log()  # `posterior_log_variance_clipped`
    x = noise().double()
    for i in reversed(range(len(timesteps))):
        t = torch.full((len(x),), float(timesteps[i]), dtype=torch.float64)
        if scale is None:
            output, values = network(x, t).chunk(2, dim=1)
        else:
            both = network(torch.cat([x, x]), torch.cat([t, t]))
            (uncond, cond), values = both[:, :3].chunk(2), both[len(x) :, 3:]
            output = uncond + scale * (cond - uncond)
        x0 = ((x - (1 - bars[i]).sqrt() * output) / bars[i].sqrt()).clamp(-1, 1)
        mean = before[i].sqrt() * beta[i] * x0 + (1 - beta[i]).sqrt() * (1 - before[i]) * x
        share = (values + 1) / 2
        log_variance = share * beta[i].log() + (1 - share) * low[i]
        x = mean / (1 - bars[i]) + ((log_variance / 2).exp() * noise().double() if i else 0)
    return x


@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_learned_variance_is_drawn_with_as_by_guided_diffusion(scale):
    def network(x, t):
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        half = torch.arange(len(x)).view(-1, 1, 1, 1) >= len(x) / 2  # the condition, where there are pairs
        shared = torch.sin(2 * x.roll(1, -1) + t / 50 + 0.3 * half)
        return torch.cat([0.5 * shared + 0.4 * x, 1.3 * torch.cos(4 * x + t / 70 + half)], dim=1)

    mapping = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }
    mapping |= {"variance_type": "learned_range", "clip_sample": True, "timestep_spacing": "linspace"}
    steps = plan(SchedulerConfig.from_dict(mapping), 25)
    assert steps.evaluations == 25
    betas = steps.schedule.alphas_cumprod
    betas = 1 - betas / torch.cat([torch.ones(1, dtype=betas.dtype), betas[:-1]])
    timesteps = [round(999 * i / 24) for i in range(25)]
    reference = p_sample_loop(network, betas, timesteps, Noise([5, 6], (3, 8, 8)), scale)
    denoiser = steps.denoiser(network)
    denoise = denoiser if scale is None else classifier_free(denoiser, scale)
    seen = []
    found = steps.sample(denoise, Noise([5, 6], (3, 8, 8)), lambda step: seen.append(step.x0.shape))
    # float32 against float64: 25 steps of some ten roundings of 6e-8, on a network that doubles an error at the most
    assert (found - reference).norm() < 2e-5 * reference.norm()
    assert {*seen} == {(2, 3, 8, 8)}, "callbacks see x0 alone"
    plain = plan(SchedulerConfig.from_dict(mapping | {"variance_type": "fixed_small"}), 25)
    other = plain.sample(plain.denoiser(network), Noise([5, 6], (3, 8, 8)))
    assert (other - reference).norm() > 0.01 * reference.norm()
    with pytest.raises(UserError, match="variance_type learned_range is for a network that gives 6 channels"):
        steps.sample(steps.denoiser(lambda x, t: x), Noise([5, 6], (3, 8, 8)))


# Long steps from near-infinite noise

SPOTS = 0.8 * torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SPOT = 0.1


def spots(x, sigma):
    """The ideal denoiser of data around six pictures, SPOT wide: x0 turns to one of them late, as in a real model."""
    variance = sigma.double().view(-1, 1) ** 2 + SPOT**2
    apart = (x.double()[:, None] - SPOTS).flatten(2).square().sum(-1)
    mean = ((-apart / (2 * variance)).softmax(1) @ SPOTS.flatten(1)).view(x.shape)
    return mean + (x - mean) * (SPOT**2 / variance).view(-1, 1, 1, 1)


LATENT = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
ZERO_SNR = {**LATENT, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
NEARLY_NOISE = {
    "zero": ZERO_SNR,
    "cosine": {
        **LATENT,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
        "prediction_type": "sample",
    },
    "linear": {
        **LATENT,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "clip_sample": False,
    },
}


def ending(config, sampler, n, schedule):
    """Where a sampler ends from a fixed start, among the spots."""
    steps = plan(config, n, sampler, schedule)
    x = Noise([1, 2, 3, 4], (3, 4, 4))().double() * steps.initial_scale
    return sample(spots, steps.steps(x, quiet)) * steps.final_scale


@pytest.mark.parametrize(
    "schedule", ["trailing", "linspace", "leading", "sgm_uniform", "karras", "exponential"]
)
@pytest.mark.parametrize("model", NEARLY_NOISE)
def test_heun_takes_long_steps_no_worse_than_euler(model, schedule):
    config = SchedulerConfig.from_dict(NEARLY_NOISE[model])
    best = ending(config, "dpmpp_2m", 900, "linspace")
    for n in (2, 3, 4, 6, 9, 12, 20, 40):
        errors = [ending(config, name, n, schedule) - best for name in ("euler", "heun")]
        euler, heun = (error.norm() / best.norm() for error in errors)
        assert heun < 2 * euler + 0.01, (n, float(heun), float(euler))


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_pndm_begins_anew_where_steps_change_their_length(schedule):
    """Weights of even steps carry an error of many times the picture through a step of many times the length."""
    config = SchedulerConfig.from_dict(ZERO_SNR)
    best = ending(config, "dpmpp_2m", 900, "linspace")
    for n in (8, 12, 20):
        errors = [ending(config, name, n, schedule) - best for name in ("pndm", "euler")]
        pndm, euler = (error.norm() / best.norm() for error in errors)
        assert pndm < 3 * euler + 0.1, (n, float(pndm), float(euler))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("model", ["zero", "plain"])
def test_a_named_schedule_has_one_range_for_all_samplers(sampler, spacing, model):
    """k-diffusion's: from the last timestep's noise to the first one's, whatever spacing the file has."""
    mapping = {**(ZERO_SNR if model == "zero" else LATENT), "timestep_spacing": spacing, "steps_offset": 1}
    config = SchedulerConfig.from_dict(mapping)
    low = NoiseSchedule.build().sigma_min if model == "plain" else plan(config, 5, "euler").schedule.sigma_min
    high = {"plain": NoiseSchedule.build().sigma_max, "zero": 4096}[model]
    for name in ("karras", "exponential"):
        sigmas = plan(config, 8, sampler, name).sigmas
        assert sigmas[0] == pytest.approx(high, rel=1e-6) and sigmas[-2] == pytest.approx(low, rel=1e-6)
        assert sigmas == pytest.approx(plan(config, 8, "dpmpp_2m", name).sigmas[:8] + sigmas[-1:], rel=1e-6)
    begins = plan(config, 8, sampler, "align_your_steps").sigmas
    assert begins[0] == pytest.approx(high, rel=1e-6)


def test_a_files_own_karras_range_stays_that_of_diffusers_class():
    file = {
        **LATENT,
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    own = plan(SchedulerConfig.from_dict(file | {"use_karras_sigmas": True}), 20).sigmas
    assert (own[0], own[-2]) == (pytest.approx(11.03, abs=0.01), pytest.approx(0.0413, abs=1e-4))
    named = plan(SchedulerConfig.from_dict(file), 20, schedule="karras").sigmas
    assert (named[0], named[-2]) == (pytest.approx(14.61, abs=0.01), pytest.approx(0.0292, abs=1e-4))
