"""On the way between two noises: the ways, the ends, pictures led up to their noise, files and bad input."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.sampling import encode
from pipelines import TextToImagePipeline
from pipelines.cli import main
from pipelines.interpolation import between, lerp, noises_of, save, slerp
from pipelines.recipe import Recipe
from tests.tiny import tiny_pipeline_folder

FAST = {"num_inference_steps": 3, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("model"), "sd1")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder, device="cpu")


def test_ways_on_a_circle_and_on_a_line() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(
        slerp(a, b, 1 / 3), torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    )
    torch.testing.assert_close(lerp(a, b, 0.25), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(slerp(a, a, 0.4), a)
    torch.testing.assert_close(slerp(a, -a, 0.0), a)


def test_noises_between_keep_their_size_on_the_sphere() -> None:
    noises = torch.randn(3, 4, 16, 16)
    way = between(noises, 5)
    assert len(way) == 9
    for k in range(3):
        torch.testing.assert_close(way[4 * k], noises[k])
    assert (way.flatten(1).std(1) - 1).abs().max() < 0.1
    # on a line the middle of two independent noises has half of their variance
    middle = between(noises[:2], 3, "lerp")[1]
    assert middle.var().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_ends_are_the_seeds_pictures(pipe: TextToImagePipeline, sampler: str) -> None:
    """Also with noise on the way, which is of the first seed for all: there the first alone is its seed's."""
    settings = {"sampler": sampler, **FAST}
    drawn = pipe.interpolate("cat", seeds=(3, 8), frames=10, **settings)
    assert len(drawn.images) == 10 == len(drawn.recipes)
    ends = [np.asarray(pipe("cat", seed=seed, **settings).images[0], int) for seed in (3, 8)]
    for number, (place, end) in enumerate(zip((0, -1), ends, strict=True)):
        if number == 0 or sampler == "euler":
            assert np.abs(np.asarray(drawn.images[place], int) - end).max() <= 1
    assert drawn.recipes[3].beside == ("generator", "latents")


def test_pictures_come_back_from_their_noise(pipe: TextToImagePipeline) -> None:
    """Led up by Heun's method and down again, the latents of pictures return: the error falls by the order, 2."""
    pictures = [Image.effect_noise((32, 32), 80).convert("RGB") for _ in range(2)]
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        x0 = encode(pipe.system.autoencoder, pixels)
    far = []
    for steps in (16, 48):
        settings = {"num_inference_steps": steps, "sampler": "heun", "guidance_scale": 1.0}
        drawing = pipe.complete(Recipe("cat", **settings))
        with torch.no_grad():
            noises = noises_of(pipe.system, drawing, (), pictures, pipe._loaded, pipe.device)
        back = pipe(["cat"] * 2, latents=noises, output_type="latent", progress=False, **settings).images
        far.append((back - x0).abs().mean().item())
    # besides the solver's error stands that of the first noise level, at which pictures are taken to lie
    assert far[1] < far[0] / 3 and far[1] < 0.06, far


def test_strips_and_animations(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    drawn = pipe.interpolate("cat", seeds=(1, 2), frames=4, **FAST).images
    with Image.open(save(drawn, tmp_path / "strip.png")) as strip:
        assert strip.size == (4 * drawn[0].width, drawn[0].height)
    for name in ("there-and-back.gif", "there-and-back.webp"):
        with Image.open(save(drawn, tmp_path / name)) as animation:
            assert animation.n_frames == 6 and animation.size == drawn[0].size
    with Image.open(tmp_path / "there-and-back.webp") as animation:
        assert np.array_equal(np.asarray(animation.convert("RGB")), np.asarray(drawn[0]))  # lossless


def test_command(folder: Path, tmp_path: Path) -> None:
    start, end = tmp_path / "a.png", tmp_path / "b.png"
    for path, colour in ((start, "red"), (end, "blue")):
        Image.new("RGB", (32, 32), colour).save(path)
    for ends, out in (("1,2,5", "seeds.gif"), (f"{start},{end}", "pictures.png")):
        path = tmp_path / out
        command = [
            "cat",
            "--model",
            str(folder),
            "--steps",
            "3",
            "--quiet",
            "--frames",
            "3",
            "--interpolate",
            ends,
        ]
        assert main([*command, "--out", str(path)]) == 0
        with Image.open(path) as found:
            assert getattr(found, "n_frames", 1) == (8 if out.endswith("gif") else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "b", "--interpolate", "1,2"], "one prompt"),
        (["a", "--interpolate", "1,2", "--seed", "3"], "--seed does not go with"),
        (["a", "--interpolate", "1,two.png"], "give seeds, or pictures"),
        (["a", "--interpolate", "1,2", "--out", "x.jpg"], "strip .png"),
        (["a", "--interpolate", "1"], "two or more seeds"),
        (["a", "--interpolate", "1,2", "--frames", "1"], "at least 2 frames"),
        (["a", "--interpolate", "no.png,nope.png"], "no such file"),
        (["a", "--interpolate", "no.png,nope.png", "--guidance-scale", "3"], "unguided"),
    ],
)
def test_bad_input_gets_a_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--model", str(folder), "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_unknown_way_gets_a_line(pipe: TextToImagePipeline) -> None:
    with pytest.raises(UserError, match="did you mean slerp"):
        pipe.interpolate("cat", method="slurp", **FAST)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="leave image out"):
        pipe.interpolate("cat", image={"path": "cat.png"}, **FAST)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "0"], "--seed does not go with --interpolate"),
        (["--image", "a.png"], "--image does not go with --interpolate"),
        (["--control", "a.png"], "--control does not go with --interpolate"),
        (["--clip-model", "bundled"], "--clip-model does not go with --interpolate"),
        (["--preview", "a.png"], "--preview does not go with --interpolate"),
        (["--trust"], "--trust does not go with --interpolate"),
        (["--infotext"], "--infotext does not go with --interpolate"),
        (["--batch-size", "2"], "--batch-size does not go with --interpolate"),
    ],
)
def test_options_that_would_do_nothing_between_pictures_are_refused(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli import main

    assert main(["a fox", "--interpolate", "1,2", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [["--frames", "4"], ["--interpolation", "lerp"]])
def test_options_of_interpolation_alone_are_refused_without_it(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli import main

    assert main(["a fox", *more]) == 2
    assert "is of --interpolate" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [str(2**64), "9" * 5000])
def test_seeds_that_no_generator_takes_are_refused(
    seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sd1")
    capsys.readouterr()
    strip = ["--model", str(folder), "--out", str(tmp_path / "strip.png"), "--quiet"]
    assert main(["cat", "--interpolate", f"1,{seed}", *strip]) == 2
    error = capsys.readouterr().err
    assert "does not fit in 64 bits" in error and error.count("\n") == 1


def test_a_strip_without_a_name_is_written_over_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sd1")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert (
            main(
                [
                    "cat",
                    "--interpolate",
                    "1,2",
                    "--frames",
                    "2",
                    "--steps",
                    "1",
                    "--model",
                    str(folder),
                    "--quiet",
                ]
            )
            == 0
        )
    assert {each.name for each in (tmp_path / "outputs").iterdir()} == {
        "interpolation.png",
        "interpolation-2.png",
    }
