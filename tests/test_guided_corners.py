"""Where the parts of the guided pipeline meet: cut control pictures, second passes, recipes, pictures of strangers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controls import control_picture, saved_controlnet
from ip_adapters import saved_adapter
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from random_lora import CASES, made
from tiny import tiny_pipeline_folder

from ldm.checkpoints.lora import write_lora
from ldm.errors import UserError
from pipelines import TextToImagePipeline
from pipelines.again import read_again
from pipelines.cli import main
from pipelines.completion import canvas_for
from pipelines.enlarging import Upscalers
from pipelines.given import Given
from pipelines.recipe import Recipe, read_recipe
from pipelines.trust import ANYWHERE, check
from pipelines.uses import ControlUse, ImagePromptUse, LoRAUse, PictureUse, UpscalerUse

QUIET: dict[str, Any] = {
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "output_type": "np",
    "progress": False,
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline `sd1`, a ControlNet `net`, a LoRA `loras/ink.safetensors`, pictures `0.png` and `1.png`."""
    folder = tmp_path_factory.mktemp("corners")
    tiny_pipeline_folder(folder, "sd1")
    saved_controlnet(folder / "net", "sd1")
    (folder / "loras").mkdir()
    own = TextToImagePipeline.from_pretrained(folder / "sd1", device="cpu")
    write_lora(folder / "loras" / "ink.safetensors", made(own, CASES["sd1"]))
    for k in range(2):
        control_picture(k).save(folder / f"{k}.png")
    return folder


@pytest.fixture
def pipe(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder / "sd1", device="cpu")


# Control pictures of a part, and of a picture that is cropped


def test_a_control_picture_is_cut_with_the_mask(folder: Path, pipe: TextToImagePipeline) -> None:
    """To draw a part of a picture is to draw that part alone, by the same part of its control picture."""
    pipe.load_controlnet(folder / "net")
    whole, control = (control_picture(k, (64, 48)) for k in (1, 2))
    mask = Image.new("L", whole.size, 0)
    mask.paste(255, (24, 12, 40, 28))
    box = (16, 4, 48, 36)  # the mask and 8 pixels around it: 32 x 32
    shared = {"seed": 4, "strength": 0.9, **QUIET}
    part = pipe(
        "cat", image=whole.crop(box), mask_image=mask.crop(box), control_image=control.crop(box), **shared
    )
    drawn = pipe(
        "cat", image=whole, mask_image=mask, padding_mask_crop=8, control_image=control, **shared
    ).images[0]
    assert drawn.shape == (48, 64, 3)
    assert np.array_equal(drawn[4:36, 16:48], part.images[0])
    half = control.resize((32, 24))  # of another size it is brought to the whole picture's first
    again = control_picture(2, (64, 48)).resize((32, 24)).resize((64, 48), Image.Resampling.LANCZOS)
    small, large = (
        pipe("cat", image=whole, mask_image=mask, padding_mask_crop=8, control_image=each, **shared).images
        for each in (half, again)
    )
    assert np.array_equal(small, large)


def test_a_control_picture_comes_to_size_as_the_picture_does(folder: Path, pipe: TextToImagePipeline) -> None:
    pipe.load_controlnet(folder / "net")
    image, control = (control_picture(k, (64, 32)) for k in (1, 2))
    shared = {"seed": 4, "height": 32, "width": 32, **QUIET}
    box = (16, 0, 48, 32)
    cropped = pipe("cat", image=image, control_image=control, resize_mode="crop", **shared).images
    by_hand = pipe("cat", image=image.crop(box), control_image=control.crop(box), **shared).images
    assert np.array_equal(cropped, by_hand)


# Second passes


def test_a_generator_that_a_recipe_tells_draws_both_passes_again(pipe: TextToImagePipeline) -> None:
    """The second pass begins from the seed, not from where the generator is by then."""
    fresh = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    drawn = pipe(["cat", "dog"], generator=fresh, hires_scale=1.5, sampler="euler_ancestral", **QUIET)
    assert [(each.seed, each.beside) for each in drawn.recipes] == [(5, ()), (9, ())]
    assert np.array_equal(drawn.images, pipe.draw(drawn.recipes, "np").images)


def test_a_callback_may_stop_any_pass_of_any_batch(pipe: TextToImagePipeline) -> None:
    """Two batches of two passes of three and two steps; what ended early comes to the size of the others."""
    prompts, sizes = ["cat", "the cat " * 50], {1: (1, 32), 4: (1, 48), 7: (2, 48), 9: (2, 48)}
    shared = {"hires_scale": 1.5, "hires_strength": 0.7, "prompt_syntax": "a1111", **QUIET}
    for last, (count, side) in sizes.items():
        images = pipe(
            prompts, seed=1, callback_on_step_end=lambda _, index, *__, n=last: index + 1 < n, **shared
        ).images
        assert images.shape == (count, side, side, 3)


# LoRAs and words that prompts name


def test_a_lora_that_weighs_nothing_is_of_the_recipe(folder: Path, pipe: TextToImagePipeline) -> None:
    """Or the prompt, which names it, could not be read again."""
    pipe.load_lora_weights(folder / "loras" / "ink.safetensors")
    prompts = ["cat <lora:ink:0>", "cat <lora:ink:0.5> <lora:ink:-0.5>", "cat"]
    drawn = pipe(prompts, prompt_syntax="a1111", seed=1, **QUIET)
    assert [[(each.name, each.weight) for each in recipe.loras] for recipe in drawn.recipes] == [
        [("ink", 0.0)],
        [("ink", 0.0)],
        [("ink", 1.0)],
    ]
    other = TextToImagePipeline.from_pretrained(folder / "sd1", device="cpu")
    other.adapters.load_again(drawn.recipes[0].loras, ())
    assert np.array_equal(other.draw(drawn.recipes[:2], "np").images, drawn.images[:2])


def test_negative_prompts_name_nothing_in_silence(pipe: TextToImagePipeline) -> None:
    notes = pipe("cat", negative_prompt="dog <lora:ink:1>", prompt_syntax="a1111", seed=1, **QUIET).notes
    assert any("LoRAs (ink)" in each for each in notes)
    with pytest.raises(UserError, match="no embedding gives the word 'gone'"):
        pipe("cat", negative_prompt="embedding:gone", prompt_syntax="comfyui", **QUIET)


def test_a_prompt_may_not_change_between_texts_without_end(pipe: TextToImagePipeline) -> None:
    """Here 60 texts, and the negative one, of 26 windows of 77 tokens: 122,122 of them, all held at once."""
    changing = "x " * 1900 + "[" + "|".join(f"w{k}" for k in range(60)) + "]"
    recipe = Recipe(changing, num_inference_steps=60, sampler="euler", prompt_syntax="a1111")
    with pytest.raises(UserError, match="changes between 61 texts"):
        pipe.complete(recipe)


# Sizes and numbers


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"height": 4096, "width": 4096, "upscale": 64}, "where 178,956,970 are the most"),
        ({"hires_scale": 64, "upscale": 64}, "where 178,956,970 are the most"),
        (
            {"height": 8192, "width": 8192, "hires_scale": 1.5, "hires_upscaler": UpscalerUse("bundled")},
            "where 178,956,970 are the most",
        ),
    ],
)
def test_what_would_not_fit_is_said_before(
    pipe: TextToImagePipeline, recipe: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        pipe.complete(Recipe("cat", num_inference_steps=3, **recipe))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"control_image": control_picture(), "controlnet_conditioning_scale": 10**400}, "give a number"),
        ({"control_image": control_picture(), "control_guidance_end": float("nan")}, "give a number"),
        ({"upscaler": "latent", "upscale": 2}, "for a second pass alone"),
        ({"hires_upscaler": "latent"}, "goes with hires_scale"),
        ({"upscaler": "a" * 5000, "upscale": 2}, "can't be read"),
    ],
)
def test_odd_arguments_cost_a_line(
    folder: Path, pipe: TextToImagePipeline, given: dict[str, Any], words: str
) -> None:
    pipe.load_controlnet(folder / "net")
    with pytest.raises(UserError, match=words) as caught:
        pipe("cat", **given, **QUIET)
    assert "\n" not in str(caught.value)


def test_image_encoders_are_named_as_in_diffusers(folder: Path, pipe: TextToImagePipeline) -> None:
    (folder / "repo" / "models").mkdir(parents=True)
    file = saved_adapter(folder / "repo" / "models", "base", "sd1", 0)
    (file.parent / "image_encoder").rename(file.parent / "eyes")
    for k, encoder in enumerate(("eyes", "models/eyes", file.parent / "eyes")):
        pipe.load_ip_adapter(folder / "repo", "models", file.name, encoder)
        assert len(pipe.image_adapters.loaded) == 1, k
        pipe.unload_ip_adapter()
    pipe.load_ip_adapter(folder / "repo", "models", file.name, "eyes")
    for scale in ("x", float("nan"), 10**400):
        with pytest.raises(UserError, match="give a number"):
            pipe.set_ip_adapter_scale({file.stem: scale})  # type: ignore[dict-item]


def test_a_network_is_hashed_once_and_told_of_when_it_changes(tmp_path: Path) -> None:
    """As it was when it was loaded: the file may be another by now."""
    from ldm.system import bundled

    own = bundled("realesr-*/model.safetensors")
    assert own is not None
    file = tmp_path / "net.safetensors"
    file.write_bytes(own.read_bytes())
    upscalers = Upscalers(torch.device("cpu"))
    first = upscalers.stated(UpscalerUse(str(file)))
    file.write_bytes(b"another")
    assert upscalers.stated(UpscalerUse(str(file), "0123456789")) == first
    assert upscalers.changed([first]) == []
    (note,) = upscalers.changed([UpscalerUse(str(file), "0123456789")])
    assert "has changed since" in note


# Strangers' pictures, and the command line


def kept(path: Path, recipe: dict[str, Any] | str) -> Path:
    """A picture with a recipe, or with a text of AUTOMATIC1111's."""
    info = PngInfo()
    if isinstance(recipe, str):
        info.add_text("parameters", recipe)
    else:
        info.add_itxt("ldm-recipe", json.dumps({"prompt": "cat", "seed": 1, **recipe}))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("named", "words"),
    [
        # what is no path would be asked of the hub
        ({"controls": (ControlUse("someone/net", PictureUse(None)),)}, "which is not on this disk"),
        # "" is the folder in which the command runs
        ({"image_prompts": (ImagePromptUse("a.bin", (), encoder=""),)}, "wants the IP-Adapter a.bin"),
        ({"image": PictureUse("")}, "wants the image "),
        ({"loras": (LoRAUse("a"),) * 101}, "101 files to load, where 100 are the most"),
    ],
)
def test_what_a_stranger_names(tmp_path: Path, named: dict[str, Any], words: str) -> None:
    trusted = ANYWHERE if "on this disk" in words or "most" in words else str(tmp_path)
    with pytest.raises(UserError, match=words):
        check(Recipe("cat", **named), tmp_path / "a.png", [trusted])


def test_an_image_encoder_has_to_be_trusted_too(tmp_path: Path) -> None:
    """Also one that the recipe does not name: the folder beside the adapter."""
    adapter = tmp_path / "adapter.bin"
    adapter.touch()
    for encoder in (None, "", str(tmp_path / "other")):
        recipe = Recipe("cat", image_prompts=(ImagePromptUse(str(adapter), (), encoder=encoder),))
        with pytest.raises(UserError, match="wants the image encoder"):
            check(recipe, tmp_path / "a.png", [str(adapter)])
    with pytest.raises(UserError, match="no such folder"):  # as of a shell's variable that is not set
        check(Recipe("cat", image=PictureUse("a")), tmp_path / "a.png", [""])


def test_options_in_place_of_what_a_picture_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Need no trust in it; "latent" is such an option too. None is passed over in silence."""
    picture = kept(
        tmp_path / "a.png",
        {"num_inference_steps": 3, "hires_scale": 1.5, "hires_upscaler": {"path": "/gone"}},
    )
    shared = ["--model", str(folder / "sd1"), "--out", str(tmp_path / "b.png"), "--quiet", "--device", "cpu"]
    assert main(["--from-image", str(picture), "--hires-upscaler", "latent", *shared]) == 0
    recipe = read_recipe(tmp_path / "b.png")
    assert recipe.hires_scale == 1.5 and recipe.hires_upscaler is None
    capsys.readouterr()
    for options, words in (
        (["--image-encoder", "x"], "give --ip-adapter"),
        (["--upscale", "2", "--upscaler", "latent"], "second pass alone"),
        (["--control", f"{folder / '0.png'}:{'a' * 5000}"], "can't be read"),
    ):
        assert main(["cat", *options, *shared]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_rows_name_their_networks_from_their_own_folder(folder: Path) -> None:
    from pipelines.named_files import row_settings

    row = {"prompt": "cat", "controls": [{"path": "net", "image": {"path": str(folder / "0.png")}}]}
    assert row_settings(row, folder)["controls"][0]["path"] == str((folder / "net").resolve())


def test_a_lora_that_another_program_names_twice(folder: Path, tmp_path: Path) -> None:
    """Its weights add up, as there. A second pass that can't be taken is told of."""
    tail = "\nSteps: 3, Sampler: Euler, CFG scale: 6, Seed: 9, Size: 32x32, Denoising strength: 0.7, "
    text = f"cat <lora:ink:0.5> <lora:ink:0.25>{tail}Hires resize: 16x16, Hires upscaler: Latent"
    again = read_again(kept(tmp_path / "a.png", text), [folder / "loras"])
    assert [(each.name, each.weight) for each in again.recipe.loras] == [("ink", 0.75)]
    assert any("second pass is left out" in each for each in again.notes)
    nearest = f"cat{tail}Hires upscale: 2, Hires upscaler: Latent (nearest)"
    again = read_again(kept(tmp_path / "b.png", nearest))
    assert again.recipe.hires_scale == 2 and any("Latent (nearest)" in each for each in again.notes)


def test_a_picture_of_every_precision_is_read_again(folder: Path, tmp_path: Path) -> None:
    own = TextToImagePipeline.from_pretrained(folder / "sd1", torch_dtype=torch.float64, device="cpu")
    drawn = own("cat", seed=1, **{**QUIET, "output_type": "pil"})
    drawn.save(tmp_path / "a.png")
    recipe = read_recipe(tmp_path / "a.png")
    assert recipe.dtype == "float64"
    assert np.array_equal(np.asarray(own.draw([recipe]).images[0]), np.asarray(drawn.images[0]))


def test_a_canvas_brings_others_to_its_part() -> None:
    """`Canvas.beside` of the very picture is what the drawing begins from."""
    picture = np.asarray(control_picture(3, (40, 24))).astype(np.float32) / 255
    mask = np.zeros((24, 40), np.float32)
    mask[4:12, 6:18] = 1
    for settings in ({}, {"resize_mode": "crop"}, {"resize_mode": "fill"}, {"padding_mask_crop": 3}):
        recipe = Recipe("", height=32, width=32, image=PictureUse(None), **settings)
        shown = mask if "padding_mask_crop" in settings else None
        canvas = canvas_for(recipe, Given(image=picture, mask_image=shown))
        assert np.array_equal(canvas.beside(picture, recipe.resize_mode), canvas.begin)
