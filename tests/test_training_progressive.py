"""Progressive distillation: the loss by the paper's formula, the levels that a student is drawn on, its rounds."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distillation import ALL, LORA, V, built, moved, plain_setup, plain_teacher, text_setup

from ldm.checkpoints.files import read_tensors
from ldm.diffusion.process import DDPMConfig, Discrete
from ldm.errors import UserError
from ldm.system import System
from ldm.system.plain import PlainSystem
from ldm.training.cli import describe
from ldm.training.distillation.progressive import Progressive
from ldm.training.distributed import BatchGenerator
from ldm.training.run import read_run, train

COSINE = {"kind": "ddpm", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def progressive_setup(tmp: Path, teacher: Path, *steps: int, **settings: Any) -> Path:
    method = {"kind": "progressive", "steps": list(steps), **settings.pop("method", {})}
    return plain_setup(tmp, teacher, method=method, **settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in read_tensors(folder / WEIGHTS).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one"])
def test_the_loss_is_the_papers_in_its_alpha_and_sigma(tmp_path: Path, weighting: str) -> None:
    """Salimans & Ho 2022, algorithm 2, on a discrete process: z = alpha x + sigma eps at t, two steps of DDIM."""
    teacher = plain_teacher(tmp_path, process=COSINE, condition={"kind": "labels", "dropout": 0.1})
    method = {"teacher_steps": 2, "weighting": weighting}
    path = progressive_setup(
        tmp_path, teacher, 4, method=method, guidance=2.0, model={"condition": {"kind": "labels"}}
    )
    made = built(path)
    moved(made)
    batch = made.batch(0, 8, ALL)
    value, _ = made.loss(made.model, batch, BatchGenerator(5, 8, ALL))

    draws, taught = BatchGenerator(5, 8, ALL), made.taught
    x, told = taught.clean(batch[1]), taught.told(batch[1], BatchGenerator(0, 8, ALL))
    draws.uniform()  # the scale
    eps, step = draws.normal(*x.shape[1:]), draws.integers(4)
    assert isinstance(made.process, Discrete)
    bar = made.process.schedule.alphas_cumprod
    steps = [999 - 250 * step - 125 * k for k in range(3)]
    alphas = [torch.where(t < 0, 1.0, bar[t.clamp(min=0)]).sqrt().float().view(-1, 1, 1, 1) for t in steps]
    sigmas = [(1 - each**2).sqrt() for each in alphas]

    def v(module: Any, z: torch.Tensor, k: int, told: Any) -> torch.Tensor:
        return taught.call(module, z, steps[k].float(), told)

    def x_hat(output: torch.Tensor, z: torch.Tensor, k: int) -> torch.Tensor:
        return alphas[k] * z - sigmas[k] * output

    with torch.no_grad():
        z = begin = alphas[0] * x + sigmas[0] * eps
        for k in range(2):
            with_, without = (v(taught.teacher, z, k, each) for each in (told, taught.without(told)))
            found = x_hat(without + 2.0 * (with_ - without), z, k)
            z = alphas[k + 1] * found + sigmas[k + 1] / sigmas[k] * (z - alphas[k] * found)
        ratio = sigmas[2] / sigmas[0]
        wanted = (z - ratio * begin) / (alphas[2] - ratio * alphas[0])
    error = x_hat(v(made.pupil.student, begin, 0, told), begin, 0) - wanted
    snr = (alphas[0] / sigmas[0]).square().flatten()
    weight = snr.clamp(min=1) if weighting == "truncated_snr" else snr + 1
    expected = (weight * error.square().flatten(1).mean(1)).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"rescale_betas_zero_snr": True}, {"num_train_timesteps": 1024}])
@pytest.mark.parametrize("steps", [64, 12, 8, 3, 1])
def test_a_student_is_drawn_on_the_levels_that_it_learned_by_diffusers_too(
    settings: dict[str, Any], steps: int
) -> None:
    import diffusers

    teacher = DDPMConfig(prediction_type="v_prediction", clip_sample=True, **settings).process()
    odd = replace(teacher, scheduler=teacher.scheduler.with_values(steps_offset=1, use_karras_sigmas=True))
    method = Progressive(steps=(steps,), teacher_steps=2)
    process = method.process(odd)
    levels = method.levels(process)
    drawn: Any = process.plan(steps)
    assert list(drawn.sigmas) == levels[::2].tolist() and len(levels) == 2 * steps + 1
    assert drawn.sampler == ("euler" if settings.get("num_train_timesteps", 1000) % steps else "ddim")
    x, visited, ends = torch.randn(1, 1, 2, 2), list[float](), list[torch.Tensor]()

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        visited.append(timestep.item())
        return torch.sin(3 * x)

    ends.append(drawn.sample(drawn.denoiser(network), lambda: x))
    written = process.to_dict()
    scheduler: Any = getattr(diffusers, written["_class_name"]).from_config(written)
    scheduler.set_timesteps(steps)
    state = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        state = scheduler.step(network(scheduler.scale_model_input(state, t), t), t, state).prev_sample
    assert visited[:steps] == visited[steps:]
    assert visited[:steps] == process.schedule.timestep(levels[:-1:2]).tolist()
    # What float32 rounds of a state at the first level, diffusers' Euler keeps in all of its steps.
    atol = 1e-4 + (2.0**-21 * drawn.sigmas[0] if drawn.sampler == "euler" else 0)
    torch.testing.assert_close(ends[0], state, rtol=1e-4, atol=atol)


def test_the_teachers_levels_of_a_round_are_those_that_the_round_before_learned() -> None:
    teacher = DDPMConfig(prediction_type="v_prediction").process()
    whole = Progressive(steps=(60, 20, 10, 1), teacher_steps=3)
    methods = [method for _, method in whole.rounds()]
    assert [(each.steps, each.teacher_steps) for each in methods] == [
        ((60,), 3),
        ((20,), 3),
        ((10,), 2),
        ((1,), 10),
    ]
    for before, after in pairwise(methods):
        known = before.levels(before.process(teacher))[:: before.teacher_steps]
        assert torch.equal(after.levels(after.process(teacher)), known)


def test_rounds_of_a_guided_teacher_of_classes(tmp_path: Path) -> None:
    teacher = plain_teacher(tmp_path, process=COSINE, condition={"kind": "labels", "dropout": 0.1})
    model = {"condition": {"kind": "labels"}, "pictures": 10}
    path = progressive_setup(tmp_path, teacher, 4, 2, guidance=2.0, model=model, loop={"validate_every": 16})
    run = read_run(path)
    assert "round-4 (this one), round-2 (to come)" in describe(run)
    assert train(path)
    assert "round-4 (finished), round-2 (finished)" in describe(run)
    out = tmp_path / "run"
    first, last = PlainSystem.load(out / "round-4" / "export"), PlainSystem.load(out / "export")
    assert [each.options["num_inference_steps"] for each in (first, last)] == [4, 2]
    assert last.options["guidance_scale"] == 1.0
    assert last.process.to_dict()["_class_name"] == "DDIMScheduler"
    assert same(weights(out / "export"), weights(out / "round-2" / "export"))
    assert not same(weights(teacher), weights(out / "round-4" / "export"))
    drawn = sorted(each.name for each in out.glob("round-*/*.png"))
    assert drawn == [f"drawn-00000016-{steps}-steps.png" for steps in (1, 1, 2, 2, 4)]
    # Each round's config is a run of one round, with what it began from.
    rounds = [read_run(out / name / "config.yaml") for name in ("round-4", "round-2")]
    assert [each.settings.guidance for each in rounds] == [2.0, None]
    assert [each.settings.model.base for each in rounds] == [str(teacher), str(out / "round-4" / "export")]
    assert [each.rounds() for each in rounds] == [[each] for each in rounds]
    assert read_run(out / "config.yaml").resolved == run.resolved
    # One more round takes nothing from those that are finished.
    before = weights(out / "round-2" / "export")
    assert train(path, ["distillation.method.steps=[4, 2, 1]"])
    assert same(weights(out / "round-2" / "export"), before)
    assert same(weights(out / "export"), weights(out / "round-1" / "export"))
    assert not same(weights(out / "export"), before)


def test_a_text_model_keeps_float32_between_rounds(tmp_path: Path) -> None:
    method = {"kind": "progressive", "steps": [2, 1]}
    path = text_setup(
        tmp_path,
        scheduler=V,
        guidance=3.0,
        train={"kind": "unet"},
        loop={"pictures": 8, "save_every": 8},
        method=method,
    )
    assert train(path)
    kinds = [
        {each.dtype for each in read_tensors(tmp_path / "run" / name / WEIGHTS).values()}
        for name in ("round-2/export", "round-1/export", "export")
    ]
    assert kinds == [{torch.float32}, {torch.float16}, {torch.float16}]
    assert System.load(tmp_path / "run" / "export").options["num_inference_steps"] == 1


def test_a_student_that_is_told_the_scale_is_told_it_in_every_round(tmp_path: Path) -> None:
    """The first teacher is guided by two passes, the later ones by what they are told."""
    path = text_setup(
        tmp_path,
        scheduler=V,
        guidance=[2.0, 6.0],
        train={"kind": "unet"},
        time_cond_proj_dim=8,
        loop={"pictures": 8, "save_every": 8},
        method={"kind": "progressive", "steps": [2, 1]},
    )
    with pytest.raises(UserError, match="the student is told it: give two scales"):
        train(path, ["distillation.guidance=3.0"])
    first, second = read_run(path).rounds()
    assert first.settings.guidance == second.settings.guidance == (2.0, 6.0)
    begun: Any = first.objective()
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 0.5])
    told = begun.taught.told(begun.taught.batch(0, 2, ALL), BatchGenerator(0, 2, ALL))
    begun.prepare(torch.device("cpu"), 2)
    scales = [torch.tensor(each) for each in ((2.0, 2.0), (6.0, 6.0), (4.0, 6.0))]
    with torch.no_grad():
        low, high, mixed = [begun._teacher(told, each)(x, sigma) for each in scales]
    torch.testing.assert_close(mixed, torch.stack([(low[0] + high[0]) / 2, high[1]]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(low, high, atol=1e-2)
    assert train(path)
    made = System.load(tmp_path / "run" / "export")
    assert "guidance" in made.wants and made.options["guidance_scale"] == 4.0
    later: Any = second.objective()
    later.prepare(torch.device("cpu"), 2)
    assert later.taught.teacher.config.time_cond_proj_dim == 8
    seen = list[int]()
    later.taught.teacher.conv_in.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    with torch.no_grad():
        drawn = [later._teacher(told, each)(x, sigma) for each in scales[:2]]
    assert seen == [2, 2] and not torch.equal(*drawn)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": {"steps": [4, 3]}}, "a round of 3 steps after one of 4"),
        ({"method": {"steps": [2, 4]}}, "a round of 4 steps after one of 2"),
        ({"method": {"steps": []}}, "one or more numbers of steps"),
        ({"method": {"steps": [2, 0]}}, "each 1 or more"),
        ({"method": {"teacher_steps": 0}}, "teacher_steps is 0"),
        ({"method": {"steps": [501]}}, "more than the model's 1000 timesteps"),
        ({"guidance": [1.0, 2.0], "model": {"condition": {"kind": "labels"}}}, "told no scale"),
    ],
)
def test_settings_that_can_not_be_get_one_line(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    condition = settings.get("model", {}).get("condition", {"kind": "nothing"})
    teacher = plain_teacher(
        tmp_path, condition={**condition, **({"dropout": 0.1} if condition["kind"] == "labels" else {})}
    )
    with pytest.raises(UserError, match=words) as caught:
        train(progressive_setup(tmp_path, teacher, 2, **settings))
    assert "\n" not in str(caught.value)


def test_what_can_not_be_taught_in_rounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="discrete timesteps"):
        built(progressive_setup(tmp_path, plain_teacher(tmp_path, process={"kind": "vp"}), 2))
    learned = {"process": {**COSINE, "variance_type": "learned_range"}, "loss": {"variance": True}}
    with pytest.raises(UserError, match="learned its variance"):
        built(progressive_setup(tmp_path, plain_teacher(tmp_path / "learned", **learned), 2))
    path = text_setup(tmp_path, train=LORA, method={"kind": "progressive", "steps": [2, 1]})
    with pytest.raises(UserError, match=r"model\.train: rounds follow each other in the whole weights"):
        train(path)
