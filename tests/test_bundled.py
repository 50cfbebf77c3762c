"""The model that ships with the package: there, small enough, documented, and the same to diffusers."""

from pathlib import Path

import numpy as np
import torch

from ldm.checkpoints.folder import PREVIEW
from ldm.emoji import heldout
from ldm.sampling import decode
from ldm.system import bundled_model
from pipelines import TextToImagePipeline

CALL = {"num_inference_steps": 4, "guidance_scale": 3.5, "output_type": "np"}


def test_it_is_one_small_documented_folder() -> None:
    folder = bundled_model()
    assert [each.parent.name for each in Path(folder).parent.glob("*/model_index.json")] == [folder.name]
    assert sum(file.stat().st_size for file in folder.parent.rglob("*") if file.is_file()) < 130e6
    card = (folder / "README.md").read_text()
    for heading in ("What it draws", "What it can't do", "Training", "Figures", "Licence"):
        assert heading in card


def test_its_card_names_all_that_was_held_out() -> None:
    card = " ".join((bundled_model() / "README.md").read_text().split())
    two = [*heldout.COSTUMES, *heldout.COLOURS, *heldout.FINISHED]
    named = [" ".join(each) for each in two] + [" and ".join(each) for each in heldout.PAIRS]
    assert len(named) == len(heldout.HELD_OUT) and [each for each in named if each not in card] == []


def test_diffusers_draws_the_same_picture() -> None:
    from diffusers import StableDiffusionPipeline

    ours = TextToImagePipeline.from_pretrained(device="cpu")
    drawn = ours("a raccoon astronaut", seed=5, **CALL).images  # type: ignore[arg-type]
    theirs = StableDiffusionPipeline.from_pretrained(bundled_model(), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    expected = theirs("a raccoon astronaut", generator=noise, **CALL).images
    assert 10 * np.log10(1 / np.square(drawn - expected).mean()) > 60
    assert drawn.shape == (1, 128, 128, 3) and drawn.std() > 0.1  # a picture, no blank


def test_its_previews_are_nearly_the_picture() -> None:
    pipe = TextToImagePipeline.from_pretrained(device="cpu")
    drawn = pipe("a raccoon astronaut", seed=5, num_inference_steps=4, output_type="latent").images
    with torch.no_grad():
        decoded = decode(pipe.system.autoencoder, drawn)[0].permute(1, 2, 0).numpy()
    shown = np.asarray(pipe.preview(drawn)[0]) / 255
    assert shown.shape == decoded.shape == (128, 128, 3)
    assert 10 * np.log10(1 / np.square(shown - decoded).mean()) > 22  # another picture is below 12
    assert (bundled_model() / PREVIEW / "diffusion_pytorch_model.safetensors").stat().st_size < 3e6


def test_its_defaults_need_no_arguments() -> None:
    recipe = TextToImagePipeline.from_pretrained(device="cpu")("a fox", seed=0).recipes[0]
    assert (recipe.num_inference_steps, recipe.guidance_scale, recipe.sampler) == (12, 3.5, "ddim")


def test_its_few_step_form_draws_nearly_what_twelve_guided_steps_do() -> None:
    """A student of the same path: from one seed comes the same picture, from another seed another."""
    fast = TextToImagePipeline.from_pretrained(device="cpu", torch_dtype=torch.float32, fast=True)
    prompts = ["a fox", "a blue car"]
    drawn = np.asarray(fast(prompts, seed=[7, 6], output_type="np").images)
    recipe = fast(prompts[0], seed=5).recipes[0]
    assert (recipe.num_inference_steps, recipe.guidance_scale, recipe.sampler) == (4, 1.0, "ddim")
    slow = TextToImagePipeline.from_pretrained(device="cpu", torch_dtype=torch.float32)
    same, other = (
        np.asarray(slow(prompts, seed=seeds, output_type="np").images) for seeds in ([7, 6], [17, 16])
    )
    to_same, to_other = (np.square(drawn - each).mean((1, 2, 3)) for each in (same, other))
    assert (to_same < to_other / 2).all()


def test_diffusers_draws_its_few_step_form() -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = bundled_model() / "fast"
    theirs = StableDiffusionPipeline.from_pretrained(bundled_model(), local_files_only=True)
    theirs.load_lora_weights(folder)
    theirs.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    theirs.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
    expected = theirs("a blue car", generator=torch.Generator().manual_seed(5), **told).images
    ours = TextToImagePipeline.from_pretrained(device="cpu", torch_dtype=torch.float32, fast=True)
    drawn = ours("a blue car", seed=5, output_type="np").images
    assert 10 * np.log10(1 / np.square(drawn - expected).mean()) > 60
