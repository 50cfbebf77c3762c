"""U-Nets that are told the guidance scale (LCM, Luo et al. 2023): as diffusers draws them, in files, in a crowd."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    SCHEDULER,
    clip_model,
    clip_tokenizer_folder,
    randomize,
    tiny_vae,
)

from ldm.errors import UserError
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.objectives import text_to_image
from pipelines import TextToImagePipeline

DIM = 32


def tiny_lcm_folder(folder: Path, dim: int = DIM, **scheduler: Any) -> Path:
    """A tiny LatentConsistencyModelPipeline of random weights, saved by diffusers."""
    import diffusers
    from transformers import CLIPTokenizerFast

    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
        time_cond_proj_dim=dim,
    )
    made = diffusers.LatentConsistencyModelPipeline(
        vae=tiny_vae("sd1"),
        text_encoder=clip_model(),
        tokenizer=CLIPTokenizerFast.from_pretrained(clip_tokenizer_folder(folder / "made")),
        unet=randomize(unet, 3),
        scheduler=diffusers.LCMScheduler.from_config(SCHEDULER | scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder / "lcm")
    return folder / "lcm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lcm_folder(tmp_path_factory.mktemp("lcm"))


def psnr(ours: Any, theirs: Any) -> float:
    error = np.square(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).mean()
    return float(10 * np.log10(1 / max(error, 1e-20)))


def theirs(
    model: Path, seed: int, kind: str = "LatentConsistencyModelPipeline", **settings: Any
) -> np.ndarray:
    import diffusers

    pipe = getattr(diffusers, kind).from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe("a cat", generator=generator, output_type="np", **settings).images)


@pytest.mark.parametrize(
    ("kind", "steps", "scale"),
    [
        ("LatentConsistencyModelPipeline", 4, 8.5),
        ("LatentConsistencyModelPipeline", 1, 1.0),
        ("LatentConsistencyModelPipeline", 2, 3.3),
        ("StableDiffusionPipeline", 4, 5.0),
    ],
)
def test_it_draws_what_diffusers_draws(model: Path, kind: str, steps: int, scale: float) -> None:
    """Float32's rounding through a U-Net and the decoder is 1e-6 or so: over 90 dB."""
    told = {"num_inference_steps": steps, "guidance_scale": scale}
    pipe = TextToImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    ours = pipe("a cat", seed=5, output_type="np", progress=False, **told).images
    assert psnr(ours, theirs(model, 5, kind, **told)) > 90


@pytest.mark.parametrize("dim", [33, 256])
def test_odd_and_wide_embeddings_too(tmp_path: Path, dim: int) -> None:
    folder = tiny_lcm_folder(tmp_path, dim, prediction_type="v_prediction")
    told = {"num_inference_steps": 2, "guidance_scale": 4.0}
    ours = TextToImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert (
        psnr(
            ours("a cat", seed=5, output_type="np", progress=False, **told).images, theirs(folder, 5, **told)
        )
        > 90
    )


def test_the_scale_changes_the_picture_and_there_is_no_second_pass(model: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    rows: list[int] = []
    pipe.system.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    drawn = [
        pipe("a cat", seed=5, guidance_scale=scale, output_type="np", progress=False).images
        for scale in (2.0, 9.0)
    ]
    assert psnr(*drawn) < 60
    assert set(rows) == {1}
    assert len(rows) == 2 * 4  # diffusers' pipeline draws in 4 steps


def test_a_negative_prompt_is_told_to_have_no_effect(model: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    plain = pipe("a cat", seed=5, output_type="np", progress=False)
    other = pipe("a cat", seed=5, negative_prompt="the dog", output_type="np", progress=False)
    assert np.array_equal(plain.images, other.images)
    assert any("negative prompt has no effect" in note for note in other.notes)
    assert not any("negative prompt" in note for note in plain.notes)
    with pytest.raises(UserError, match="guidance_rescale and guidance_interval"):
        pipe("a cat", guidance_rescale=0.5)


def test_unlike_scales_share_a_batch_and_each_is_as_alone(model: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    from pipelines.recipe import Recipe

    recipes = [Recipe("a cat", seed=k, guidance_scale=scale) for k, scale in enumerate((1.0, 4.0, 9.0))]
    together = {each.place: each.image for each in pipe.draw_each(recipes)}
    for k, recipe in enumerate(recipes):
        alone = pipe.draw([recipe]).images[0]
        assert np.abs(np.asarray(together[k], int) - np.asarray(alone, int)).max() <= 1


def test_saved_it_is_the_same_model_of_the_same_class(model: Path, tmp_path: Path) -> None:
    import diffusers

    pipe = TextToImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(loaded).__name__ == "LatentConsistencyModelPipeline"
    assert loaded.unet.config["time_cond_proj_dim"] == DIM
    told = {"num_inference_steps": 2, "guidance_scale": 4.0}
    ours = pipe("a cat", seed=5, output_type="np", progress=False, **told).images
    assert psnr(ours, theirs(tmp_path / "saved", 5, **told)) > 90


def test_a_new_projection_has_no_say() -> None:
    """So that a student begins as its teacher, which is told no scale."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
    }
    network = UNet(UNetConfig(**settings, time_cond_proj_dim=16))
    assert not network.time_embedding.cond_proj.weight.any()
    with pytest.raises(UserError, match="time_cond_proj_dim is 2"):
        UNet(UNetConfig(**settings, time_cond_proj_dim=2))


def test_fine_tuning_one_by_pictures_is_refused(model: Path, tmp_path: Path) -> None:
    from PIL import Image

    from ldm.training.data.on_disk import PicturesConfig

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    data = PicturesConfig(path=str(tmp_path), resolution=32, captions=("a cat",))
    with pytest.raises(UserError, match="only a teacher can teach"):
        text_to_image.Objective(text_to_image.Config(base=str(model), data=data))
