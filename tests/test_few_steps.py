"""The few-step form of a model: what its folder says, what it draws, and how it is asked for."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SCHEDULER, tiny_pipeline_folder

from ldm.checkpoints.lora import FILE, read_lora_file, write_lora
from ldm.errors import UserError
from ldm.models.lora import LoRA
from ldm.system import System
from ldm.system.few_steps import write_few_steps
from pipelines import TextToImagePipeline
from pipelines.batch.cli import main as batch
from pipelines.cli import main as draw

LCM = {**SCHEDULER, "_class_name": "LCMScheduler", "set_alpha_to_one": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a form of two steps: a LoRA of random weights."""
    folder = tiny_pipeline_folder(tmp_path_factory.mktemp("few"), "sd1")
    form(folder / "fast", folder)
    return folder


def form(folder: Path, base: Path, said: str = "..") -> None:
    system = System.load(base)
    adapter = LoRA(system.network, ".*", rank=2)
    generator = torch.Generator().manual_seed(1)
    for each in adapter.parameters():
        each.data = 0.1 * torch.randn(each.shape, generator=generator)
    folder.mkdir(parents=True)
    write_lora(folder / FILE, {"unet": adapter.weights()}, "diffusers", system.network.config.to_diffusers())
    write_few_steps(folder, said, LCM, {"num_inference_steps": 2, "guidance_scale": 1.0})


def pixels(pipe: TextToImagePipeline, **settings: Any) -> np.ndarray:
    drawn = pipe("a cat", seed=3, output_type="np", progress=False, **settings)
    return np.asarray(drawn.images)


def test_it_draws_as_its_base_with_the_lora_in_its_steps(model: Path) -> None:
    base = TextToImagePipeline.from_pretrained(model)
    plain = pixels(base, num_inference_steps=2, guidance_scale=1.0, sampler="lcm")
    base.adapters.load_lora(model / "fast")
    by_hand = pixels(base, num_inference_steps=2, guidance_scale=1.0, sampler="lcm")
    fast = TextToImagePipeline.from_pretrained(model, fast=True)
    assert np.abs(by_hand - plain).max() > 0.01
    np.testing.assert_allclose(pixels(fast), by_hand, atol=2e-4)  # merged weights are rounded once more
    named = TextToImagePipeline.from_pretrained(model / "fast")
    assert np.array_equal(pixels(named), pixels(fast))
    assert named.system.fingerprint == fast.system.fingerprint != base.system.fingerprint
    recipe = fast("a cat", seed=3, progress=False).recipes[0]
    assert (recipe.fast, recipe.sampler, recipe.num_inference_steps, recipe.guidance_scale) == (
        True,
        "lcm",
        2,
        1.0,
    )


def test_diffusers_draws_it_with_the_lora_and_the_scheduler_of_the_folder(model: Path) -> None:
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    theirs.load_lora_weights(model / "fast")
    theirs.scheduler = diffusers.LCMScheduler.from_pretrained(model / "fast", subfolder="scheduler")
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    told = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    found = theirs("a cat", latents=latents, **told).images
    ours = TextToImagePipeline.from_pretrained(model, fast=True)
    mine = ours("a cat", latents=latents, num_inference_steps=1, output_type="np", progress=False).images
    np.testing.assert_allclose(np.asarray(mine), found, atol=2e-4)


def test_it_is_saved_as_a_whole_model_that_needs_no_lora(model: Path, tmp_path: Path) -> None:
    fast = TextToImagePipeline.from_pretrained(model, fast=True)
    fast.save_pretrained(tmp_path / "whole")
    whole = TextToImagePipeline.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(
        pixels(whole), pixels(fast), atol=2e-5
    )  # memory's alignment decides over rounding


def test_the_command_lines_take_it_and_a_picture_of_it_is_drawn_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--model", str(model), "--fast", "--quiet", "--dtype", "float32"]
    assert draw(["a cat", "--seed", "3", "--out", str(tmp_path / "one.png"), *told]) == 0
    again = ["--from-image", str(tmp_path / "one.png"), "--trust", str(model), "--quiet"]
    assert draw([*again, "--out", str(tmp_path / "two.png")]) == 0
    assert "other weights" not in capsys.readouterr().err
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    other = tiny_pipeline_folder(tmp_path / "other", "sd1")  # has no few-step form, and is not asked for one
    assert draw([*again, "--model", str(other), "--out", str(tmp_path / "three.png")]) == 0
    (tmp_path / "rows.txt").write_text("a cat\nthe dog\n")
    assert batch([str(tmp_path / "rows.txt"), "--out", str(tmp_path / "batch"), *told]) == 0
    assert len(list((tmp_path / "batch").rglob("*.png"))) == 2


def test_what_its_lora_file_leaves_open_is_told(model: Path, tmp_path: Path) -> None:
    form(tmp_path / "form", model, str(model))
    tensors = load_file(tmp_path / "form" / FILE)
    save_file({"lora_te_text_projection": torch.zeros(1), **tensors}, tmp_path / "form" / FILE)
    told = read_lora_file(tmp_path / "form", {"unet": System.load(model).network}).notes
    assert told and System.load(tmp_path / "form").notes == told


def test_a_form_can_lie_anywhere_and_name_its_base(model: Path, tmp_path: Path) -> None:
    form(tmp_path / "elsewhere", model, str(model))
    assert System.load(tmp_path / "elsewhere").options["num_inference_steps"] == 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"base": "../nowhere"}, "no such folder"),
        ({"base": 3}, "few_steps.json: base is 3"),
        ({"base": "."}, "a few-step form itself"),
        ({"num_inference_steps": "two"}, "num_inference_steps"),
        ({"guidance_scale": True}, "guidance_scale"),
    ],
)
def test_what_it_says_is_checked(model: Path, tmp_path: Path, said: dict[str, Any], words: str) -> None:
    form(tmp_path / "form", model, str(model))
    path = tmp_path / "form" / "few_steps.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(UserError, match=words) as caught:
        System.load(tmp_path / "form")
    assert "\n" not in str(caught.value)


def test_a_model_without_one_says_so(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sd1")
    with pytest.raises(UserError, match="has no few-step form"):
        TextToImagePipeline.from_pretrained(folder, fast=True)
    (folder / "fast").mkdir()
    (folder / "fast" / "few_steps.json").write_text("{}")
    with pytest.raises(UserError, match="scheduler_config"):
        TextToImagePipeline.from_pretrained(folder, fast=True)


def test_a_lora_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = tiny_pipeline_folder(tmp_path, "sdxl")
    form(other / "fast", model)
    with pytest.raises(UserError):
        System.load(other, fast=True)


def test_its_base_is_one_place_from_wherever_the_program_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    form(tmp_path / "form", model, "model")
    (tmp_path / "model").symlink_to(model)
    with pytest.raises(UserError, match=r"few_steps\.json: its base 'model' is no such folder"):
        System.load("form")
    form(tmp_path / "here" / "form", model, "here/form")  # looks like a hub id, and is itself
    with pytest.raises(UserError, match=r"its base 'here/form' is a few-step form itself"):
        System.load("here/form")


def test_the_fast_form_of_a_copy_is_made_of_the_copy(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(model, copy)
    path = copy / "fast" / "few_steps.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": "bundled"}))
    assert System.load(copy, fast=True).fingerprint == System.load(model, fast=True).fingerprint
    with pytest.raises(UserError, match="a few-step form itself"):
        System.load(model / "fast", fast=True)
