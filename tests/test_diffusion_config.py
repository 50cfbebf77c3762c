"""scheduler_config.json: reading, refusing, writing."""

import pytest
import torch

from ldm.diffusion.plan import plan
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.scheduler_config import CLASSES, SchedulerConfig
from ldm.errors import UserError

EULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012}


def test_unknown_keys_are_kept_for_writing():
    mapping = {**EULER, "_diffusers_version": "0.30.0", "some_later_key": [1]}
    assert SchedulerConfig.from_dict(mapping).to_dict() == mapping


def test_every_sampler_has_a_class_and_every_class_a_sampler():
    assert {sampler.scheduler for sampler in SAMPLERS.values()} == set(CLASSES)
    for name in SAMPLERS:
        assert SchedulerConfig.from_dict(EULER).with_sampler(name).sampler == name


def test_defaulted_keys_follow_the_class():
    config = SchedulerConfig.from_dict({**EULER, "steps_offset": 3, "_use_default_values": ["steps_offset"]})
    assert config.get("timestep_spacing") == "linspace" and config.get("steps_offset") == 0
    ddim = config.with_sampler("ddim")
    assert ddim.get("timestep_spacing") == "leading" and ddim.get("beta_start") == 0.00085
    assert ddim.with_sampler("euler").to_dict() == config.to_dict()
    assert ddim.get("use_karras_sigmas") is None  # no key of DDIM's
    assert config.with_values(steps_offset=1).get("steps_offset") == 1


def test_unknown_names_are_named():
    config = SchedulerConfig.from_dict(EULER)
    with pytest.raises(UserError, match="did you mean dpmpp_2m"):
        plan(config, 10, sampler="dpmp_2m")
    with pytest.raises(UserError, match="did you mean karras"):
        plan(config, 10, schedule="karas")
    with pytest.raises(UserError, match="_class_name 'EulerScheduler' is not supported, did you mean"):
        SchedulerConfig.from_dict({"_class_name": "EulerScheduler"})
    with pytest.raises(UserError, match="_class_name None"):
        SchedulerConfig.from_dict({})
    with pytest.raises(UserError, match="num_inference_steps"):
        plan(config, 0)
    deis = SchedulerConfig.from_dict(
        {**EULER, "_class_name": "DEISMultistepScheduler", "solver_type": "logrho"}
    )
    with pytest.raises(UserError, match="name one"):
        plan(deis, 10)
    assert plan(deis, 10, sampler="unipc").sampler == "unipc"


@pytest.mark.parametrize(
    "class_name,key,value",
    [
        ("EulerDiscreteScheduler", "use_beta_sigmas", True),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "timestep_spacing", "bogus"),
        ("EulerDiscreteScheduler", "steps_offset", "1"),
        ("EulerDiscreteScheduler", "beta_start", None),
        ("EulerDiscreteScheduler", "prediction_type", "flow"),
        ("EulerDiscreteScheduler", "beta_schedule", "sigmoid"),
        ("DDPMScheduler", "variance_type", "learned"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "solver_type", "heun"),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("UniPCMultistepScheduler", "disable_corrector", [0]),
    ],
)
def test_unsupported_values_name_their_key(class_name, key, value):
    with pytest.raises(UserError, match=key):
        plan(SchedulerConfig.from_dict({"_class_name": class_name, key: value}), 10)


@pytest.mark.parametrize(
    "key,value",
    [
        ("beta_start", "x"),
        ("beta_end", [0.1]),
        ("num_train_timesteps", None),
        ("num_train_timesteps", 10.5),
        ("trained_betas", ["a"]),
        ("trained_betas", 0.1),
        ("beta_schedule", ["linear"]),
        ("prediction_type", None),
        ("rescale_betas_zero_snr", "yes"),
        ("_class_name", ["EulerDiscreteScheduler"]),
        ("_use_default_values", 3),
    ],
)
def test_values_of_another_type_name_file_and_key_on_reading(key, value):
    with pytest.raises(UserError, match=f"^a/folder: scheduler: {key} "):
        SchedulerConfig.from_dict({**EULER, key: value}, "a/folder: scheduler")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_step_counts_near_the_models_own_are_drawn_or_refused(name, spacing):
    """Whole timesteps run out there: two steps at one noise level divide by their distance, 0."""
    config = SchedulerConfig.from_dict({**EULER, "steps_offset": 1, "beta_schedule": "scaled_linear"})
    start = torch.randn(1, 1, 2, 2)
    for n in (500, 998, 999, 1000):
        try:
            steps = plan(config, n, name, spacing)
        except UserError as error:
            assert name != "euler" or spacing == "leading", error
            most = int(str(error).rpartition(" at most ")[2])
            assert str(error).startswith(f"num_inference_steps {n} would visit a noise level twice")
            steps = plan(config, most, name, spacing)
            assert 499 < most < n
        result = steps.sample(steps.denoiser(lambda x, t: 0.1 * x), lambda: start, latents=start)
        assert bool(result.isfinite().all()), n


def test_the_most_steps_possible_are_named():
    keys = {"_class_name": "PNDMScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    sd1 = SchedulerConfig.from_dict({**EULER, **keys, "beta_schedule": "scaled_linear"})
    for sampler, n, most in ((None, 1000, 999), ("dpmpp_2m", 1000, 998), ("dpmpp_2m", 999, 998)):
        with pytest.raises(UserError, match=f"num_inference_steps {n} .* at most {most}$"):
            plan(sd1, n, sampler)
    assert plan(sd1, 999).sigmas[-1] == plan(sd1, 20).sigmas[-1] > 0, "what remains may be repeated"
    still = sd1.with_values(steps_offset=0)  # the last timestep is 0, where what remains is the same
    assert plan(still, 20).sigmas[-2] == plan(still, 20).sigmas[-1]


def test_betas_stay_the_models_own():
    """Zero terminal SNR holds for the classes that have no key for it, too."""
    mapping = {
        "_class_name": "DDIMScheduler",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    config = SchedulerConfig.from_dict({**mapping, "beta_schedule": "scaled_linear"})
    for name in ("heun", "lms", "dpmpp_2s", "dpmpp_sde", "pndm"):
        assert plan(config, 10, sampler=name, schedule="trailing").sigmas[0] > 4000
    epsilon = config.with_values(prediction_type="epsilon")
    with pytest.raises(UserError, match="zero terminal SNR"):
        plan(epsilon, 10)


def test_a_schedule_that_diffusers_lacks_is_not_written():
    euler = SchedulerConfig.from_dict(EULER)
    assert euler.with_schedule("karras").to_dict()["use_karras_sigmas"] is True
    assert "use_karras_sigmas" not in euler.with_schedule("karras").with_schedule("trailing").to_dict()
    assert euler.with_sampler("ddim").with_schedule("trailing").to_dict()["timestep_spacing"] == "trailing"
    for config in (
        euler.with_schedule("align_your_steps"),
        euler.with_sampler("ddim").with_schedule("karras"),
        euler.with_sampler("dpmpp_2s").with_schedule("trailing"),
    ):
        with pytest.raises(UserError, match="has no schedule"):
            config.to_dict()


def test_any_sampler_takes_any_schedule():
    network = lambda x, t: torch.tanh(x)  # noqa: E731
    start = torch.randn(1, 3, 4, 4)
    for name in SAMPLERS:
        for schedule in (
            "leading",
            "trailing",
            "linspace",
            "karras",
            "exponential",
            "sgm_uniform",
            "align_your_steps",
        ):
            steps = plan(SchedulerConfig.from_dict(EULER), 5, name, schedule)
            result = steps.sample(steps.denoiser(network), lambda: torch.ones_like(start), latents=start)
            assert bool(result.isfinite().all()), (name, schedule)
