"""Our samplers and diffusers' schedulers draw the same picture from the same network, step settings and seeds.

The reference is computed in float64: diffusers' own arithmetic is float32, in which its Euler loses 1e-4 of a picture
at zero terminal SNR (it adds x and a step of 4096), how much depending on the processor. What is left between the two:

- our float32: some 60 operations that round by 6e-8 of their result, on a network that doubles an error at the most,
  and timesteps, which a float32 sigma gives to about 1e-5: 2e-6, largest at the steepest;
- between two whole timesteps log sigma is a line with us, with diffusers mostly sigma: a sigma differs by up to
  (step of log sigma)^2 / 8 of itself. That is most at the last, small ones, where a step moves little: 9e-6 of the
  picture with LMS, the same on every processor, and less with the others.

So MARGIN is 2e-5 for all; a wrong coefficient, level or order moves a picture by 1e-3 and more.
"""

import contextlib
import importlib.machinery
import inspect
import itertools
import math
import sys
import types

import diffusers
import pytest
import torch

from ldm.diffusion.driver import Noise
from ldm.diffusion.plan import plan
from ldm.diffusion.scheduler_config import CLASSES, SchedulerConfig

# numpy's, of a line in diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MARGIN = 2e-5
SHAPE = (3, 8, 8)
SEEDS = [11, 12]
STABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@pytest.fixture(autouse=True)
def quiet_diffusers():
    diffusers.logging.set_verbosity_error()


def network(x, t):
    """Depends on every pixel's neighbour and on the timestep, as sharply as a real one."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
    return 0.5 * torch.sin(2 * x.roll(1, -1) + t / 50) + 0.5 * x * torch.cos(t / 300)


class Wide(types.ModuleType):
    """torch as a module of diffusers sees it, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64(scheduler):
    """Have a scheduler's steps, which insist on float32, compute in float64; their noise is still drawn in float32."""
    module = sys.modules[type(scheduler).__module__]
    draws = getattr(module, "randn_tensor", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", Wide("torch"))
        if draws:
            patch.setattr(
                module, "randn_tensor", lambda *a, **k: draws(*a, **{**k, "dtype": torch.float32}).double()
            )
        yield


def theirs(scheduler, n, timesteps=None, network=network, **kwargs):
    """The picture of diffusers' scheduler, in float64."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    x = torch.cat([torch.randn((1, *SHAPE), generator=each) for each in generators]).double()
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = generators
    with in_float64(scheduler):
        scheduler.set_timesteps(**({"timesteps": timesteps} if timesteps else {"num_inference_steps": n}))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # or two levels rounded to one timestep make it lose its place
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas.double()
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **kwargs).prev_sample
    assert x.dtype == torch.float64, "somewhere diffusers fell back to float32"
    return x


def ours(mapping, n, network=network, **names):
    steps = plan(SchedulerConfig.from_dict(mapping), n, **names)
    return steps.sample(steps.denoiser(network), Noise(SEEDS, SHAPE)).double()


def distance(mapping, n, scheduler=None, eta=0.0, **names):
    """Relative L2 distance of our picture from that of `scheduler` (default: as `mapping` says)."""
    scheduler = scheduler or getattr(diffusers, mapping["_class_name"]).from_config(mapping)
    takes_eta = "eta" in inspect.signature(scheduler.step).parameters
    reference = theirs(scheduler, n, **({"eta": eta} if takes_eta else {}))
    return ((ours(mapping, n, eta=eta, **names) - reference).norm() / reference.norm()).item()


def spacings_of(defaults):
    if "timestep_spacing" in defaults:
        yield from ({"timestep_spacing": name} for name in ("leading", "trailing", "linspace"))
    if "use_karras_sigmas" in defaults:
        yield {"use_karras_sigmas": True}


def cases():
    """Class x spacing x prediction (v also at zero terminal SNR, for the classes that have it)."""
    for name, scheduler in CLASSES.items():
        if name == "DPMSolverSDEScheduler":
            continue  # its noise needs torchsde; see below
        for spacing in spacings_of(scheduler.defaults) if name != "LCMScheduler" else [{}]:
            for prediction, zero in (("epsilon", False), ("v_prediction", False), ("v_prediction", True)):
                if zero and "rescale_betas_zero_snr" not in scheduler.defaults:
                    continue
                keys = {"_class_name": name, "prediction_type": prediction, "rescale_betas_zero_snr": zero}
                label = "-".join([name[:-9], *map(str, spacing.values()), prediction[:1], *["zero"] * zero])
                yield pytest.param({**STABLE, **spacing, **keys}, id=label)


@pytest.mark.parametrize("mapping", list(cases()))
@pytest.mark.parametrize("n", [4, 20, 30])
def test_same_picture_as_diffusers(mapping, n):
    spacing = mapping.get("timestep_spacing")
    if mapping["_class_name"] == "PNDMScheduler" and (
        spacing == "linspace" or (n == 30 and spacing == "trailing")
    ):
        pytest.skip("diffusers' PNDM ends its steps beside the next timestep where n does not divide 1000")
    assert distance(mapping, n) < MARGIN


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name,extra",
    [
        ("DDIM", {"eta": 0.6}),
        ("DDIM", {"eta": 1.0, "timestep_spacing": "trailing", "set_alpha_to_one": True}),
        ("DDIM", {"clip_sample": True, "eta": 0.3}),
        ("DDIM", {"thresholding": True, "sample_max_value": 2.0}),
        ("DDIM", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
        ("DDPM", {"clip_sample": True, "clip_sample_range": 0.8}),
        ("DDPM", {"thresholding": True, "beta_schedule": "linear"}),
        # Dynamic in truth: with diffusers' own sample_max_value of 1 the bound never rises above the static one.
        ("DDPM", {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.9}),
        ("DPMSolverMultistep", {"thresholding": True, "sample_max_value": 3.0}),
        (
            "DPMSolverSinglestep",
            {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.8},
        ),
        ("HeunDiscrete", {"clip_sample": True}),
        ("EulerDiscrete", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
        ("EulerDiscrete", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}),
        ("LMSDiscrete", {"use_exponential_sigmas": True, "timestep_spacing": "leading"}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("DPMSolverMultistep", {"euler_at_final": True, "timestep_spacing": "trailing"}),
        ("DPMSolverMultistep", {"thresholding": True, "prediction_type": "sample"}),
        (  # at sigma 20291, where epsilon says nothing of x0
            "DPMSolverMultistep",
            {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True, "prediction_type": "sample"},
        ),
        ("DPMSolverSinglestep", {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverSinglestep", {"final_sigmas_type": "sigma_min", "lower_order_final": True}),
        ("UniPCMultistep", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("UniPCMultistep", {"thresholding": True}),
        ("PNDM", {"skip_prk_steps": False, "set_alpha_to_one": True}),
        ("LCM", {"clip_sample": True, "timestep_scaling": 0.01}),
        ("LCM", {"original_inference_steps": 100}),
    ],
)
@pytest.mark.parametrize("n", [7, 20])
def test_same_picture_with_the_other_keys(name, extra, prediction, n):
    extra = dict(extra)
    eta = extra.pop("eta", 0.0)
    mapping = {**STABLE, "_class_name": f"{name}Scheduler", "prediction_type": prediction, **extra}
    if name == "PNDM" and n == 7:
        n = 10  # Runge-Kutta's half step is a timestep off where T // n is odd
    assert distance(mapping, n, eta=eta) < MARGIN


def learned(x, t):
    """A network that learned its variance: shares between the two ends, a few beyond them, as real ones have."""
    return torch.cat(
        [network(x, t), 1.2 * torch.sin(3 * x + torch.as_tensor(t).reshape(-1, 1, 1, 1) / 90)], 1
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("n", [10, 250])
def test_ddpm_draws_with_each_variance(prediction, variance_type, n):
    """Also where a sampler has no use for what was learned: diffusers' DPM-Solver leaves it out, as ours do.

    linspace: it ends at timestep 0, where diffusers adds no noise.
    """
    mapping = {**STABLE, "timestep_spacing": "linspace", "prediction_type": prediction}
    mapping |= {"_class_name": "DDPMScheduler", "variance_type": variance_type, "clip_sample": True}
    used = learned if variance_type == "learned_range" else network
    reference = theirs(diffusers.DDPMScheduler.from_config(mapping), n, network=used)
    found = ours(mapping, n, network=used)
    assert (found - reference).norm() < MARGIN * reference.norm()
    if used is learned:
        other = ours({**mapping, "variance_type": "fixed_small"}, n, network=used)
        assert (other - reference).norm() > 0.01 * reference.norm()
    if used is learned and prediction == "epsilon":  # diffusers' other branches forget to leave it out
        solver = diffusers.DPMSolverMultistepScheduler.from_config(mapping)
        reference = theirs(solver, 10, network=used)
        found = ours(mapping, 10, network=used, sampler="dpmpp_2m")
        assert (found - reference).norm() < MARGIN * reference.norm()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("table", ["StableDiffusion", "StableDiffusionXL"])
def test_align_your_steps(name, table):
    timesteps = diffusers.schedulers.AysSchedules[f"{table}Timesteps"]
    mapping = {**STABLE, "_class_name": name}
    reference = theirs(getattr(diffusers, name).from_config(mapping), 10, timesteps)
    found = ours(mapping, 10, schedule="align_your_steps", is_xl=table == "StableDiffusionXL")
    assert (found - reference).norm() < MARGIN * reference.norm()


SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SDXL = {
    **SD15,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
ZERO = {**SD21, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FOLDERS = {"sd15": SD15, "sdxl": SDXL, "sd21": SD21, "zero": ZERO}
NAMES = {
    "euler": "EulerDiscrete",
    "euler_ancestral": "EulerAncestralDiscrete",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "heun": "HeunDiscrete",
    "lms": "LMSDiscrete",
    "dpmpp_2m": "DPMSolverMultistep",
    "dpmpp_2m_sde": "DPMSolverMultistep",
    "dpmpp_2s": "DPMSolverSinglestep",
    "unipc": "UniPCMultistep",
    "pndm": "PNDM",
    "lcm": "LCM",
}


def from_config(target, mapping, **kwargs):
    """What diffusers makes of a folder's scheduler when the class `target` takes its config."""
    folder = getattr(diffusers, mapping["_class_name"]).from_config(mapping)
    return getattr(diffusers, f"{target}Scheduler").from_config(folder.config, **kwargs)


@pytest.mark.parametrize("folder,name", list(itertools.product(FOLDERS, NAMES)))
def test_naming_a_sampler_is_from_config(folder, name):
    mapping = FOLDERS[folder]
    kwargs = {"algorithm_type": "sde-dpmsolver++"} if name == "dpmpp_2m_sde" else {}
    scheduler = from_config(NAMES[name], mapping, **kwargs)
    config = SchedulerConfig.from_dict(mapping).with_sampler(name)
    assert config.sampler == name
    for key in CLASSES[config.class_name].defaults:
        assert config.get(key) == scheduler.config[key], key
    if folder == "zero" and "rescale_betas_zero_snr" not in CLASSES[config.class_name].defaults:
        return  # here the betas stay the model's own; diffusers drops the key
    assert distance(mapping, 20, scheduler, sampler=name) < MARGIN


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc", "dpmpp_2s"])
@pytest.mark.parametrize("folder", ["sd15", "sdxl", "sd21"])
def test_naming_a_schedule_is_from_config(folder, name):
    for schedule, keys in {
        # between the noise schedule's own ends, which linspace has: Euler's kin take those of the spacing
        "karras": {"use_karras_sigmas": True, "timestep_spacing": "linspace"},
        "trailing": {"timestep_spacing": "trailing"},
        "linspace": {"timestep_spacing": "linspace"},
    }.items():
        if name == "dpmpp_2s" and schedule == "trailing":
            continue  # not in diffusers
        scheduler = from_config(NAMES[name], FOLDERS[folder], **keys)
        assert distance(FOLDERS[folder], 20, scheduler, sampler=name, schedule=schedule) < MARGIN


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_we_write_diffusers_reads(folder, name):
    config = SchedulerConfig.from_dict(FOLDERS[folder]).with_sampler(name)
    if folder == "zero" and "rescale_betas_zero_snr" not in CLASSES[config.class_name].defaults:
        return
    if name in ("euler", "dpmpp_2m", "unipc"):
        config = config.with_schedule("karras")
    assert distance(config.to_dict(), 20) < MARGIN


def test_class_tables_equal_diffusers_signatures(monkeypatch):
    """Every class's keys and defaults; two keys that only flow matching reads are left out."""
    stub_torchsde(monkeypatch)
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    for name, scheduler in CLASSES.items():
        theirs = DPMSolverSDEScheduler if name == "DPMSolverSDEScheduler" else getattr(diffusers, name)
        parameters = inspect.signature(theirs.__init__).parameters
        defaults = {key: each.default for key, each in parameters.items() if key != "self"}
        for key in ("flow_shift", "time_shift_type"):
            defaults.pop(key, None)
        assert dict(scheduler.defaults) == defaults, name


def stub_torchsde(monkeypatch):
    """diffusers' SDE scheduler imports torchsde, for its noise alone."""
    if "torchsde" not in sys.modules:
        module = types.ModuleType("torchsde")
        module.__spec__ = importlib.machinery.ModuleSpec("torchsde", None)
        monkeypatch.setitem(sys.modules, "torchsde", module)


class Path:
    """A Brownian path in sigma from our noise, in place of torchsde's tree: same law, our numbers."""

    def __init__(self):
        self.draw, self.half = Noise(SEEDS, SHAPE), None
        self.draw()  # the start of the picture

    def __call__(self, sigma, sigma_next):
        z = self.draw()
        if self.half is None or self.half[0] != sigma:
            self.half = (sigma, sigma_next, z)
            return z
        share = ((sigma - self.half[1]) / (sigma - sigma_next)).item()
        return self.half[2] * math.sqrt(share) + z * math.sqrt(1 - share)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("extra", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
def test_dpmpp_sde_equals_diffusers_on_one_path(monkeypatch, prediction, extra):
    stub_torchsde(monkeypatch)
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    mapping = {**STABLE, "_class_name": "DPMSolverSDEScheduler", "prediction_type": prediction, **extra}
    scheduler = DPMSolverSDEScheduler.from_config(mapping)
    set_timesteps = scheduler.set_timesteps

    def with_path(num_inference_steps):
        set_timesteps(num_inference_steps)
        scheduler.noise_sampler = Path()

    scheduler.set_timesteps = with_path
    assert distance(mapping, 12, scheduler) < MARGIN
