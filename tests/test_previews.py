"""Previews by a tiny autoencoder: against diffusers' decoding, in its folder and after saving; what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline_folder

from ldm.checkpoints.folder import PREVIEW
from ldm.errors import UserError
from pipelines import TextToImagePipeline

LATENTS = torch.linspace(-3, 3, 2 * 4 * 6 * 8).view(2, 4, 6, 8)


def tiny(seed: int = 0, **changes: Any) -> Any:
    """diffusers' network for the tiny pipelines: latents of four channels, two pixels a side."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**{**widths, **blocks, **changes}).eval()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_pipeline_folder(tmp_path, "sd1")


def load(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder, device="cpu")


def shown(pipe: TextToImagePipeline) -> np.ndarray:
    return np.stack([np.asarray(each) / 255 for each in pipe.preview(LATENTS)])


def check_shown(pipe: TextToImagePipeline, theirs: Any) -> None:
    """The pictures are what diffusers' network decodes: within half a step of eight bits, and rounding before it."""
    with torch.no_grad():
        decoded = (theirs.decode(LATENTS).sample / 2 + 0.5).clamp(0, 1)
    assert decoded.std() > 0.01  # no plain surface
    np.testing.assert_allclose(shown(pipe), decoded.permute(0, 2, 3, 1).numpy(), atol=0.5 / 255 + 1e-5)


def test_the_tiny_autoencoder_of_a_models_folder_is_used_and_stays(model: Path, tmp_path: Path) -> None:
    """Also in what is saved, which diffusers loads as ever."""
    from diffusers import StableDiffusionPipeline

    tiny(0).save_pretrained(model / PREVIEW)
    pipe = load(model)
    check_shown(pipe, tiny(0))
    sizes = list[tuple[int, int]]()

    def callback(owner: Any, step: int, timestep: int, state: dict[str, Any]) -> None:
        sizes.extend(each.size for each in state["preview"]())

    pipe("cat", num_inference_steps=2, sampler="ddim", callback_on_step_end=callback)
    assert sizes == [(32, 32)] * 2  # pictures of their full size
    pipe.save_pretrained(tmp_path / "saved")
    check_shown(load(tmp_path / "saved"), tiny(0))
    for folder in (model, tmp_path / "saved"):
        theirs = StableDiffusionPipeline.from_pretrained(folder)
        assert set(theirs.components) == {
            *("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
            *("safety_checker", "feature_extractor", "image_encoder"),
        }


def test_another_can_be_loaded_and_is_saved(model: Path, tmp_path: Path) -> None:
    tiny(0).save_pretrained(model / PREVIEW)
    tiny(1).save_pretrained(tmp_path / "taesd")
    pipe = load(model)
    pipe.load_preview(tmp_path / "taesd")
    check_shown(pipe, tiny(1))
    pipe.save_pretrained(model)  # over itself
    check_shown(load(model), tiny(1))


def test_a_model_saved_over_another_has_not_its_previews(model: Path, tmp_path: Path) -> None:
    tiny(0).save_pretrained(model / PREVIEW)
    pipe = load(tiny_pipeline_folder(tmp_path / "other", "sd1"))
    pipe.save_pretrained(model)
    assert not (model / PREVIEW).exists()


def test_it_follows_the_model_into_another_precision(model: Path, tmp_path: Path) -> None:
    tiny(0).save_pretrained(tmp_path / "taesd")
    pipe = load(model)
    pipe.load_preview(tmp_path / "taesd")
    before = shown(pipe)
    pipe.to(torch.float64)
    np.testing.assert_allclose(shown(pipe), before, atol=1 / 255 + 1e-5)


def test_without_one_previews_have_a_pixel_for_each_latent(model: Path) -> None:
    assert shown(load(model)).shape == (2, 6, 8, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 3}, "taesd has 3 latent channels, the model's autoencoder 4"),
        (
            {"num_decoder_blocks": (1,) * 3, "decoder_block_out_channels": (8,) * 3},
            "taesd has 4 pixels a side for each latent, the model's autoencoder 2",
        ),
        ({"out_channels": 4}, "taesd gives 4 channels, where pictures have 3"),
    ],
)
def test_one_of_another_model_is_refused_and_changes_nothing(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny(0).save_pretrained(model / PREVIEW)
    tiny(1, **changes).save_pretrained(tmp_path / "taesd")
    pipe = load(model)
    with pytest.raises(UserError, match=message):
        pipe.load_preview(tmp_path / "taesd")
    check_shown(pipe, tiny(0))


def test_a_damaged_one_is_told_when_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    """And keeps nobody from drawing."""
    tiny(0).save_pretrained(model / PREVIEW)
    (model / PREVIEW / "config.json").write_text("{")
    pipe = load(model)
    pipe("cat", num_inference_steps=1)
    with pytest.raises(UserError, match=r"vae_preview/config\.json"):
        pipe.preview(LATENTS)
    with pytest.raises(UserError, match="no such folder or file"):
        pipe.load_preview(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model_index\.json"):
        pipe.load_preview(model / "model_index.json")
    tiny(0).save_pretrained(tmp_path / "taesd")
    pipe.load_preview(tmp_path / "taesd")  # the way out
    check_shown(pipe, tiny(0))
