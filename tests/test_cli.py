"""The command line: files, recipes, grids, and one clear line for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline_folder

from ldm.checkpoints.files import write_bytes
from ldm.errors import UserError
from pipelines import jobs
from pipelines.cli import main
from pipelines.files import save_picture
from pipelines.recipe import KEYWORD, Recipe, read_recipe

FAST = ["--steps", "2", "--quiet"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("model"), "sd1")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_prompts_from_arguments_and_a_grid(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--num-images",
        "2",
        "--seed",
        "5",
        "--batch-size",
        "3",
        "--grid",
        str(tmp_path / "grid.png"),
    ]
    assert main(["a cat", "the dog", "--model", str(model), "--out", str(tmp_path), *arguments, *FAST]) == 0
    names = ["0000-a-cat.png", "0001-a-cat.png", "0002-the-dog.png", "0003-the-dog.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in [*names, "grid.png"]]
    assert [read_recipe(tmp_path / name).seed for name in names] == [5, 6, 5, 6]
    assert Image.open(tmp_path / "grid.png").size == (64, 64)
    sheet = pixels(tmp_path / "grid.png")
    assert (sheet[32:, :32] == pixels(tmp_path / names[2])).all()
    assert main(["a cat", "--model", str(model), "--out", str(tmp_path), *FAST]) == 0
    assert (tmp_path / "0004-a-cat.png").exists()  # the next number: nothing is overwritten


def test_a_preview_is_written_over_after_each_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list[np.ndarray]()
    monkeypatch.setattr(
        jobs, "write_bytes", lambda path, data: (write_bytes(path, data), written.append(pixels(path)))
    )
    shown = tmp_path / "shown.png"
    ways: tuple[list[str], ...] = ([], ["--preview", str(shown)])
    for k, more in enumerate(ways):
        out = tmp_path / f"{k}.png"
        assert main(["a cat", "--model", str(model), "--seed", "5", "--out", str(out), *FAST, *more]) == 0
        assert len(written) == 2 * k
    assert (pixels(tmp_path / "0.png") == pixels(tmp_path / "1.png")).all()
    assert [each.shape for each in written] == [(16, 16, 3)] * 2 and (written[0] != written[1]).any()
    assert (pixels(shown) == written[1]).all()


def test_a_file_of_rows_with_settings(model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cat\u2028", "seed": 1},
        {"prompt": "dog", "height": 48, "width": 64, "sampler": "ddim"},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8-sig")  # as some editors write it
    arguments = [
        "--file",
        str(tmp_path / "rows.jsonl"),
        "--seed",
        "9",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert main(["--model", str(model), *arguments, *FAST]) == 0
    first, second = read_recipe(tmp_path / "0000-a-cat.png"), read_recipe(tmp_path / "0001-dog.png")
    assert (first.seed, first.num_inference_steps, first.model) == (1, 2, str(model))
    assert (second.seed, second.sampler, second.height, second.width) == (9, "ddim", 48, 64)


def test_a_picture_is_drawn_again_from_its_recipe(model: Path, tmp_path: Path) -> None:
    settings = [
        "--seed",
        "3",
        "--sampler",
        "euler_ancestral",
        "--guidance-scale",
        "4.5",
        "--negative-prompt",
        "dog",
    ]
    assert main(["a cat", "--model", str(model), "--out", str(tmp_path / "old.png"), *settings, *FAST]) == 0
    old = ["--from-image", str(tmp_path / "old.png"), "--trust", str(model), "--quiet"]
    assert main([*old, "--out", str(tmp_path / "again.png")]) == 0
    assert np.abs(pixels(tmp_path / "old.png") - pixels(tmp_path / "again.png")).max() <= 1
    assert read_recipe(tmp_path / "again.png") == read_recipe(tmp_path / "old.png")
    assert main([*old, "--seed", "4", "--out", str(tmp_path / "other.png")]) == 0
    assert np.abs(pixels(tmp_path / "old.png") - pixels(tmp_path / "other.png")).max() > 1


class Payload:
    """What a malicious pickle would hold: unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def broken(model: Path, tmp_path: Path, how: str) -> Path:
    """A copy of the model with one thing wrong, or another path that is no model."""
    copy = tmp_path / "broken"
    shutil.copytree(model, copy)
    tensors = load_file(copy / WEIGHTS)
    if how == "truncated":
        data = (copy / WEIGHTS).read_bytes()
        (copy / WEIGHTS).write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        (copy / WEIGHTS).write_bytes(b"not weights at all" * 10)
    elif how == "nan":
        tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
        save_file(tensors, copy / WEIGHTS)
    elif how == "family":
        save_file(
            {k: v for k, v in tensors.items() if "attn2" not in k} | {"odd": torch.zeros(1)}, copy / WEIGHTS
        )
    elif how == "pickle":
        file = tmp_path / "model.ckpt"
        torch.save({"state_dict": Payload(tmp_path / "executed")}, file)
        return file
    elif how == "no vae":
        shutil.rmtree(copy / "vae")
    return copy


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "it is cut short or corrupt"),
        ("garbage", WEIGHTS),
        ("nan", "NaN or infinity in 1 of"),
        ("family", "missing (down_blocks.0.attentions.0.transformer_blocks.0.attn2"),
        ("pickle", "safetensors"),
        ("no vae", "has no vae"),
    ],
)
def test_a_model_that_cannot_be_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, words: str
) -> None:
    path = broken(model, tmp_path, how)
    assert main(["a cat", "--model", str(path), "--out", str(tmp_path / "out"), *FAST]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no prompt"),
        (["cat", "--sampler", "eular"], "did you mean euler"),
        (["cat", "--schedule", "karas"], "did you mean karras"),
        (["cat", "--height", "33"], "height 33 is not a multiple of 2"),
        (["cat", "--steps", "0"], "num_inference_steps is 0"),
        (["cat", "--num-images", "0"], "--num-images must be 1 or more"),
        (["cat", "--model", "no/such/folder"], "no/such/folder"),
        (["cat", "--device", "cuda:77"], "the device 'cuda:77' can't be used"),
        (["cat", "--device", "meta"], "the device 'meta' can't be used"),
        (["cat", "--seed", "9" * 30], "does not fit in 64 bits"),
        (["cat", "dog", "--out", "one.png"], "one.png is one file for 2 pictures"),
        (["cat", "--out", "one.jpg"], "one.jpg: pictures are saved as PNG"),
        (
            ["cat", "--out", "one.png", "--grid", "./one.png"],
            "one.png can't be both the picture and the grid",
        ),
        (["cat", "--out", "one.png", "--preview", "one.png"], "both the picture and the preview"),
        (["cat", "--preview", "one.jpg"], "one.jpg: pictures are saved as PNG"),
        (["cat", "--out", "n" * 300 + ".png"], "can't write"),
        (["cat", "--out", "a\0b.png"], "can't be a file's name"),
        (["--file", "a\0b.txt"], "can't be read"),
        (["cat", "--sampler", ""], "sampler '' is unknown"),
        (["cat", "--grid", "one.jpg"], "one.jpg: pictures are saved as PNG"),
        (["--file", "prompts.json"], "prompts.json: prompts come one a line"),
        (["--file", "missing.txt"], "missing.txt can't be read"),
        (["--from-image", "missing.png"], "missing.png: no such file"),
    ],
)
def test_mistakes_cost_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if "--model" in arguments else ["--model", str(model)]
    assert main([*arguments, *given, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.rglob("*.png"))


def test_a_mistake_in_the_last_row_costs_no_drawing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for last, words in (
        ('{"prompt": "dog", "samplr": "ddim"}', "line 2: unknown key 'samplr', did you mean sampler"),
        ('{"prompt": "dog", "height": 33}', "line 2: height 33"),
        ('{"prompt": "dog", "clip_skip": 9}', "line 2: clip_skip is 9"),
        ('{"prompt": "dog", "steps": 9}', "line 2: 'steps' is called num_inference_steps"),
        ('{"prompt": "dog", "model": "another"}', "line 2: 'model' holds for the whole run"),
        ('{"prompt": 5}', "line 2"),
        ("{not json", "line 2 is not valid JSON"),
    ):
        (tmp_path / "rows.jsonl").write_text('{"prompt": "cat"}\n' + last)
        arguments = [
            "--file",
            str(tmp_path / "rows.jsonl"),
            "--model",
            str(model),
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*arguments, *FAST]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert not list((tmp_path / "out").glob("*.png")) if (tmp_path / "out").exists() else True


def test_a_grid_of_several_sizes_is_refused_before_drawing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "cat"}\n{"prompt": "dog", "height": 48}')
    places = ["--out", str(tmp_path / "out"), "--grid", str(tmp_path / "grid.png")]
    assert main(["--file", str(tmp_path / "rows.jsonl"), "--model", str(model), *places, *FAST]) == 2
    assert "a grid needs pictures of one size" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_an_empty_prompt_file_and_a_foreign_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["--file", str(tmp_path / "empty.txt"), "--model", str(model)]) == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    assert main(["--from-image", str(tmp_path / "foreign.png")]) == 2
    (tmp_path / "text.png").write_text("no picture")
    assert main(["--from-image", str(tmp_path / "text.png")]) == 2
    empty, foreign, text = capsys.readouterr().err.splitlines()
    assert "holds no prompt" in empty
    assert "carries no recipe" in foreign
    assert "is no picture that can be read" in text


def test_an_unwritable_place_is_found_before_drawing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["cat", "--model", str(model), "--out", str(tmp_path / "file" / "folder"), *FAST]) == 2
    assert "can't write" in capsys.readouterr().err


def test_nobody_reading_on_loses_no_picture(model: Path, tmp_path: Path) -> None:
    """`ldm-generate ... | head -1`: the pipe is gone when the second picture is named."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "generate.py"
    arguments = [*("cat", "--model", str(model), "--out", str(tmp_path / "out"), "--num-images", "3"), *FAST]
    run = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout and run.stderr
    run.stdout.close()
    error = run.stderr.read()
    assert (run.wait(timeout=300), error) == (0, "")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_a_picture_takes_its_place_whole_and_leaves_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, recipe = Image.new("RGB", (8, 8)), Recipe("Ein Fuchs im Café")
    first = save_picture(picture, recipe, tmp_path)
    assert first.name == "0000-ein-fuchs-im-café.png"
    link = os.link

    def late(source: Path, target: Path) -> None:
        """Another run takes the name in between."""
        if target.name.startswith("0001"):
            target.write_text("another's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert save_picture(picture, recipe, tmp_path).name == "0002-ein-fuchs-im-café.png"
    assert (tmp_path / "0001-ein-fuchs-im-café.png").read_text() == "another's"

    def without_links(source: Path, target: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", without_links)
    assert read_recipe(save_picture(picture, recipe, tmp_path)).prompt == recipe.prompt
    assert sorted(each.name[:4] for each in tmp_path.iterdir()) == ["0000", "0001", "0002", "0003"]


def test_a_recipe_of_a_newer_version_says_so(tmp_path: Path) -> None:
    info = Recipe("cat").png_info()
    info.chunks.clear()
    info.add_itxt(KEYWORD, json.dumps({"prompt": "cat", "brush": "oil", "version": "99.0"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "new.png", pnginfo=info)
    with pytest.raises(UserError, match=r"unknown key 'brush'.*version 99.0 wrote it, this is"):
        read_recipe(tmp_path / "new.png")
