"""Systems without text: from and to disk, drawn with as diffusers does, by classes' names and numbers; the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.condition import Condition
from ldm.diffusion.process import DDPMConfig, read_process
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.models.points import PointConfig, PointNetwork
from ldm.models.unet2d import UNet2D
from ldm.models.unet2d_config import UNet2DConfig
from ldm.system.plain import PlainSystem
from pipelines.class_cli import main
from pipelines.class_to_image import ClassToImagePipeline

TINY = UNet2DConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
)


def randomised(network: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


def system(classes: int = 3, null: bool = True, **process: Any) -> PlainSystem:
    from dataclasses import replace

    rows = classes + null if classes else None
    network = randomised(UNet2D(replace(TINY, num_class_embeds=rows)))
    names = ["cat", "dog", "fox", "owl"][:classes]
    return PlainSystem(network, DDPMConfig(**process).process(), labels=names)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
@torch.no_grad()
def test_an_unconditional_one_is_diffusers_ddpm_pipeline(
    tmp_path: Path, prediction_type: str, clip_sample: bool
) -> None:
    """Saved by us it is read and drawn with by diffusers, saved by diffusers by us: the same picture."""
    import diffusers

    made = system(0, prediction_type=prediction_type, clip_sample=clip_sample)
    made.save(tmp_path / "ours")
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    theirs.set_progress_bar_config(disable=True)
    # The same noise as ours: from a CPU generator, image by image.
    drawn = theirs(
        batch_size=1, generator=torch.Generator().manual_seed(5), num_inference_steps=10, output_type="np"
    ).images
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        pipe = ClassToImagePipeline.from_pretrained(tmp_path / folder, device="cpu")
        ours = pipe(seed=5, num_inference_steps=10, output_type="np").images
        # diffusers' own scale: the state of DDPM is of unit variance, ours is x0 + sigma * noise; a few roundings.
        assert abs(ours - drawn).max() < 2e-4


@torch.no_grad()
def test_classes_by_name_and_by_number_and_a_picture_depends_on_its_seed_and_class_only() -> None:
    pipe = ClassToImagePipeline(system())
    how: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "raw"}
    all_of_them = pipe(seed=7, **how)
    assert all_of_them.classes == [0, 1, 2] and all_of_them.seeds == [7, 8, 9]
    alone = pipe("dog", seed=8, **how).images
    assert torch.allclose(alone[0], all_of_them.images[1], rtol=1e-4, atol=1e-3)  # of values of some tens
    assert torch.equal(pipe(1, seed=8, **how).images, alone)
    assert not torch.allclose(pipe("cat", seed=8, **how).images, alone, atol=1e-2)
    twice = pipe(["owl", "cat"][1:], num_images=2, seed=3, **how)
    assert twice.classes == [0, 0] and not torch.allclose(twice.images[0], twice.images[1], atol=1e-2)


@torch.no_grad()
def test_guidance_extrapolates_from_the_null_class() -> None:
    """uncond + scale * (cond - uncond) of one prediction, recomputed (Ho & Salimans 2022, eq. 6)."""
    made = system()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 3.0])
    labels = torch.tensor([2, 0])
    drawing = made.process.plan(2)
    timestep = made.process.schedule.timestep(sigma.double()).float()
    scaled = x / (1 + sigma[:, None, None, None] ** 2).sqrt()
    conditional = made.network(scaled, timestep, Condition(labels=labels))
    unconditional = made.network(scaled, timestep, Condition(labels=torch.tensor([3, 3])))
    wanted = x - sigma[0] * (unconditional + 2.5 * (conditional - unconditional))

    from ldm.condition import concatenate
    from ldm.diffusion.denoiser import answered
    from ldm.diffusion.guidance import classifier_free

    told = Condition(labels=labels)
    both = concatenate([made.without(told), told])
    denoise = classifier_free(drawing.denoiser(made.bind(both)), 2.5)
    found = denoise(x, sigma)
    assert not isinstance(found, torch.Tensor)
    assert torch.allclose(answered(found), wanted, atol=1e-4)


def test_a_saved_system_comes_back_whole(tmp_path: Path) -> None:
    made = system(variance_type="fixed_large")
    made.save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["id2label"] == {"0": "cat", "1": "dog", "2": "fox"}  # as diffusers' DiTPipeline has it
    again = PlainSystem.load(tmp_path)
    assert again.labels == made.labels and again.process.to_dict() == made.process.to_dict()
    for name, each in made.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], each)


def test_points_come_back_too(tmp_path: Path) -> None:
    network = randomised(PointNetwork(PointConfig(block_out_channels=(8, 8))))
    PlainSystem(network, DDPMConfig().process()).save(tmp_path)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path)
    drawn = pipe(num_images=5, num_inference_steps=3, output_type="raw").images
    assert drawn.shape == (5, 2, 1, 1)
    with pytest.raises(UserError, match="2 channels is no picture"):
        pipe(num_inference_steps=3)


def test_a_network_that_learned_its_variance_draws_by_it(tmp_path: Path) -> None:
    from dataclasses import replace

    network = randomised(UNet2D(replace(TINY, out_channels=2)))
    made = PlainSystem(network, DDPMConfig(variance_type="learned_range").process())
    assert made.shape == (1, 8, 8)
    assert ClassToImagePipeline(made)(num_inference_steps=3, output_type="raw").images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p("cow"), "no class 'cow'.*known: cat, dog, fox"),
        (lambda p: p(3), "no class 3: the classes are 0 to 2"),
        (lambda p: p(-1), "no class -1"),
        (lambda p: p([]), "at least one class"),
        (lambda p: p("cat", num_images=0), "num_images is 0"),
        (lambda p: p("cat", num_images=10**11), "at most 10,000"),
        (lambda p: p("cat", output_type="latent"), "output_type 'latent' is unknown"),
        (lambda p: p("cat", guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda p: p("cat", seed=[1, 2]), "2 seeds for 1 pictures"),
        (lambda p: p("cat", sampler="eulr"), "euler"),
        (lambda p: p("cat", num_inference_steps=0), "num_inference_steps"),
        (lambda p: p("cat", condition=Condition(labels=torch.tensor([0]))), "classes or a condition"),
        (
            lambda p: p(condition=Condition(labels=torch.tensor([0])), num_images=2),
            "num_images is of classes",
        ),
        (lambda p: p(condition=Condition(hidden=torch.zeros(1, 2, 3))), "wants labels in its condition"),
    ],
)
def test_what_can_not_be_drawn_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(ClassToImagePipeline(system()))
    assert "\n" not in str(caught.value)


def test_guidance_of_a_model_that_never_learned_without_its_class_is_refused() -> None:
    with pytest.raises(UserError, match="never learned without a class"):
        ClassToImagePipeline(system(null=False))("cat", guidance_scale=3, num_inference_steps=2)
    with pytest.raises(UserError, match=r"told nothing.* take guidance 1"):
        ClassToImagePipeline(system(0))(guidance_scale=3, num_inference_steps=2)
    with pytest.raises(UserError, match="knows no classes"):
        ClassToImagePipeline(system(0))("cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "a"}}, "knows 4 classes, and 1 names"),
        ({"id2label": {"0": "a", "2": "b"}}, "none for 1"),
        ({"id2label": 7}, "must name the classes"),
        ({"scheduler": None}, "no scheduler"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    system().save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | change
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as caught:
        PlainSystem.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_processes_are_read_from_schedulers_and_others_refused() -> None:
    config = SchedulerConfig("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"})
    assert read_process(config.to_dict()).to_dict() == config.to_dict()
    for name in ("FlowMatchEulerDiscreteScheduler", None, ["DDIMScheduler"]):
        with pytest.raises(UserError, match="is no process that is known"):
            read_process({"_class_name": name})


def test_the_command_draws_a_sheet_or_a_file_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    system().save(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*model, "--count", "2", "--scale", "3"]) == 0
    (sheet,) = (tmp_path / "out").iterdir()
    assert Image.open(sheet).size == (2 * 24, 3 * 24)  # a row a class
    assert main([*model, "fox", "1", "--separate"]) == 0
    assert {each.name for each in (tmp_path / "out").iterdir()} >= {"fox-0.png", "dog-1.png"}
    assert main([*model[:-1], str(tmp_path / "one.png"), "fox"]) == 0
    assert Image.open(tmp_path / "one.png").size == (8, 8)
    capsys.readouterr()
    for wrong, said in (
        ([*model, "wolf"], "no class 'wolf'"),
        ([*model, "\N{SUPERSCRIPT TWO}"], "no class '\N{SUPERSCRIPT TWO}'"),
        ([*model, "9" * 5000], "no class '999"),
        (["--model", str(tmp_path / "nowhere")], "no such folder"),
        ([*model, "--scale", "0"], "--scale must be"),
        ([*model[:-1], str(tmp_path / "x.jpg")], "PNG"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_class_that_is_called_as_a_path_is_no_path(tmp_path: Path) -> None:
    """Names are in the model's folder, which may be a stranger's; files stay in the folder that was named."""
    made = system()
    made.labels = [f"{tmp_path}/away/cat", "../dog", "..", "x" * 300]
    made.save(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*model, "--separate"]) == 0
    assert {each.name for each in tmp_path.iterdir()} == {"model", "out"}
    names = sorted(each.name for each in (tmp_path / "out").iterdir())
    assert len(names) == 4 and all(each.endswith(".png") for each in names)
    assert {"dog-1.png", "class-2-2.png", f"{'x' * 60}-3.png"} < set(names)


def test_a_network_of_twice_the_channels_needs_a_process_that_learns_its_variance(tmp_path: Path) -> None:
    from dataclasses import replace

    twice = randomised(UNet2D(replace(TINY, out_channels=2)))
    PlainSystem(twice, DDPMConfig(variance_type="learned_range").process()).check("it")
    PlainSystem(randomised(UNet2D(TINY)), DDPMConfig(variance_type="learned_range").process()).save(tmp_path)
    with pytest.raises(UserError, match="gives 1 channels, where its process"):
        PlainSystem.load(tmp_path)


def test_names_with_commas_come_back_whole(tmp_path: Path) -> None:
    """ImageNet's classes have several names each; one's own may have commas, and the same word before them."""
    made = system()
    made.labels = ["red, small", "red, large", "tench, Tinca tinca"]
    made.save(tmp_path)
    loaded = PlainSystem.load(tmp_path)
    assert loaded.labels == made.labels
    assert [loaded.label(each) for each in ("red, large", "small", "tench", "Tinca tinca")] == [1, 0, 2, 2]
    with pytest.raises(UserError, match="several classes, such as 'red, small' and 'red, large'"):
        loaded.label("red")
