"""Pictures from pictures: image to image, inpainting and outpainting against diffusers, and what is kept to the bit."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline_folder

from ldm.errors import UserError
from pipelines import TextToImagePipeline
from pipelines.canvas import canvas_of
from pipelines.cli import main
from pipelines.recipe import read_recipe

SETTINGS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "np"}
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}
PIPELINES = {
    ("sd1", "image"): "StableDiffusionImg2ImgPipeline",
    ("sdxl", "image"): "StableDiffusionXLImg2ImgPipeline",
    ("sd1", "mask"): "StableDiffusionInpaintPipeline",
    ("inpaint", "mask"): "StableDiffusionInpaintPipeline",
    ("sdxl", "mask"): "StableDiffusionXLInpaintPipeline",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_pipeline_folder(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def pipe(folder: Callable[[str], Path]) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int = 32, height: int = 32, box: tuple[int, int, int, int] = (8, 4, 24, 20)) -> Image.Image:
    drawn = Image.new("L", (width, height), 0)
    drawn.paste(255, box)
    return drawn


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(each) for each in seeds]


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.square(ours - theirs).mean(), 1e-20)))


def theirs(path: Path, name: str, sampler: str = "ddim") -> Any:
    import diffusers

    found = getattr(diffusers, name).from_pretrained(path, local_files_only=True)
    found.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(found.scheduler.config)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_image_to_image_is_diffusers(folder: Callable[[str], Path], family: str) -> None:
    """Three strengths, four samplers, two images with seeds of their own."""
    ours = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
    reference = theirs(folder(family), PIPELINES[family, "image"])
    for sampler, strength in [("ddim", 0.35), ("euler", 0.8), ("dpmpp_2m", 0.55), ("euler_ancestral", 1.0)]:
        import diffusers

        reference.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(reference.scheduler.config)
        shared: dict[str, Any] = {"image": picture(), "strength": strength, **SETTINGS}
        expected = reference(["cat", "the dog"], generator=seeded(3, 4), **shared).images
        drawn = ours(["cat", "the dog"], seed=3, sampler=sampler, **shared).images
        assert expected.std() > 0.02
        assert psnr(drawn, expected) > 60, sampler


@pytest.mark.parametrize("family", ["sd1", "inpaint", "sdxl"])
def test_inpainting_is_diffusers(folder: Callable[[str], Path], family: str) -> None:
    """Where something is drawn, diffusers' picture; elsewhere the picture itself, to the bit."""
    ours = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
    kept = np.asarray(mask()) == 0
    given = np.asarray(picture()).astype(np.float32) / 255
    for sampler, strength in [("ddim", 1.0), ("euler", 0.6), ("euler_ancestral", 1.0), ("dpmpp_2m", 0.6)]:
        reference = theirs(folder(family), PIPELINES[family, "mask"], sampler)
        both = {
            "image": [picture()] * 2,
            "mask_image": [mask()] * 2,
        }  # of one, diffusers' encoder sees one seed only
        shared: dict[str, Any] = {**both, "strength": strength, **SETTINGS}
        expected = reference(["cat", "the dog"], height=32, width=32, generator=seeded(3, 4), **shared).images
        drawn = ours(["cat", "the dog"], seed=3, sampler=sampler, **shared).images
        assert expected[:, ~kept].std() > 0.02
        assert psnr(drawn[:, ~kept], expected[:, ~kept]) > 60, sampler
        assert np.array_equal(drawn[0][kept], given[kept])


def test_only_the_mask_and_its_surroundings(folder: Callable[[str], Path], pipe: TextToImagePipeline) -> None:
    """padding_mask_crop draws a part at full size, as diffusers does, and puts it back into the larger picture."""
    large, drawn_there = picture(64, 64), mask(64, 64, (16, 20, 32, 36))
    shared: dict[str, Any] = {
        "image": large,
        "mask_image": drawn_there,
        "strength": 0.6,
        "padding_mask_crop": 8,
    }
    shared |= {**SETTINGS, "height": 32, "width": 32, "output_type": "pil"}
    expected = theirs(folder("sd1"), PIPELINES["sd1", "mask"])("cat", generator=seeded(3), **shared).images[0]
    drawn = pipe("cat", seed=3, **shared).images[0]
    assert drawn.size == expected.size == (64, 64)
    kept = np.asarray(drawn_there) == 0
    assert np.array_equal(np.asarray(drawn)[kept], np.asarray(large)[kept])
    inside = np.asarray(drawn)[~kept].astype(float) - np.asarray(expected)[~kept]
    assert np.abs(inside).max() <= 1  # both round to 8 bits, the region is as large as what is drawn


def test_a_picture_depends_on_its_own_seed_and_image(pipe: TextToImagePipeline) -> None:
    pictures, masks = [picture(seed=k) for k in range(3)], [mask(), mask(box=(0, 0, 9, 32)), mask()]
    for more in ({}, {"mask_image": masks, "mask_content": "noise", "mask_blur": 2}):
        settings = {**SETTINGS, "strength": 0.7, "sampler": "euler_ancestral"}
        together = pipe(["cat", "the dog", "cat"], seed=[5, 6, 7], image=pictures, **more, **settings).images
        own = {name: each[1] if isinstance(each, list) else each for name, each in more.items()}
        alone = pipe("the dog", seed=6, image=pictures[1], **own, **settings).images[0]
        assert np.abs(together[1] - alone).max() < 1 / 255
        assert np.abs(together[1] - together[0]).max() > 1 / 255


def test_outpainting_keeps_the_picture(pipe: TextToImagePipeline) -> None:
    settings = {**SETTINGS, "image": picture(), "seed": 1}
    drawn = pipe("cat", outpaint=(16, 0, 0, 8), **settings).images[0]
    assert drawn.shape == (40, 48, 3)
    given = np.asarray(picture()).astype(np.float32) / 255
    assert np.array_equal(drawn[:32, 16:], given)
    soft = pipe("cat", outpaint=(16, 0, 0, 8), outpaint_feathering=8, **settings).images[0]
    assert np.array_equal(soft[:24, 24:], given[:24, 8:])
    assert np.abs(soft[:24, 16:24] - given[:24, :8]).max() > 1 / 255


def test_what_a_canvas_begins_from() -> None:
    """A hole in a plain picture is filled with its colour, and one between two colours with a mixture of them."""
    hole = np.zeros((32, 32), np.float32)
    hole[8:24, 8:24] = 1
    plain = np.full((32, 32, 3), 0.25, np.float32)
    plain[hole > 0] = 1
    filled = canvas_of(plain, hole, (32, 32), mask_content="fill")
    assert np.abs(filled.begin - 0.25).max() < 1e-3
    assert np.array_equal(filled.picture, plain)
    halves = plain.copy()
    halves[:, 16:], halves[:, :16] = 0.9, 0.1
    begin = canvas_of(halves, hole, (32, 32), mask_content="fill").begin
    assert (np.diff(begin[16, 8:24, 0]) > -0.02).all() and begin[16, 8, 0] < 0.3 and begin[16, 23, 0] > 0.7


def test_resize_modes() -> None:
    wide = np.zeros((16, 32, 3), np.float32)
    wide[:, 8:24] = 1
    assert canvas_of(wide, None, (16, 16), resize_mode="crop").begin.min() == 1
    stretched = canvas_of(wide, None, (16, 16)).begin
    assert 0.4 < stretched.mean() < 0.6 and stretched[:, 0].max() < 0.1
    whole = canvas_of(wide, None, (32, 32), resize_mode="fill").begin
    assert np.allclose(whole[0], whole[16]) and whole.shape == (32, 32, 3)


def test_forms_of_a_picture(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    """A file, PIL's, an array and a tensor of the same pixels draw the same; EXIF turns, clear parts are white."""
    given = picture(48, 32)
    given.save(tmp_path / "a.png")
    array = np.asarray(given)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), given, array, array.astype(np.float32) / 255]
    forms.append(torch.from_numpy(array).permute(2, 0, 1) / 255)
    drawn = [pipe("cat", seed=1, image=each, **SETTINGS).images[0] for each in forms]
    assert drawn[0].shape == (32, 48, 3)
    assert all(np.abs(each - drawn[0]).max() < 1e-5 for each in drawn)
    turned = given.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pipe("cat", seed=1, image=tmp_path / "turned.png", **SETTINGS).images[0], drawn[0])
    clear = given.convert("RGBA")
    clear.putalpha(0)
    white = Image.new("RGB", given.size, "white")
    one, other = (pipe("cat", seed=1, image=each, **SETTINGS).images[0] for each in (clear, white))
    assert np.array_equal(one, other)
    grey = given.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # 16 bits
    plain = pipe("cat", seed=1, image=grey.convert("RGB"), **SETTINGS).images[0]
    for other in (grey, deep, grey.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)):
        assert np.abs(pipe("cat", seed=1, image=other, **SETTINGS).images[0] - plain).max() < 1e-5, other.mode
    ink = given.convert("CMYK")
    one, other = (pipe("cat", seed=1, image=each, **SETTINGS).images[0] for each in (ink, ink.convert("RGB")))
    assert np.array_equal(one, other)
    white = Image.new("L", given.size, 255)
    drawn_anew = pipe("cat", seed=1, image=given, mask_image=white, **SETTINGS)
    assert any("white everywhere" in note for note in drawn_anew.notes)


def test_it_is_drawn_again_from_its_file(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    mask().save(tmp_path / "m.png")
    settings: dict[str, Any] = {**SETTINGS, "output_type": "pil", "strength": 0.6, "seed": 2}
    drawn = pipe("cat", image=tmp_path / "a.png", mask_image=tmp_path / "m.png", **settings)
    (saved,) = drawn.save(tmp_path / "drawn.png")
    recipe = read_recipe(saved)
    assert recipe.image and recipe.image.path == str(tmp_path / "a.png") and recipe.beside == ()
    assert np.array_equal(pipe.draw([recipe]).images[0], drawn.images[0])
    picture(seed=9).save(tmp_path / "a.png")
    again = pipe.draw([recipe])
    assert any("has changed since" in note for note in again.notes), again.notes
    in_memory = pipe("cat", image=picture(), **settings)
    assert in_memory.recipes[0].beside == ("image",)
    with pytest.raises(UserError, match="drawn from image beside"):
        pipe.draw(in_memory.recipes)


def test_a_model_goes_on_where_another_ended(folder: Callable[[str], Path]) -> None:
    """SDXL's two models, here one in both parts: as diffusers hands the latents on; in one, nothing is lost."""
    ours = TextToImagePipeline.from_pretrained(folder("sdxl"), device="cpu")
    settings = {**SETTINGS, "seed": 3}
    for sampler, share in (("euler", 0.6), ("ddim", 0.7)):
        first = theirs(folder("sdxl"), "StableDiffusionXLPipeline", sampler)
        second = theirs(folder("sdxl"), PIPELINES["sdxl", "image"], sampler)
        plain = {key: value for key, value in SETTINGS.items() if key != "output_type"}
        middle = first("cat", denoising_end=share, output_type="latent", generator=seeded(3), **plain).images
        expected = second("cat", image=middle, denoising_start=share, generator=seeded(3), **SETTINGS).images
        half = ours(
            "cat", denoising_end=share, sampler=sampler, **{**settings, "output_type": "latent"}
        ).images
        drawn = ours("cat", image=half, denoising_start=share, sampler=sampler, **settings).images
        assert psnr(drawn, expected) > 60
        if sampler == "ddim":  # keeps nothing between steps
            assert psnr(drawn, ours("cat", sampler=sampler, **settings).images) > 80


def test_strength_and_an_early_end_together(pipe: TextToImagePipeline) -> None:
    """The latents at the early end, gone on with, are those of the whole way: DDIM keeps nothing between steps."""
    settings: dict[str, Any] = {**SETTINGS, "seed": 3, "sampler": "ddim"}
    whole = pipe("cat", image=picture(), strength=0.8, **settings).images
    half = pipe(
        "cat", image=picture(), strength=0.8, denoising_end=0.6, **{**settings, "output_type": "latent"}
    )
    rest = pipe("cat", image=half.images, denoising_start=0.6, **settings).images
    assert psnr(rest, whole) > 80
    assert half.recipes[0].denoising_end == 0.6


def test_the_command_line_draws_from_pictures(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From --image and --mask, from a row of a file, and again from the PNG, for which its pictures need leave."""
    picture().save(tmp_path / "a.png")
    mask().save(tmp_path / "m.png")
    model = ["--model", str(folder("sd1")), "--quiet", "--steps", "4", "--seed", "2", "--strength", "0.6"]
    named = ["--image", str(tmp_path / "a.png"), "--mask", str(tmp_path / "m.png")]
    out = tmp_path / "out.png"
    assert main(["cat", *named, *model, "--out", str(out)]) == 0
    kept = np.asarray(mask()) == 0
    assert np.array_equal(np.asarray(Image.open(out))[kept], np.asarray(picture())[kept])
    recipe = read_recipe(out)
    assert recipe.image and recipe.image.path == str(tmp_path / "a.png") and recipe.image.hash

    row = {"prompt": "cat", "image": "a.png", "mask_image": "m.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert main(["--file", str(tmp_path / "rows.jsonl"), *model, "--out", str(tmp_path / "row.png")]) == 0
    assert np.array_equal(Image.open(tmp_path / "row.png"), Image.open(out))
    assert (
        main(
            [
                "--file",
                str(tmp_path / "rows.jsonl"),
                *model[:-2],
                *named[:2],
                "--out",
                str(tmp_path / "b.png"),
            ]
        )
        == 0
    )

    again = ["--from-image", str(out), "--quiet", *model[:2], "--out", str(tmp_path / "again.png")]
    capsys.readouterr()
    assert main(again) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "wants the image" in line and "a.png" in line and "m.png" in line
    assert main([*again, "--trust", str(tmp_path)]) == 0
    assert np.array_equal(Image.open(tmp_path / "again.png"), Image.open(out))
    assert main([*again, *named]) == 0  # named by the user, not by the picture

    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "image": "gone.png"}))
    capsys.readouterr()
    assert main(["--file", str(tmp_path / "rows.jsonl"), *model]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "line 1" in line and "no such file" in line


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "strength_0": ({"image": picture(), "strength": 0.0}, "leaves none"),
    "strength_2": ({"image": picture(), "strength": 2.0}, "between 0 and 1"),
    "strength_alone": ({"strength": 0.5}, "give image too"),
    "mask_alone": ({"mask_image": mask()}, "give image too"),
    "sizes": ({"image": picture(), "mask_image": mask(16, 16)}, "of one size"),
    "empty_mask": ({"image": picture(), "mask_image": mask(box=(0, 0, 0, 0))}, "no white part"),
    "no_file": ({"image": "nowhere.png"}, "no such file"),
    "no_picture": ({"image": 7}, "give a PIL picture"),
    "nan": ({"image": torch.full((3, 32, 32), torch.nan)}, "outside of 0 to 1"),
    "too_bright": ({"image": np.full((32, 32, 3), 7.0)}, "outside of 0 to 1"),
    "two_for_one": ({"image": [picture(), picture(), picture()]}, "list of 3 for 1"),
    "blur_alone": ({"image": picture(), "mask_blur": 3}, "goes with mask_image"),
    "outpaint_below_zero": ({"image": picture(), "outpaint": (-1, 0, 0, 0)}, "0 to 16384 pixels"),
    "outpaint_odd": ({"image": picture(), "outpaint": (3, 0, 0, 0)}, "no multiples"),
    "content_of_nothing": (
        {"image": picture(), "mask_image": mask(), "mask_content": "fill"},
        "strength below 1",
    ),
    "no_step_left": ({"image": picture(), "strength": 0.3, "denoising_end": 0.5}, "none of 10 steps"),
    "start_without_latents": ({"image": picture(), "denoising_start": 0.5}, "goes on with latents"),
    "latents_with_mask": ({"image": torch.zeros(1, 4, 16, 16), "mask_image": mask()}, "latents"),
    "latents_of_another_kind": ({"image": torch.zeros(1, 8, 16, 16)}, "latents"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(pipe: TextToImagePipeline, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        pipe("cat", **SETTINGS, **arguments)
    assert "\n" not in str(caught.value)


def test_an_inpainting_model_wants_a_mask(folder: Callable[[str], Path]) -> None:
    ours = TextToImagePipeline.from_pretrained(folder("inpaint"), device="cpu")
    with pytest.raises(UserError, match="give a mask_image"):
        ours("cat", image=picture(), **SETTINGS)
