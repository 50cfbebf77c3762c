"""Weights of int8 by torchao: how many bytes, how much is lost, what can't be done with them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_lora import CASES, made
from tiny import tiny_pipeline_folder
from torch import nn

from ldm.checkpoints.lora import write_lora
from ldm.errors import UserError
from ldm.models.quantization import Quantization, check, is_quantized, quantize, weight_bytes
from pipelines import TextToImagePipeline
from pipelines.cli import main
from pipelines.recipe import read_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("model"), "sd1")


def test_without_torchao_it_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("ldm.models.quantization.find_spec", lambda name: None)
    with pytest.raises(UserError, match="unknown quantization 'int4'"):
        check("int4")
    with pytest.raises(UserError, match="pip install torchao"):
        TextToImagePipeline.from_pretrained(folder, quantization="int8")
    assert main(["a cat", "--model", str(folder), "--quantization", "int8"]) == 2
    assert "torchao" in capsys.readouterr().err


def test_weights_are_rounded_to_255_levels_an_output() -> None:
    """Of a row of weights w: round(w / s) * s, s = max|w| / 127.5 or a little more; so no error above s / 2."""
    pytest.importorskip("torchao")
    layer = nn.Linear(64, 16)
    before, bias, x = layer.weight.detach().clone(), layer.bias.detach().clone(), torch.randn(4, 64)
    quantize(layer, "int8")
    assert is_quantized(layer.weight) and not is_quantized(layer.bias)
    after = layer.weight.dequantize()
    assert bool(((after - before).abs() <= before.abs().amax(1, keepdim=True) / 127 / 2 * 1.02).all())
    assert weight_bytes(layer) <= 64 * 16 + 16 * (4 + 8) + 16 * 4  # a scale (and a zero point) an output
    torch.testing.assert_close(layer(x), x @ after.T + bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_pipeline_draws_nearly_the_same_and_says_what_it_can_not(
    folder: Path, tmp_path: Path, kind: Quantization
) -> None:
    if kind == "int8":
        pytest.importorskip("torchao")
    exact = TextToImagePipeline.from_pretrained(folder, device="cpu")
    write_lora(tmp_path / "ink.safetensors", made(exact, CASES["sd1"]))
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu", quantization=kind)
    layers = [each for each in pipe.system.network.modules() if isinstance(each, nn.Linear)]
    assert all(each.weight.element_size() == 1 or is_quantized(each.weight) for each in layers)
    assert weight_bytes(pipe.system.network) < weight_bytes(exact.system.network)
    pictures = list[np.ndarray]()
    for each in (exact, pipe):
        drawn = each("a cat", seed=0, num_inference_steps=2, output_type="np", progress=False)
        pictures.append(np.asarray(drawn.images))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 0.02
    drawn = pipe("a cat", seed=0, num_inference_steps=2, progress=False)
    drawn.images[0].save(tmp_path / "a.png", pnginfo=drawn.recipes[0].png_info())
    assert read_recipe(tmp_path / "a.png").quantization == kind
    assert exact("a cat", num_inference_steps=1, progress=False).recipes[0].quantization is None
    for save in (pipe.save_pretrained, pipe.save_single_file):
        with pytest.raises(UserError, match="load the model without quantization"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.adapters.load_lora(tmp_path / "ink.safetensors")
    assert pipe("a cat", seed=0, num_inference_steps=1, progress=False).recipes[0].loras
    with pytest.raises(UserError, match="can't be merged into quantized"):
        pipe.adapters.merge()
    with pytest.raises(UserError, match="stays in its precision"):
        pipe.to(torch.bfloat16)
    small = weight_bytes(pipe.system.network)
    pipe.to("cpu")
    assert weight_bytes(pipe.system.network) == small
    for other in ({"low_memory": True}, {"low_memory": "sequential"}, {"backend": "openvino"}):
        with pytest.raises(UserError, match="give one of them"):
            TextToImagePipeline.from_pretrained(folder, device="cpu", quantization=kind, **other)  # type: ignore[arg-type]
