"""U-Nets that are told the guidance scale (`time_cond_proj_dim`): the network, drawing, files, training."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline_folder, tiny_unet
from torch import Tensor
from training_runs import TINY_UNET

from ldm.checkpoints import read_checkpoint
from ldm.checkpoints.families import FIRST, GUIDANCE, family_configs, pipeline_class
from ldm.checkpoints.files import read_metadata, read_tensors, write_tensors
from ldm.condition import Condition
from ldm.conditioning.control import Control
from ldm.config import from_dict
from ldm.diffusion.plan import plan
from ldm.errors import UserError
from ldm.evaluation.subjects import Shown, TextSubject
from ldm.models.controlnet import ControlNet
from ldm.models.layers import guidance_embedding
from ldm.models.points import PointConfig, PointNetwork
from ldm.models.unet import UNet, UNetConfig
from ldm.sampling import Guidance, controlled, prepare, sample
from ldm.system import System
from ldm.training.objectives import diffusion, text_to_image
from pipelines import TextToImagePipeline
from pipelines.recipe import Recipe

DIM = 32
LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
CLASS = "LatentConsistencyModelPipeline"
PROMPTS = ["a photo of the cat", "raccoon"]


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.square(ours - theirs).mean(), 1e-20)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def build(family: str, kind: str = "", lcm: bool = True) -> Path:
        scheduler = LCM if lcm else None
        return tiny_pipeline_folder(
            tmp_path_factory.mktemp(family), family, scheduler, kind, time_cond_proj_dim=DIM
        )

    return build


@pytest.fixture(scope="module")
def pipe(folder: Any) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder("sd1", CLASS), device="cpu")


@pytest.fixture
def calls(pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What guidance the rows of every call of the network were told."""
    told: list[list[float]] = []
    forward = pipe.system.network.forward

    def watched(x: Tensor, timestep: Tensor, condition: Condition, *more: Any) -> Tensor:
        assert condition.guidance is not None
        told.append(condition.guidance.tolist())
        return forward(x, timestep, condition, *more)

    monkeypatch.setattr(pipe.system.network, "forward", watched)
    return told


# The network


@pytest.mark.parametrize("dim", [4, 7, 256, 512])
def test_embedding_is_diffusers(dim: int) -> None:
    from diffusers import LatentConsistencyModelPipeline

    scales = [0.0, 1.0, 7.5, 8.5, 14.25]
    theirs: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = theirs(None, torch.tensor([each - 1 for each in scales]), embedding_dim=dim)
    assert torch.equal(guidance_embedding(torch.tensor(scales), dim), expected)


@torch.no_grad()
def test_network_is_diffusers() -> None:
    theirs = tiny_unet("sd1", time_cond_proj_dim=DIM)
    config = UNetConfig.from_diffusers(dict(theirs.config))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    assert config.to_diffusers()["time_cond_proj_dim"] == DIM and ours.wants(4) == {
        "hidden": 32,
        "guidance": 1,
    }
    x, hidden, time = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32), torch.tensor([3.0, 700.0])
    scales = torch.tensor([1.0, 8.5])
    told = guidance_embedding(scales, DIM)
    expected = theirs(x, time, timestep_cond=told, encoder_hidden_states=hidden).sample
    found = ours(x, time, Condition(hidden, guidance=scales))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    other = ours(x, time, Condition(hidden, guidance=torch.tensor([8.5, 1.0])))
    assert (found - other).norm() > 1e-3 * found.norm()
    with pytest.raises(ValueError, match="needs guidance"):
        ours(x, time, Condition(hidden))


@torch.no_grad()
def test_it_begins_as_its_teacher() -> None:
    """Whether it is built and filled with a teacher's weights, or is a teacher that is told more from now on."""
    teacher = UNet(UNetConfig.from_diffusers(dict(tiny_unet("sd1").config))).eval()
    teacher.load_state_dict(tiny_unet("sd1").state_dict())
    x, condition, time = (
        torch.randn(2, 4, 16, 16),
        Condition(torch.randn(2, 7, 32)),
        torch.tensor([3.0, 700.0]),
    )
    expected = teacher(x, time, condition)
    student = UNet(
        UNetConfig.from_diffusers({**teacher.config.to_diffusers(), "time_cond_proj_dim": DIM})
    ).eval()
    found = student.load_state_dict(teacher.state_dict(), strict=False)
    assert found.missing_keys == ["time_embedding.cond_proj.weight"]
    teacher.take_guidance(DIM)
    for each in (student, teacher):
        told = Condition(condition.text, guidance=torch.tensor([2.0, 9.0]))
        assert torch.equal(each(x, time, told), expected)
        assert each.config.time_cond_proj_dim == DIM and "guidance" in each.wants(4)
    assert set(teacher.state_dict()) == set(student.state_dict())
    with pytest.raises(UserError, match="PointNetwork can't be told the guidance scale"):
        PointNetwork(PointConfig()).take_guidance(4)


def test_settings_that_cannot_be() -> None:
    for dim in (0, 3, -4):
        with pytest.raises(UserError, match="time_cond_proj_dim"):
            UNetConfig.from_diffusers({"time_cond_proj_dim": dim})


def test_a_condition_keeps_the_scale_whole() -> None:
    condition = Condition(torch.randn(2, 3, 4), guidance=torch.tensor([7.37, 8.5])).to(dtype=torch.bfloat16)
    assert condition.text.dtype == torch.bfloat16
    assert condition.guidance is not None and condition.guidance.tolist() == pytest.approx(
        [7.37, 8.5], abs=1e-6
    )
    assert condition.last(1).guidance.tolist() == [8.5]  # pyright: ignore[reportOptionalMemberAccess]


# Drawing


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("case", ["lcm", "sd1", "sdxl"])
def test_the_picture_is_diffusers_picture(folder: Any, case: str, steps: int) -> None:
    """Over 90 dB where the scale less 1 is exact; 8.3 and 7.3 lie in other binades, and angles are 1000 of them."""
    import diffusers

    path = folder("sd1", CLASS) if case == "lcm" else folder(case)
    theirs = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    assert (type(theirs).__name__ == CLASS) == (case == "lcm")
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImagePipeline.from_pretrained(path, device="cpu")
    pictures: list[np.ndarray] = []
    for scale, least in ((1.0, 90), (8.5, 90), (8.3, 60)):
        settings: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "output_type": "np",
        }
        seeds = [torch.Generator().manual_seed(each) for each in (3, 4)]
        expected = theirs(PROMPTS, generator=seeds, **settings).images
        pictures.append(ours(PROMPTS, seed=3, **settings).images)
        assert expected.std() > 0.02
        assert psnr(pictures[-1], expected) > least, scale
    assert psnr(pictures[0], pictures[1]) < 60  # what it is told has a say


def test_defaults_are_diffusers(pipe: TextToImagePipeline, folder: Any) -> None:
    import diffusers

    theirs = diffusers.DiffusionPipeline.from_pretrained(folder("sd1", CLASS), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("cat", generator=torch.Generator().manual_seed(0), output_type="np").images
    drawn = pipe("cat", seed=0, output_type="np")
    assert psnr(drawn.images, expected) > 90
    assert (drawn.recipes[0].num_inference_steps, drawn.recipes[0].guidance_scale) == (4, 8.5)


def test_one_pass_a_step_and_what_has_no_effect_is_told(
    pipe: TextToImagePipeline, calls: list[list[float]]
) -> None:
    plain = pipe("cat", seed=1, guidance_scale=8.5, output_type="np")
    assert calls == [[8.5]] * 4 and not any("without effect" in note for note in plain.notes)
    settings = {"guidance_rescale": 0.7, "guidance_interval": (0.1, 5.0)}
    told = pipe("cat", negative_prompt="dog", seed=1, guidance_scale=8.5, output_type="np", **settings)
    assert calls == [[8.5]] * 8 and np.array_equal(told.images, plain.images)
    (note,) = [note for note in told.notes if "without effect" in note]
    assert note.endswith("negative prompts, guidance_rescale, guidance_interval")
    assert not any("without effect" in note for note in pipe("cat", negative_prompt="", seed=1).notes)
    hidden = torch.randn(1, 77, 32)
    given = pipe(prompt_embeds=hidden, negative_prompt_embeds=hidden, seed=1)
    assert any(note.endswith("alone: negative prompts") for note in given.notes)


def test_unlike_scales_share_calls_and_no_picture_knows_its_neighbours(
    pipe: TextToImagePipeline, calls: list[list[float]]
) -> None:
    scales = [1.0, 8.5, 3.0, 14.0]
    recipes = [Recipe("the dog", "cat" if k == 2 else None, 5, 4, scale) for k, scale in enumerate(scales)]
    together = {each.place: each for each in pipe.draw_each(recipes, together=4)}
    assert calls == [scales] * 4
    pictures = [np.asarray(together[k].image, dtype=float) for k in range(4)]
    for recipe, picture in zip(recipes, pictures, strict=True):
        alone = np.asarray(next(iter(pipe.draw_each([recipe]))).image, dtype=float)
        assert np.abs(alone - picture).max() <= 1  # of 255: the rounding of a call of other rows
    assert all(np.abs(pictures[0] - each).max() > 1 for each in pictures[1:])
    noted = [k for k, each in together.items() if any("without effect" in note for note in each.notes)]
    assert noted == [2]


def test_a_scale_each(pipe: TextToImagePipeline) -> None:
    """A request whose pictures have scales of their own, and prompts that change."""
    system, how = pipe.system, plan(pipe.system.scheduler, 3)
    request = prepare(system, how, ["a cat", "a dog"], [1, 2], guidance=Guidance(torch.tensor([2.0, 9.0])))
    assert request.condition.guidance is not None and request.condition.guidance.tolist() == [2.0, 9.0]
    both = sample(system, request)
    alone = sample(system, prepare(system, how, ["a dog"], [2], guidance=Guidance(9.0)))
    assert (both[1:] - alone).norm() < 1e-5 * alone.norm()
    changing, still = (
        pipe(each, prompt_syntax="a1111", seed=1, output_type="np").images
        for each in ("a [cat:dog:0.5]", "a cat")
    )
    assert 1e-4 < np.abs(changing - still).max() < 1


def test_from_a_picture_it_is_diffusers_picture(folder: Any) -> None:
    import diffusers

    path = folder("sd1")
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(path, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImagePipeline.from_pretrained(path, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    how: dict[str, Any] = {"image": Image.fromarray(pixels), "strength": 0.5, "num_inference_steps": 4}
    how |= {"guidance_scale": 8.5, "output_type": "np"}
    expected = theirs("cat", generator=torch.Generator().manual_seed(1), **how).images
    assert psnr(ours("cat", seed=1, **how).images, expected) > 90


@torch.no_grad()
def test_a_controlnet_knows_nothing_of_it(folder: Any) -> None:
    """It steers such a U-Net as diffusers' does, made from it or from any other of its shape."""
    import diffusers

    system = System.load(folder("sd1", lcm=False))
    assert isinstance(system.network, UNet)
    torch.manual_seed(1)
    network = ControlNet.from_unet(system.network, conditioning_embedding_out_channels=(8, 16)).eval()
    for each in network.parameters():
        torch.nn.init.normal_(each, std=0.05) if each.ndim > 1 else None
    theirs = diffusers.ControlNetModel.from_config(network.config.to_diffusers()).eval()
    theirs.load_state_dict(network.state_dict())
    parts = diffusers.DiffusionPipeline.from_pretrained(
        folder("sd1", lcm=False), local_files_only=True
    ).components
    steered = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=theirs, requires_safety_checker=False
    )
    steered.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 32, 32)
    expected = steered(
        "a cat",
        image=picture,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=4,
        guidance_scale=8.5,
        output_type="latent",
    ).images
    request = prepare(system, plan(system.scheduler, 4), ["a cat"], [5], guidance=Guidance(8.5))
    found = sample(system, controlled(system, request, [Control(network, picture)]))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - sample(system, request)).norm() > 1e-2 * expected.norm()


@torch.no_grad()
def test_openvino_computes_it(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from ldm.backends import openvino as backend

    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    system = System.load(folder("sd1", CLASS))
    inputs = [
        (
            torch.randn(rows, 4, 16, 16),
            torch.linspace(999, 1, rows),
            Condition(torch.randn(rows, 77, 32), guidance=torch.linspace(1, 9, rows)),
        )
        for rows in (2, 5)
    ]
    expected = [system.network(*each) for each in inputs]
    computed = backend.use(system)
    for given, output in zip(inputs, expected, strict=True):
        assert (system.network(*given) - output).norm() < 2e-3 * output.norm()
    assert computed.notes() == []
    computed.remove()


# Files


def test_a_folder_stays_what_it_was(folder: Any, tmp_path: Path) -> None:
    import diffusers

    system = System.load(folder("sd1", CLASS))
    system.save(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == CLASS and index["scheduler"] == ["diffusers", "LCMScheduler"]
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    assert type(theirs).__name__ == CLASS and theirs.unet.config.time_cond_proj_dim == DIM
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("cat", generator=torch.Generator().manual_seed(0), output_type="np").images
    ours = TextToImagePipeline.from_pretrained(tmp_path / "again", device="cpu")
    assert psnr(ours("cat", seed=0, output_type="np").images, expected) > 90


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_in_both_spellings(folder: Any, tmp_path: Path, family: str) -> None:
    """As diffusers' script names the projection, and as LDM's other names would have it."""
    system = System.load(folder(family, CLASS if family == "sd1" else ""))
    path = tmp_path / "one.safetensors"
    system.save_single_file(path)
    tensors = read_tensors(path)
    assert GUIDANCE in tensors
    other = dict(tensors)
    other["model.diffusion_model.time_embed.cond_proj.weight"] = other.pop(GUIDANCE)
    write_tensors(tmp_path / "two.safetensors", other, read_metadata(path))
    for name in ("one", "two"):
        found = read_checkpoint(tmp_path / f"{name}.safetensors")
        assert found.pipeline == system.pipeline and not found.unused
        own = found.tensors["unet"]["time_embedding.cond_proj.weight"]
        assert torch.equal(own, system.network.state_dict()["time_embedding.cond_proj.weight"])


@pytest.mark.parametrize(
    ("family", "widths", "kind"),
    [("sd1", (320, 768), CLASS), ("sdxl", (320, 2048), "StableDiffusionXLPipeline")],
)
def test_a_published_file_is_known_by_its_tensors(family: str, widths: tuple[int, int], kind: str) -> None:
    """Files without our configs; the published U-Nets (LCM_Dreamshaper_v7, lcm-sdxl) have 256 features of the scale."""
    width, context = widths
    seen = {
        FIRST: torch.empty(width, 4, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(
            8, context
        ),
    }
    plain = family_configs(family, seen, "a file")
    assert (
        plain["unet"].get("time_cond_proj_dim") is None
        and plain["scheduler"]["_class_name"] != "LCMScheduler"
    )
    configs = family_configs(family, {**seen, GUIDANCE: torch.empty(width, 256)}, "a file")
    assert configs["unet"]["time_cond_proj_dim"] == 256 and pipeline_class(family, configs["unet"]) == kind
    scheduler = configs["scheduler"]
    assert scheduler["_class_name"] == "LCMScheduler" and scheduler["original_inference_steps"] == 50
    assert scheduler["beta_schedule"] == "scaled_linear" and scheduler["prediction_type"] == "epsilon"
    assert UNetConfig.from_diffusers(configs["unet"]).time_cond_proj_dim == 256


# Training


def test_other_training_than_distillation_refuses_it(folder: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    data = {"kind": "pictures", "path": str(tmp_path), "resolution": 32}
    told = {"base": str(folder("sd1", CLASS)), "data": data}
    for more in ({}, {"train": {"kind": "lora"}}, {"inpainting": True}):
        with pytest.raises(UserError, match=r"^text_to_image: .*time_cond_proj_dim.*only distillation"):
            text_to_image.Objective(from_dict(text_to_image.Config, {**told, **more}))
    network = {"kind": "unet", **TINY_UNET, "time_cond_proj_dim": 8}
    with pytest.raises(UserError, match=r"^diffusion: .*time_cond_proj_dim.*only distillation"):
        diffusion.Objective(from_dict(diffusion.Config, {"data": {"kind": "digits"}, "network": network}))


@torch.no_grad()
def test_it_is_judged_without_guidance(folder: Any) -> None:
    """Likelihood is of what the network says at scale 1."""
    subject = TextSubject(System.load(folder("sd1", CLASS)))
    told = subject.condition(Shown(torch.zeros(2, 3, 32, 32), ["a cat", "a dog"]))
    assert told.guidance is not None and told.guidance.tolist() == [1.0, 1.0]
    subject.bind(told)(torch.randn(2, 4, 16, 16), torch.tensor([3.0, 900.0]))
