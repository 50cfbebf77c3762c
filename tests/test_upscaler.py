"""Pictures made larger: forms, modes, sizes, tiles, files, the command, and the bundled network against bicubic."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from picture_files import encoded, noise
from PIL import Image, ImageDraw, PngImagePlugin
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.models.esrgan import CompactConfig, RRDBConfig, RRDBNet, SRVGGNetCompact
from pipelines.recipe import Recipe, read_recipe
from pipelines.upscale_cli import main
from pipelines.upscaler import Upscaler

ROOT = Path(__file__).resolve().parents[1]


class Nearest(SRVGGNetCompact):
    """A network whose last layer adds nothing: each pixel becomes a square, so that each result is known."""

    def __init__(self, scale: int = 2):
        super().__init__(CompactConfig(4, 1, scale))
        with torch.no_grad():
            last = self.get_submodule(f"body.{len(self.body) - 1}")
            for parameter in last.parameters():
                parameter.zero_()


def squares(pixels: np.ndarray, scale: int = 2) -> np.ndarray:
    return pixels.repeat(scale, 0).repeat(scale, 1)


@pytest.fixture(scope="module")
def bundled() -> Upscaler:
    return Upscaler.from_pretrained()


@pytest.mark.parametrize("tile", [16, 0])
def test_a_picture_keeps_its_pixels_in_their_places(tile: int) -> None:
    pixels = noise(37, 21)
    found = Upscaler(Nearest(), tile)(Image.fromarray(pixels))
    assert found.mode == "RGB" and (np.asarray(found) == squares(pixels)).all()


def test_tensors_and_lists_come_back_in_their_form() -> None:
    upscaler, x = Upscaler(Nearest(), 16), torch.rand(2, 3, 20, 18, dtype=torch.float64)
    found = upscaler(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.float().repeat_interleave(2, -1).repeat_interleave(2, -2))
    pictures = [Image.fromarray(noise(4, 6)), Image.fromarray(noise(5, 3))]
    assert [each.size for each in upscaler(pictures)] == [(12, 8), (6, 10)]
    assert upscaler([]) == []


def test_the_bundled_network_is_read_exactly_and_tiles_join(bundled: Upscaler) -> None:
    x = torch.from_numpy(noise(40, 50)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        whole = bundled.network(x).clamp(0, 1)
    found = Upscaler(bundled.network, 16)(x)
    assert bundled.scale == 4 and bundled.network.radius == 18
    assert (found - whole).abs().max() < 1e-5  # float32 rounding in sums of some 600 products, 18 times


def test_the_bundled_network_restores_edges_better_than_bicubic(bundled: Upscaler) -> None:
    large = Image.new(
        "RGB", (1024, 1024), "white"
    )  # a face with outlines, drawn at four times the size for soft edges
    pen = ImageDraw.Draw(large)
    pen.ellipse((150, 150, 850, 800), fill=(240, 120, 30), outline=(60, 30, 20), width=30)
    pen.ellipse((300, 350, 400, 475), fill=(60, 30, 20))
    pen.ellipse((600, 350, 700, 475), fill=(60, 30, 20))
    pen.arc((350, 400, 650, 700), 20, 160, fill=(60, 30, 20), width=25)
    true = large.resize((256, 256), Image.Resampling.BOX)
    small = true.resize((64, 64), Image.Resampling.BICUBIC)
    errors = [
        np.square(np.asarray(each).astype(float) - np.asarray(true)).mean()
        for each in (bundled(small), small.resize((256, 256), Image.Resampling.BICUBIC))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    ("factor", "size"), [(2, (24, 20)), (3, (36, 30)), (1.5, (18, 15)), (0.5, (6, 5)), (0.01, (1, 1))]
)
def test_any_scale_is_a_resize_of_the_networks_own(factor: float, size: tuple[int, int]) -> None:
    upscaler, pixels = Upscaler(Nearest()), noise(10, 12)
    found = upscaler(Image.fromarray(pixels), factor)
    assert found.size == size
    large = Image.fromarray(squares(pixels))
    expected = large if factor == 2 else large.resize(size, Image.Resampling.LANCZOS)
    assert (np.asarray(found) == np.asarray(expected)).all()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert upscaler(x, factor).shape == (1, 3, size[1], size[0])


def test_grey_clear_deep_cmyk_and_turned_pictures() -> None:
    upscaler, pixels = Upscaler(Nearest()), noise(6, 8)
    grey = pixels[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for source in (Image.fromarray(grey), deep):
        found = upscaler(source)
        assert found.mode == "L" and (np.asarray(found) == squares(grey)).all()
    both = upscaler(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(pixels[..., 1])]))
    assert both.mode == "LA" and (np.asarray(both)[..., 1] == squares(pixels[..., 1])).all()
    ink = Image.fromarray(pixels).convert("CMYK")
    assert (np.asarray(upscaler(ink)) == squares(np.asarray(ink.convert("RGB")))).all()
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # a quarter turn to the right makes it upright
    assert (np.asarray(upscaler(turned)) == squares(np.rot90(pixels, -1))).all()
    palette = Image.fromarray(pixels).quantize(4)
    assert (np.asarray(upscaler(palette)) == squares(np.asarray(palette.convert("RGB")))).all()


def test_alpha_is_enlarged_on_its_own_and_what_lies_under_it_does_not_bleed() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)  # clear black around an opaque orange square
    pixels[4:12, 4:12] = (240, 120, 0, 255)
    found = np.asarray(Upscaler(Nearest())(Image.fromarray(pixels)))
    assert (found[..., 3] == squares(pixels[..., 3])).all()
    assert (found[8:24, 8:24, :3] == (240, 120, 0)).all()
    rim = found[6:8, 8:24, :3].astype(int)  # just outside, where there was black
    assert np.abs(rim - (240, 120, 0)).max() <= 12  # 8-bit colours divided by an 8-bit alpha


def test_what_cannot_be_enlarged_is_one_line(tmp_path: Path) -> None:
    upscaler = Upscaler(Nearest())
    picture = Image.fromarray(noise())
    broken: list[tuple[Any, Any, str]] = [
        (picture, 0, "the scale is 0"),
        (picture, float("nan"), "the scale is nan"),
        (picture, 65, "64 at the most"),
        (Image.new("RGB", (9000, 9000)), 4, "are the most"),
        (Image.new("RGB", (0, 5)), None, "would get 0"),
        (Image.new("F", (5, 5)), None, "8 or 16 bits"),
        (torch.zeros(3, 5, 5), None, "give (B, 3, H, W)"),
        (torch.zeros(1, 4, 5, 5), None, "give (B, 3, H, W)"),
        (torch.zeros(1, 3, 5, 5, dtype=torch.int64), None, "give (B, 3, H, W)"),
        (torch.zeros(1, 3, 0, 5), None, "give (B, 3, H, W)"),
        (torch.full((1, 3, 5, 5), torch.nan), None, "came out as NaN"),
        (17, None, "a int can't be enlarged"),
    ]
    for value, scale, words in broken:
        with pytest.raises(UserError) as caught:
            upscaler(value, scale)
        assert words in str(caught.value) and "\n" not in str(caught.value), words
    for tile in (-1, 3, True, 2.5):
        with pytest.raises(UserError, match="tile is"):
            Upscaler(Nearest(), tile)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="no such file"):
        Upscaler.from_pretrained(tmp_path / "x.pth")


def test_a_file_of_ones_own_is_loaded_in_its_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = RRDBNet(RRDBConfig(8, 4, 1, 1))
    torch.save({"params_ema": network.state_dict()}, tmp_path / "x.pth")
    x = torch.rand(1, 3, 9, 9)
    single = Upscaler.from_pretrained(tmp_path / "x.pth", device="cpu")
    half = Upscaler.from_pretrained(str(tmp_path / "x.pth"), torch_dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        expected: Tensor = network(x).clamp(0, 1)
    assert (single(x) - expected).abs().max() < 1e-6
    assert half.network.conv_last.weight.dtype == torch.bfloat16
    assert (half(x) - expected).abs().max() < 0.05 and half(x).dtype == torch.float32
    assert F.mse_loss(half(x), expected) > 0


# The command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(Nearest().state_dict(), tmp_path / "nearest.safetensors")
    return tmp_path / "nearest.safetensors"


def test_the_command_enlarges_files_and_keeps_their_texts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, source = noise(), tmp_path / "pictures"
    source.mkdir()
    recipe = Recipe("a fox, «ünï»", seed=3)
    info = recipe.png_info()
    info.add_text("Comment", "by me")
    info.add_text("long", "x" * 5000, zip=True)
    (source / "a fox.png").write_bytes(encoded(pixels, pnginfo=info, icc_profile=b"not much of a profile"))
    (source / "b.JPG").write_bytes(encoded(np.full((5, 7, 3), 90, np.uint8), "jpeg"))
    (source / "notes.txt").write_text("no picture")
    assert main([str(source), "--out", str(tmp_path / "out"), "--model", str(model)]) == 0
    names = [tmp_path / "out" / "a fox-x2.png", tmp_path / "out" / "b-x2.png"]
    assert capsys.readouterr().out.splitlines() == [str(each) for each in names]
    found = Image.open(names[0])
    assert (np.asarray(found) == squares(pixels)).all()
    assert isinstance(found, PngImagePlugin.PngImageFile)
    assert found.text["Comment"] == "by me" and found.text["long"] == "x" * 5000
    assert read_recipe(names[0]) == recipe
    assert found.info["icc_profile"] == b"not much of a profile"
    assert Image.open(names[1]).size == (14, 10)
    again = [str(source / "b.JPG"), "--out", str(tmp_path / "out"), "--model", str(model), "--scale", "3"]
    assert main(again) == 0 and main(again) == 0
    assert [each.name for each in sorted((tmp_path / "out").glob("b-*"))] == [
        "b-x2.png",
        "b-x3-2.png",
        "b-x3.png",
    ]
    one = tmp_path / "new" / "one.png"
    for _ in range(2):  # a file that is named is replaced
        assert main([str(source / "b.JPG"), "--out", str(one), "--model", str(model)]) == 0
    assert Image.open(one).size == (14, 10) and [each.name for each in one.parent.iterdir()] == ["one.png"]


def test_bad_files_are_named_and_the_others_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = encoded(noise())
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "half.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    names = ["half.png", "text.png", "empty.png", "missing.png", "good.png"]
    arguments = [str(tmp_path / each) for each in names]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--model", str(model)]) == 2
    shown = capsys.readouterr()
    errors = shown.err.splitlines()
    assert len(errors) == 5 and errors[4] == "1 of 5 pictures were enlarged"
    assert all(
        name in line and line.startswith("error: ") for name, line in zip(names[:4], errors[:4], strict=True)
    )
    assert shown.out.splitlines() == [str(tmp_path / "out" / "good-x2.png")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "missing.pth"], "no such file"),
        (["--model", "good.png"], "holds no weights"),
        (["--scale", "0"], "the scale is 0"),
        (["--tile", "5"], "tile is 5"),
        (["--out", "large.jpg"], "saved as PNG"),
        (["good.png", "--out", "large.png"], "one file for 2 pictures"),
        (["--device", "abacus"], "can't be used"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.png").write_bytes(encoded(noise()))
    assert main(["good.png", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_the_script_runs_from_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(noise()))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "upscale.py"),
        str(tmp_path / "x.png"),
        "--out",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert Image.open(io.BytesIO((tmp_path / "x-x4.png").read_bytes())).size == (32, 24)
