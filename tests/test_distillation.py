"""Distillation into few steps: losses by the papers' and diffusers' formulas, what is trained, exact resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import BATCHES, same_bits_after_kills
from test_training_diffusion import UNET
from test_training_finetune import pictures
from tiny import Family, tiny_pipeline_folder
from torch import Tensor
from training_runs import LOOP, write_config

from ldm.checkpoints.files import read_tensors
from ldm.errors import UserError
from ldm.system import System
from ldm.training.distillation.plain_model import TaughtPlain
from ldm.training.distillation.target import Pupil
from ldm.training.distributed import BatchGenerator
from ldm.training.objectives import distillation
from ldm.training.run import read_run, train

ALL = slice(None)
LORA = {"kind": "lora", "rank": 2, "targets": ".*"}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def text_setup(
    tmp: Path, family: Family = "sd1", scheduler: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """A config that distils a tiny text-to-image model."""
    base = tmp / "models" / family
    if not base.exists():
        tiny_pipeline_folder(tmp / "models", family, scheduler)
    data = {"kind": "pictures", "path": str(pictures(tmp / "pictures")), "resolution": 32}
    model = {"kind": "text_to_image", "base": str(base), "data": data, "train": settings.pop("train", LORA)}
    model |= {name: settings.pop(name) for name in ("time_cond_proj_dim",) if name in settings}
    model |= settings.pop("model", {})
    loop = {**LOOP, "optimizer": {"learning_rate": 1e-3, "warmup": 0}, **settings.pop("loop", {})}
    sections = {
        "loop": loop,
        "distillation": {"model": model, "method": {"kind": "latent_consistency"}, **settings},
    }
    return write_config(tmp, sections)


def built(path: Path, batch: int = 8) -> distillation.Objective:
    made = read_run(path).objective()
    assert isinstance(made, distillation.Objective)
    made.prepare(torch.device("cpu"), batch)
    return made


def moved(made: distillation.Objective) -> None:
    """Give the student's parameters other values than it begins with: a LoRA begins as its teacher."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in made.model.parameters():
            if each.requires_grad:
                each.add_(0.05 * torch.randn(each.shape, generator=generator))


# Latent consistency distillation


@pytest.mark.parametrize(
    ("scheduler", "method"),
    [
        ({}, {}),
        ({"prediction_type": "v_prediction"}, {"loss": "l2"}),
        (V, {"solver_steps": 40, "huber_c": 0.01}),
    ],
)
def test_the_loss_is_that_of_diffusers_lcm_script(
    tmp_path: Path, scheduler: dict[str, Any], method: dict[str, Any]
) -> None:
    """Its formulas in alpha and sigma, written out: DDIMSolver, the boundary scalings, guidance by w = scale - 1."""
    made = built(
        text_setup(
            tmp_path,
            scheduler=scheduler,
            guidance=[2.0, 6.0],
            method={"kind": "latent_consistency", **method},
        )
    )
    moved(made)
    batch = made.batch(0, 8, ALL)
    value, _ = made.loss(made.model, batch, BatchGenerator(5, 8, ALL))

    taught, draws, steps = made.taught, BatchGenerator(5, 8, ALL), method.get("solver_steps", 50)
    latents = taught.clean(batch[1])
    told = taught.told(batch[1], draws)  # draws nothing: each picture has one caption
    w = (2 + 4 * draws.uniform() - 1).view(-1, 1, 1, 1)
    noise, index = draws.normal(*latents.shape[1:]), draws.integers(steps)
    alphas_cumprod = _alphas(made)
    solver = (torch.arange(1, steps + 1) * (1000 / steps)).round().long() - 1
    start = solver[index]
    end = (start - 1000 // steps).clamp(min=0)
    before = torch.cat([alphas_cumprod[:1], alphas_cumprod[solver[:-1]]])[index]  # ddim_alpha_cumprods_prev

    def at(values: Tensor) -> Tensor:
        return values.float().view(-1, 1, 1, 1)

    alpha, sigma = at(alphas_cumprod[start].sqrt()), at((1 - alphas_cumprod[start]).sqrt())
    alpha_end, sigma_end = at(alphas_cumprod[end].sqrt()), at((1 - alphas_cumprod[end]).sqrt())
    noisy = alpha * latents + sigma * noise

    def parts(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The script's get_predicted_original_sample and get_predicted_noise."""
        if scheduler.get("prediction_type") == "v_prediction":
            return alpha * x - sigma * output, alpha * output + sigma * x
        return (x - sigma * output) / alpha, output

    def scalings(timestep: Tensor) -> tuple[Tensor, Tensor]:
        scaled = 10.0 * at(timestep)
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()

    def consistent(module: Any, x: Tensor, timestep: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        output = taught.call(module, x, timestep.float(), told)
        skip, out = scalings(timestep)
        return skip * x + out * parts(output, x, alpha, sigma)[0]

    with torch.no_grad():
        without = taught.without(told)
        cond = parts(taught.teacher(noisy, start.float(), told), noisy, alpha, sigma)
        uncond = parts(taught.teacher(noisy, start.float(), without), noisy, alpha, sigma)
        found, eps = (c + w * (c - u) for c, u in zip(cond, uncond, strict=True))
        previous = at(before).sqrt() * found + at(1 - before).sqrt() * eps  # DDIMSolver.ddim_step
        target = consistent(made.pupil.student, previous, end, alpha_end, sigma_end)
    error = consistent(made.pupil.student, noisy, start, alpha, sigma) - target
    c = method.get("huber_c", 0.001)
    loss = error.square() if method.get("loss") == "l2" else (error.square() + c**2).sqrt() - c
    assert value.item() == pytest.approx(loss.mean().item(), rel=1e-5)


def _alphas(made: distillation.Objective) -> Tensor:
    from ldm.diffusion.process import Discrete

    assert isinstance(made.process, Discrete)
    return made.process.schedule.alphas_cumprod


def test_only_the_student_learns_and_its_lora_is_a_model(tmp_path: Path) -> None:
    path = text_setup(tmp_path, guidance=3.0, loop={"pictures": 16, "save_every": 8})
    before = read_tensors(tmp_path / "models/sd1/unet/diffusion_pytorch_model.safetensors")
    before = {name: each.clone() for name, each in before.items()}
    assert train(path)
    export = tmp_path / "run" / "export"
    after = read_tensors(tmp_path / "models/sd1/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    made, teacher = System.load(export), System.load(tmp_path / "models/sd1")
    assert made.scheduler.sampler == "lcm"
    assert (made.options["num_inference_steps"], made.options["guidance_scale"]) == (4, 1.0)
    changed = [
        name
        for name, each in made.network.state_dict().items()
        if not torch.equal(each, teacher.network.state_dict()[name])
    ]
    assert any("attn1.to_q" in name for name in changed) and any("conv1" in name for name in changed)
    assert made.fingerprint != teacher.fingerprint
    assert (
        sorted(each.name for each in (tmp_path / "run").glob("*.png")) == []
    )  # no prompts: nothing is drawn


def test_a_whole_student_is_a_folder_that_diffusers_draws_with_lcm(tmp_path: Path) -> None:
    import diffusers

    path = text_setup(
        tmp_path, guidance=3.0, train={"kind": "unet"}, loop={"pictures": 8, "save_every": 8}, steps=[2]
    )
    assert train(path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "export", safety_checker=None)
    assert type(loaded.scheduler).__name__ == "LCMScheduler"
    assert loaded.scheduler.config["original_inference_steps"] == 50


def test_an_averaged_target_follows_once_a_step_and_lies_in_the_state(tmp_path: Path) -> None:
    """Song et al. 2023, algorithm 2: theta^- becomes mu theta^- + (1 - mu) theta after each step."""
    method = {"kind": "latent_consistency", "ema_decay": 0.5}
    made = built(text_setup(tmp_path, guidance=3.0, method=method))
    moved(made)
    pupil, name = made.pupil, next(n for n, p in made.model.named_parameters() if p.requires_grad)
    inner = name.removeprefix("student.")
    first = pupil.target().get_parameter(inner).clone()
    now = pupil.get_parameter(name)
    assert not torch.equal(first, now)
    made.loss(made.model, made.batch(0, 8, ALL), BatchGenerator(0, 8, ALL))
    assert torch.equal(pupil.target().get_parameter(inner), first)  # no step was taken yet
    for _ in range(2):  # two parts of one batch
        made.loss(made.model, made.batch(8, 8, ALL), BatchGenerator(0, 8, ALL))
    torch.testing.assert_close(pupil.target().get_parameter(inner), (first + now) / 2)
    assert all(not p.requires_grad for p in pupil.target().parameters())
    key = inner.replace(".", "/")
    assert any(each.endswith(key) for each in pupil.state_dict())


def test_a_target_without_an_average_is_the_student(tmp_path: Path) -> None:
    student = torch.nn.Linear(2, 2)
    assert Pupil(student, averaged=False).target() is student


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_killed_and_resumed_the_bits_are_the_same(tmp_path: Path, ema_decay: float | None) -> None:
    loop = {"pictures": 8 * BATCHES, "save_every": 8, "validate_every": 1000}
    method = {"kind": "latent_consistency", "ema_decay": ema_decay}
    paths = [
        text_setup(tmp_path / each, guidance=3.0, loop=loop, method=method) for each in ("whole", "killed")
    ]
    end = same_bits_after_kills(*paths, kills=2)
    assert any("average" in name for name in end) == (ema_decay is not None)


# Guidance


def test_a_student_that_is_told_the_scale_begins_as_its_teacher_and_is_drawn_with_it(tmp_path: Path) -> None:
    """Meng et al. 2023: w is an input; at the start it has no say, and after a step it has."""
    path = text_setup(
        tmp_path,
        train={"kind": "unet"},
        guidance=[2.0, 6.0],
        time_cond_proj_dim=16,
        loop={"pictures": 16, "save_every": 8},
        steps=[2],
    )
    made = built(path)
    assert made.taught.student_wants["guidance"] and "guidance" not in made.taught.wants
    batch = made.batch(0, 8, ALL)[1]
    told = made.taught.told(batch, BatchGenerator(0, 8, ALL))
    x, times = made.taught.clean(batch), torch.full((8,), 500.0)
    with torch.no_grad():
        first = made.taught.teacher(x, times, told)
        own = replace(told, guidance=torch.linspace(2, 6, 8))
        torch.testing.assert_close(made.taught.call(made.model, x, times, own), first)
    assert train(path)
    student = System.load(tmp_path / "run" / "export")
    assert student.options["guidance_scale"] == 4.0
    with torch.no_grad():
        low, high = (
            student.network(x, times, replace(told, guidance=torch.full((8,), each))) for each in (2.0, 6.0)
        )
    assert (low - high).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"time_cond_proj_dim": 16, "guidance": [2.0, 3.0]}, "set train.kind to unet"),
        ({"time_cond_proj_dim": 16, "train": {"kind": "unet"}}, "give two scales"),
        (
            {"time_cond_proj_dim": 1, "train": {"kind": "unet"}, "guidance": [2.0, 3.0]},
            "time_cond_proj_dim is 1",
        ),
    ],
)
def test_a_scale_that_can_not_be_told_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        built(text_setup(tmp_path, **settings))


# A model without text


def plain_teacher(tmp: Path, **settings: Any) -> Path:
    """A digits' model that was trained for a moment."""
    (tmp / "teacher").mkdir(parents=True)
    settings = {"data": {"kind": "digits"}, "network": UNET, "validation_pictures": 8, **settings}
    loop = {**LOOP, "pictures": 16, "validate_every": 1000}
    assert train(write_config(tmp / "teacher", {"loop": loop, "diffusion": settings}))
    return tmp / "teacher" / "run" / "export"


def plain_setup(tmp: Path, teacher: Path, **settings: Any) -> Path:
    model = {"kind": "plain", "base": str(teacher), "data": {"kind": "digits"}, **settings.pop("model", {})}
    loop = {**LOOP, "pictures": 16, **settings.pop("loop", {})}
    settings = {"method": {"kind": "latent_consistency"}, "steps": [1, 2], **settings}
    return write_config(tmp, {"loop": loop, "distillation": {"model": model, **settings}})


def test_a_model_of_classes_is_distilled_under_guidance_and_drawn(tmp_path: Path) -> None:
    from pipelines import ClassToImagePipeline

    teacher = plain_teacher(tmp_path, condition={"kind": "labels"})
    path = plain_setup(
        tmp_path,
        teacher,
        guidance=2.0,
        model={"condition": {"kind": "labels"}, "pictures": 10},
        loop={"validate_every": 16},
    )
    assert train(path)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "run" / "export")
    assert pipe.system.options["num_inference_steps"] == 2
    assert pipe.system.process.to_dict()["_class_name"] == "LCMScheduler"
    drawn = sorted(each.name for each in (tmp_path / "run").glob("drawn-*"))
    assert drawn == ["drawn-00000016-1-steps.png", "drawn-00000016-2-steps.png"]


def test_a_new_model_has_no_class_of_nothing_which_it_would_never_learn(tmp_path: Path) -> None:
    """Guidance would go away from weights that stay as they were drawn."""
    method = {"kind": "consistency_training", "levels": {"kind": "fixed", "levels": 4}}
    labels = {"base": {"network": UNET}, "condition": {"kind": "labels", "dropout": 0.1}}
    made = built(plain_setup(tmp_path, tmp_path, model=labels, method=method))
    assert isinstance(made.taught, TaughtPlain)
    assert made.taught.system.wants["labels"] == 10 and made.taught.system.null_label is None
    batch = made.batch(0, 8, ALL)[1]
    with pytest.raises(UserError, match="never learned without a class"):
        made.taught.without(made.taught.told(batch, BatchGenerator(0, 8, ALL)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance": 2.0}, "nothing to guide by"),
        ({"guidance": [3.0, 2.0]}, "the lower scale first"),
        ({"guidance": -1.0}, "distillation.guidance is -1.0"),
        ({"steps": []}, "one or more numbers of steps"),
        ({"steps": [51]}, "num_inference_steps 51"),
        ({"method": {"kind": "latent_consistency", "solver_steps": 1}}, "solver_steps is 1"),
        ({"method": {"kind": "latent_consistency", "solver_steps": 600}}, "solver_steps, 600, do not divide"),
        ({"method": {"kind": "latent_consistency", "ema_decay": 2.0}}, "ema_decay must be"),
        ({"method": {"kind": "latent_consistency", "ema_decay": 1.0}}, "ema_decay must be"),
        ({"method": {"kind": "latent_consistency", "huber_c": 1e200}}, "huber_c is"),
        ({"method": {"kind": "latent_consistency", "timestep_scaling": 1e7}}, "timestep_scaling is"),
        ({"method": {"kind": "consistency_distillation", "huber_c": 0.0}}, "huber_c is 0.0"),
        ({"method": {"kind": "consistency_distillation", "huber_c": 1e200}}, "huber_c is"),
        (
            {"method": {"kind": "consistency_distillation", "levels": {"kind": "fixed", "levels": 10**12}}},
            "levels must be",
        ),
        (
            {
                "method": {
                    "kind": "consistency_distillation",
                    "levels": {"kind": "doubling", "pictures": 8, "end": 10**12},
                }
            },
            "start <= end < 100,000",
        ),
        ({"model": {"condition": {"kind": "labels"}}}, "takes no labels"),
        ({"model": {"base": "nowhere"}}, "there is no folder nowhere"),
    ],
)
def test_settings_that_can_not_be_get_one_line(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    path = plain_setup(tmp_path, plain_teacher(tmp_path), **settings)
    with pytest.raises(UserError, match=words) as caught:
        built(path)
    assert "\n" not in str(caught.value)


def test_the_teacher_of_another_condition_or_process_is_refused(tmp_path: Path) -> None:
    teacher = plain_teacher(tmp_path, process={"kind": "vp"})
    with pytest.raises(UserError, match="discrete timesteps"):
        built(plain_setup(tmp_path, teacher))


def test_text_settings_that_can_not_be_get_one_line(tmp_path: Path) -> None:
    path = text_setup(tmp_path, train={**LORA, "text_encoder": True})
    with pytest.raises(UserError, match="its teacher's text encoder"):
        built(path)


def test_a_lora_of_a_few_step_form_is_refused_for_what_it_exports_could_not_be_loaded(tmp_path: Path) -> None:
    path = text_setup(tmp_path)
    base = tmp_path / "models" / "sd1"
    (base / "few_steps.json").write_text("{}")
    with pytest.raises(UserError, match=r"distillation.model.base .* is a few-step form itself"):
        built(path)
