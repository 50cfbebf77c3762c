"""The precision that is chosen where nobody names one, and what becomes of weights that were rounded so."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline_folder

from ldm.errors import UserError
from pipelines import TextToImagePipeline, placement
from pipelines.batch.run import run
from pipelines.batch.setup import Setup
from pipelines.cli import main
from pipelines.recipe import read_recipe

CPU = torch.device("cpu")


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with bfloat16's products; every one can compute with it, if slowly."""
    monkeypatch.setattr(placement.processor, "has", {"avx512_bf16"}.__contains__)
    monkeypatch.delenv("LDM_DTYPE")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("precision"), "sd1")


def test_the_rule_follows_the_processor_and_is_of_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_DTYPE")
    for flags, dtype in (
        ({"avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        ({"avx512f"}, torch.float32),
    ):
        monkeypatch.setattr(placement.processor, "has", flags.__contains__)
        assert placement.choose_dtype(CPU) == dtype
        assert placement.choose_dtype(torch.device("cuda")) == torch.float32
    monkeypatch.setenv("LDM_DTYPE", "float64")
    assert placement.choose_dtype(CPU) == torch.float64
    monkeypatch.setenv("LDM_DTYPE", "float")
    with pytest.raises(UserError, match="did you mean float"):
        placement.choose_dtype(CPU)


def test_what_is_chosen_is_said_and_stands_in_the_recipe(multiplies: None, model: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model, device="cpu")
    assert pipe.dtype == torch.bfloat16
    drawn = pipe("a fox", num_inference_steps=2, seed=1, progress=False)
    assert drawn.recipes[0].dtype == "bfloat16"
    assert [note for note in drawn.notes if "--dtype float32" in note]
    exact = TextToImagePipeline.from_pretrained(model, device="cpu", torch_dtype=torch.float32)
    other = exact("a fox", num_inference_steps=2, seed=1, progress=False)
    assert other.recipes[0].dtype == "float32" and not any("bfloat16" in note for note in other.notes)


def test_rounded_weights_are_neither_saved_nor_widened(multiplies: None, model: Path, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model, device="cpu")
    with pytest.raises(UserError, match=r"torch_dtype=torch\.float32"):
        pipe.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"torch_dtype=torch\.float32"):
        pipe.save_single_file(tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"torch_dtype=torch\.float32"):
        pipe.to(torch.float32)
    assert not list(tmp_path.iterdir()) and pipe.dtype == torch.bfloat16
    pipe.to("cpu", torch.bfloat16)
    # Who asks for bfloat16 gets it, to the disk.
    asked = TextToImagePipeline.from_pretrained(model, device="cpu", torch_dtype=torch.bfloat16)
    asked.to(torch.float32)
    asked.save_pretrained(tmp_path / "asked")
    # And what was bfloat16 has lost nothing.
    asked.to(torch.bfloat16).save_pretrained(tmp_path / "small")
    TextToImagePipeline.from_pretrained(tmp_path / "small", device="cpu").save_pretrained(tmp_path / "same")


def test_the_command_line_says_so_once_and_takes_another(
    multiplies: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", str(model), "--steps", "1", "--seed", "1", "--out", str(tmp_path / "a.png"), "a fox"]
    assert main(where) == 0
    assert capsys.readouterr().err.count("drawn in bfloat16") == 1
    assert read_recipe(tmp_path / "a.png").dtype == "bfloat16"
    assert main([*where, "--dtype", "float32"]) == 0
    assert "bfloat16" not in capsys.readouterr().err
    # A picture is drawn again in its own.
    again = ["--from-image", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), "--trust", str(model)]
    assert main(again) == 0
    assert read_recipe(tmp_path / "b.png").dtype == "float32"


def test_a_run_keeps_the_precision_that_it_was_begun_with(
    monkeypatch: pytest.MonkeyPatch, multiplies: None, model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a fox {k}", "seed": k}) + "\n" for k in range(4)))
    setup = Setup(rows, tmp_path / "out", {"num_inference_steps": 1}, model=str(model), together=2)
    run(setup, verbose=False)
    monkeypatch.setattr(placement.processor, "has", lambda _: False)  # another machine goes on
    next((tmp_path / "out").rglob("*.png")).unlink()
    run(setup, verbose=False)
    drawn = list((tmp_path / "out").rglob("*.png"))
    assert len(drawn) == 4 and {read_recipe(each).dtype for each in drawn} == {"bfloat16"}
