"""Consistency distillation and training: exact functions of Gaussians, the papers' losses recomputed, runs."""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from killed import BATCHES, same_bits_after_kills
from test_training_diffusion import UNET, write_folder_of_classes
from torch import Tensor
from training_runs import TINY_VAE

from ldm.checkpoints.folder import write_component
from ldm.condition import Condition
from ldm.diffusion import consistency
from ldm.diffusion.consistency import Doubling, Fixed, Growing
from ldm.diffusion.edm_processes import ConsistencyConfig, EDMConfig
from ldm.diffusion.process import DDPMConfig
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.points import PointConfig, PointNetwork
from ldm.system.plain import PlainSystem
from ldm.training.distillation.consistency import ConsistencyDistillation, ConsistencyTraining
from ldm.training.distillation.lesson import Estimate, Lesson
from ldm.training.distributed import BatchGenerator
from ldm.training.objectives import distillation
from ldm.training.run import read_run, train
from tests.closed_forms import Mixture

MEAN, STD, EPS = torch.tensor([0.3, -0.2], dtype=torch.float64).view(1, 2, 1, 1), 0.7, 0.002
GAUSSIAN = Mixture.of([1.0], [[0.3, -0.2]], [STD])
PROCESS = ConsistencyConfig()


def gain(sigma: Tensor) -> Tensor:
    """By how much the ODE of a Gaussian draws a point at sigma (B,) to the mean on its way to EPS."""
    return ((STD**2 + EPS**2) / (STD**2 + sigma**2)).sqrt().view(-1, 1, 1, 1)


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """The Gaussian's consistency function."""
    return MEAN + (x - MEAN) * gain(sigma)


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Its denoiser, at noise levels that are each row's own."""
    return MEAN + (x - MEAN) * (STD**2 / (STD**2 + sigma**2)).view(-1, 1, 1, 1)


def lesson(student: Estimate, target: Estimate) -> Lesson:
    return Lesson(student, target, denoise, PROCESS)


def losses(method: Any, student: Estimate, target: Estimate, count: int = 4000) -> Tensor:
    torch.manual_seed(0)
    x0 = GAUSSIAN.draw(count)
    return method.losses(lesson(student, target), x0, BatchGenerator(1, count, slice(None)), seen=0)


def test_the_closed_forms_are_those_of_the_mixture():
    x, sigma = torch.randn(4, 2, 1, 1).double(), torch.full((4,), 1.7).double()
    assert torch.allclose(denoise(x, sigma), GAUSSIAN.denoise(x, sigma))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_of_the_exact_function_the_loss_is_the_solvers_error(solver: Literal["heun", "euler"], order: int):
    """A step's error is of order h^(p + 1), and the loss its square: halved steps divide it by 2^(2p + 2)."""
    each = [
        losses(
            ConsistencyDistillation(Fixed(count), solver=solver, metric="l2", drawn="uniform"), exact, exact
        ).mean()
        for count in (161, 321)
    ]
    # 160 steps divide the way from 80 to 0.002 by 1.07 each; what is left of the order above is within that share.
    assert math.log2(each[0] / each[1]) == pytest.approx(2 * order + 2, rel=0.07)


@pytest.mark.parametrize("metric", ["l2", "huber"])
@pytest.mark.parametrize("power", [0.8, 1.25])
def test_the_gradient_points_to_the_exact_function(metric: Literal["l2", "huber"], power: float):
    """Students whose gain is a power of the exact one, which is the boundary's at EPS whatever the power."""
    theta = torch.tensor(power, dtype=torch.float64, requires_grad=True)

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return MEAN + (x - MEAN) * gain(sigma) ** theta

    def target(x: Tensor, sigma: Tensor) -> Tensor:
        return student(x, sigma).detach()

    for method in (
        ConsistencyDistillation(Fixed(18), metric=metric),
        ConsistencyTraining(Fixed(18), metric="l2", weighting="unit"),
    ):
        (slope,) = torch.autograd.grad(losses(method, student, target).mean(), theta)
        assert slope * (power - 1) > 0, (method.kind, slope)


@pytest.mark.parametrize("weighting", ["unit", "step"])
def test_training_without_a_teacher_has_the_gradient_of_distillation(weighting: Literal["unit", "step"]):
    """In expectation (Song et al. 2023, theorem 2); of a linear student and Euler's step at any N, not in the limit.

    The mean of x_low under x_high is where Euler's step of the exact denoiser leads, and the student's target is linear
    in it.
    """
    count = 40_000
    rows = torch.full(
        (count,), 3.0, dtype=torch.float64, requires_grad=True
    )  # one for each: its own gradient

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return MEAN + (x - MEAN) * gain(sigma) ** rows.view(-1, 1, 1, 1)

    def target(x: Tensor, sigma: Tensor) -> Tensor:
        return student(x, sigma).detach()

    how: dict[str, Any] = {"metric": "l2", "weighting": weighting, "drawn": "lognormal"}
    found = []
    for method in (
        ConsistencyDistillation(Fixed(11), solver="euler", **how),
        ConsistencyTraining(Fixed(11), **how),
    ):
        found.append(torch.autograd.grad(losses(method, student, target, count).sum(), rows)[0])
    distilled, trained = found
    error = (trained - distilled).std() / math.sqrt(count)
    assert abs((trained - distilled).mean()) < 5 * error
    assert distilled.mean() > 10 * error  # there is something to agree on


def test_processes_and_targets():
    teacher = EDMConfig(timestep_scale=1.0).process()
    made = ConsistencyDistillation(Fixed(40), clip_denoised=False).process(teacher)
    assert made == ConsistencyConfig(40, clip_denoised=False, timestep_scale=1.0)
    assert ConsistencyTraining(Doubling(100, 10, 160)).process(DDPMConfig().process()) == ConsistencyConfig(
        161
    )
    with pytest.raises(UserError, match=r"the teacher knows noise levels from 0\.01"):
        ConsistencyDistillation().process(DDPMConfig().process())
    assert ConsistencyDistillation(Fixed(40, 0.0)).averaging(5) is None
    assert ConsistencyTraining(Growing(100)).averaging(0) == pytest.approx(0.9)


def teacher_folder(folder: Path, classes: bool = False) -> Path:
    torch.manual_seed(0)
    network = PointNetwork(PointConfig(block_out_channels=(16, 16), num_class_embeds=2 if classes else None))
    names = ["upper", "lower"] if classes else []
    PlainSystem(network, EDMConfig(timestep_scale=1000).process(), labels=names).save(folder)
    return folder


def settings(method: dict[str, Any], base: Any, classes: bool = False) -> dict[str, Any]:
    return {
        "model": {
            "kind": "plain",
            "base": base,
            "data": {"kind": "toys", "shape": "two_moons"},
            "condition": {"kind": "labels" if classes else "nothing"},
            "pictures": 16,
        },
        "method": {"clip_denoised": False, **method},
        "steps": [1, 2],
    }


def written(folder: Path, objective: dict[str, Any], **loop: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"pictures": 64, "batch_size": 16, "precision": "no", "save_every": 16, "validate_every": 32}
    whole |= loop
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "run"), "loop": whole, "distillation": objective}))
    return path


FIXED = {"kind": "fixed", "levels": 6}
DISTILL = {"kind": "consistency_distillation", "levels": FIXED}
GROW = {"kind": "growing", "pictures": 64, "start": 2, "end": 12, "decay": 0.9}
TRAIN = {"kind": "consistency_training", "levels": GROW}
NEW = {"network": {"kind": "points", "block_out_channels": [16, 16]}}


@pytest.mark.parametrize("classes", [False, True])
def test_the_loss_of_a_network_is_the_papers(tmp_path: Path, classes: bool):
    """Algorithm 2 of Song et al. 2023 with Heun's solver, recomputed with bare calls of the networks."""
    base = str(teacher_folder(tmp_path / "teacher", classes))
    objective = read_run(written(tmp_path, settings(DISTILL, base, classes))).objective()
    assert isinstance(objective, distillation.Objective)
    for parameter in objective.pupil.student.parameters():  # another than the teacher
        parameter.data += 0.02 * torch.randn_like(parameter)
    objective.prepare(torch.device("cpu"), 16)
    batch = objective.batch(0, 16, slice(None))
    found, _ = objective.loss(objective.model, batch, BatchGenerator(3, 16, slice(None)))

    rng = BatchGenerator(3, 16, slice(None))
    noise, share = rng.normal(2, 1, 1), rng.uniform()
    sigmas = (80 ** (1 / 7) + torch.arange(6).double() / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))).flip(0) ** 7
    step = (share * 5).long()
    low, high = (sigmas[each].float().view(-1, 1, 1, 1) for each in (step, step + 1))
    told = Condition(labels=batch[1].labels) if classes else Condition()

    def network(module: Any, x: Tensor, s: Tensor) -> Tensor:
        return module(x / (s**2 + 0.25).sqrt(), 250 * s.flatten().double().log().float(), told)

    def teacher(x: Tensor, s: Tensor) -> Tensor:
        f = network(objective.taught.teacher, x, s)
        return 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * f

    def student(x: Tensor, s: Tensor) -> Tensor:
        f = network(objective.pupil.student, x, s)
        above = s - 0.002
        return 0.25 / (above**2 + 0.25) * x + 0.5 * above / (s**2 + 0.25).sqrt() * f

    x = batch[1].pictures + high * noise
    slope = (x - teacher(x, high)) / high
    end = x + (low - high) * slope
    end = x + (low - high) * (slope + (end - teacher(end, low)) / low) / 2
    apart = (student(x, high) - student(end, low)).square().flatten(1).sum(1)
    c = 0.00054 * math.sqrt(2)
    expected = ((apart.double() + c**2).sqrt() - c).mean()
    # float32: states of up to 80 near a picture of size 1, twice.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("method", "new"), [(DISTILL, False), (TRAIN, True), (TRAIN, False)])
def test_a_run_and_what_it_exports(tmp_path: Path, method: dict[str, Any], new: bool):
    base = NEW if new else str(teacher_folder(tmp_path / "teacher"))
    path = written(tmp_path, settings(method, base))
    assert train(path)
    drawn = sorted(each.name for each in (tmp_path / "run").glob("drawn*"))
    assert drawn and all("steps" in each for each in drawn)
    system = PlainSystem.load(tmp_path / "run" / "export")
    last = 6 if method is DISTILL else 13
    assert system.process == ConsistencyConfig(last, clip_denoised=False)
    assert system.options["num_inference_steps"] == 2


def test_training_from_nothing_in_latents_of_a_first_stage(tmp_path: Path):
    vae = AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE))
    write_component(tmp_path / "first", "vae", vae.config.to_diffusers(), vae.state_dict())
    write_folder_of_classes(tmp_path / "pictures")
    data = {
        "kind": "pictures",
        "path": str(tmp_path / "pictures"),
        "resolution": 16,
        "label_column": "folder",
    }
    given = settings(TRAIN, {"network": UNET, "autoencoder": str(tmp_path / "first")}, classes=True)
    given["model"] |= {"data": data, "pictures": 4}
    assert train(written(tmp_path, given, pictures=16))
    system = PlainSystem.load(tmp_path / "run" / "export")
    assert system.shape == (4, 8, 8) and system.labels == ["cat", "dog"] and system.autoencoder is not None


def test_killed_and_resumed_with_a_target_it_ends_in_the_same_bits(tmp_path: Path):
    """The average that is the target is in the state, and N is a function of the pictures seen."""
    base = str(teacher_folder(tmp_path / "teacher"))
    method = {**DISTILL, "levels": {**GROW, "pictures": 16 * BATCHES}}
    paths = [
        written(tmp_path / name, settings(method, base), pictures=16 * BATCHES)
        for name in ("whole", "killed")
    ]
    end = same_bits_after_kills(paths[0], paths[1], 2)
    average = {key: each for key, each in end.items() if "average" in key and key.endswith("out/weight")}
    assert average  # and it is another than the student
    student = next(each for key, each in end.items() if key.endswith("student.out.weight"))
    assert all(not torch.equal(each, student) for each in average.values())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": {**DISTILL, "levels": {"kind": "fixed", "levels": 1}}}, "levels must be at least 2"),
        ({"method": {**DISTILL, "sigma_max": 900.0}}, "the teacher knows noise levels"),
        ({"method": DISTILL, "model": {"base": NEW}}, "has a teacher"),
        ({"method": TRAIN, "guidance": 2.0}, "guidance"),
        ({"method": TRAIN, "steps": [1, 14]}, "between 1 and 13"),
        ({"method": TRAIN, "model": {"base": {"network": {"kind": "unet2d"}}}}, "kind points"),
    ],
)
def test_settings_that_can_not_be_are_refused_in_one_line(tmp_path: Path, changed: dict[str, Any], said: str):
    given = settings({}, str(teacher_folder(tmp_path / "teacher")))
    given = {**given, **changed, "model": {**given["model"], **changed.get("model", {})}}
    with pytest.raises(UserError, match=said):
        read_run(written(tmp_path, given)).objective()


def test_the_levels_of_a_step_are_those_of_the_moment():
    """N grows with the pictures seen, and every step's two levels are neighbours among that many."""
    method = ConsistencyTraining(Doubling(800, 10, 80), drawn="uniform", weighting="unit", metric="l2")
    for seen, count in ((0, 11), (200, 21), (799, 81)):
        asked: list[Tensor] = []

        def note(x: Tensor, sigma: Tensor, asked: list[Tensor] = asked) -> Tensor:
            asked.append(sigma)
            return x

        x0 = torch.zeros(64, 2, 1, 1, dtype=torch.float64)
        method.losses(lesson(note, note), x0, BatchGenerator(1, 64, slice(None)), seen)
        levels = consistency.levels(count)
        places = [torch.searchsorted(levels, each - 1e-9) for each in asked]
        assert torch.equal(places[0], places[1] + 1)
        assert all(torch.allclose(levels[at], each) for at, each in zip(places, asked, strict=True))
