"""LoRA: the arithmetic against peft's, merging to the bit, and the pipeline and the command line around it."""

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lora import CASES, DRAW, made, trained
from test_pipeline import psnr
from tiny import tiny_pipeline_folder, tiny_unet
from torch import nn

from ldm.checkpoints.lora import write_lora
from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models.lora import LoRA, select
from ldm.models.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.cli import main
from pipelines.recipe import read_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_pipeline_folder(tmp_path_factory.mktemp(family), family))


def our_unet(seed: int = 3) -> tuple[UNet, Any]:
    """Our tiny U-Net and diffusers', with the same weights."""
    theirs = tiny_unet("sd1", seed)
    ours = UNet(UNetConfig.from_diffusers(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval().requires_grad_(False), theirs


# The layers


@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, stride=2, padding=1)])
def test_a_layer_is_its_formula(base: nn.Module) -> None:
    x = torch.randn(2, 6, 6, 6) if isinstance(base, nn.Conv2d) else torch.randn(2, 6)
    network = nn.Sequential(base)
    before = network(x)
    adapter = LoRA(network, "0", rank=2, alpha=3.0, dropout=0.5)
    assert torch.equal(network(x), before)  # it starts as no change
    (layer,) = adapter._layers().values()
    nn.init.normal_(layer.up.weight)
    adapter.eval()
    torch.testing.assert_close(network(x), before + 1.5 * layer.up(layer.down(x)))
    attached = network(x)
    adapter.train()
    assert not torch.equal(network(x), attached)  # dropout
    adapter.eval().merge()
    torch.testing.assert_close(network(x), attached, rtol=1e-5, atol=1e-5)
    adapter.detach()
    assert torch.equal(network(x), before)


def test_forward_and_gradients_are_pefts() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, inject_adapter_in_model

    ours, theirs = our_unet()
    adapter = trained(ours, "attention+conv")
    config = LoraConfig(r=3, lora_alpha=2, target_modules=adapter.paths)
    inject_adapter_in_model(config, theirs.requires_grad_(False))
    layers = {name: each for name, each in theirs.named_modules() if hasattr(each, "lora_A")}
    assert set(layers) == set(adapter.paths)
    for path, (down, up, _) in adapter.weights().items():
        layers[path].lora_A["default"].weight.data.copy_(down)
        layers[path].lora_B["default"].weight.data.copy_(up)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    timestep = torch.tensor([3, 700])
    mine, peft = ours(x, timestep, Condition(context)), theirs(x, timestep, context).sample
    torch.testing.assert_close(mine, peft, rtol=1e-4, atol=1e-5)
    mine.square().mean().backward()
    peft.square().mean().backward()
    assert all(each.grad is None for each in ours.parameters())
    for path, layer in adapter._layers().items():
        for half, name in ((layer.down, "lora_A"), (layer.up, "lora_B")):
            theirs_grad = getattr(layers[path], name)["default"].weight.grad
            assert (half.weight.grad - theirs_grad).norm() <= 1e-4 * theirs_grad.norm() + 1e-9


def test_merged_and_unmerged_to_the_bit() -> None:
    unet, _ = our_unet()
    unet.to(torch.bfloat16)
    before = {name: each.clone() for name, each in unet.state_dict().items()}
    one, two = trained(unet, "attention+conv", seed=1), trained(unet, "all-linear", seed=2)
    one.weight, two.weight = 0.8, -0.5
    for adapter in (one, two):
        adapter.merge()
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    (down_1, up_1, _), (down_2, up_2, _) = one.weights()[path], two.weights()[path]
    total = before[f"{path}.weight"].float() + 0.8 * 2 / 3 * up_1 @ down_1 - 0.5 * 2 / 3 * up_2 @ down_2
    merged = unet.get_parameter(f"{path}.weight")
    torch.testing.assert_close(merged.float(), total, rtol=2**-8, atol=1e-6)  # bfloat16, rounded once
    one.unmerge()
    two.weight = 0.0
    assert torch.equal(merged, before[f"{path}.weight"])
    two.weight = 1.0
    one.detach()
    two.detach()
    assert {name for name, each in unet.state_dict().items() if not torch.equal(each, before[name])} == set()
    assert not any("_merged" in key for module in unet.modules() for key in vars(module))


def test_a_deepcopy_of_both_is_of_both() -> None:
    unet, _ = our_unet()
    root = nn.ModuleDict({"unet": unet, "lora": trained(unet)})
    names = [name for name, each in root.named_parameters() if each.requires_grad]
    assert names and all(name.startswith("lora.layers.") for name in names)
    other: Any = copy.deepcopy(root)
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), Condition(torch.randn(1, 7, 32))
    with torch.no_grad():
        expected = root["unet"](*x)
        other["lora"].weight = 0.0
        assert not torch.equal(other["unet"](*x), expected)
        assert torch.equal(root["unet"](*x), expected)
        other["lora"].weight = 1.0
        assert torch.equal(other["unet"](*x), expected)
        other["lora"].detach()
        assert torch.equal(root["unet"](*x), expected)


def test_targets() -> None:
    unet, _ = our_unet()
    projections = {path.rpartition("attn")[2][2:] for path in select(unet, "attention")}
    assert projections == {"to_q", "to_k", "to_v", "to_out.0"}
    convolutions = set(select(unet, "attention+conv")) - set(select(unet, "attention"))
    assert "down_blocks.0.resnets.0.conv1" in convolutions and "conv_in" not in convolutions
    assert "time_embedding.linear_1" in select(unet, "all-linear")
    assert len(select(unet, r"up_blocks\..*to_q")) == 4
    with pytest.raises(UserError, match="'atention' match no layer of this UNet, did you mean attention"):
        LoRA(unet, "atention")
    with pytest.raises(UserError, match="no regular expression"):
        LoRA(unet, "to_(q")
    with pytest.raises(UserError, match="rank 0"):
        LoRA(unet, rank=0)


# The pipeline


def test_several_at_once_and_what_is_saved(folder: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    for name in ("one", "two"):
        write_lora(
            tmp_path / f"{name}.safetensors", made(pipe, CASES["sd1"], alpha=1.0 if name == "one" else 2.0)
        )
    names = set(pipe.system.checkpoint().tensors["unet"])
    plain = pipe("cat", **DRAW).images
    assert [
        pipe.adapters.load_lora(tmp_path / "one.safetensors", 0.5),
        pipe.adapters.load_lora(tmp_path / "two.safetensors", 0.25),
    ] == [
        "one",
        "two",
    ]
    both = pipe("cat", **DRAW)
    assert [(each.path, each.weight) for each in both.recipes[0].loras] == [
        (str(tmp_path / "one.safetensors"), 0.5),
        (str(tmp_path / "two.safetensors"), 0.25),
    ]
    pipe.adapters.set_weights({"two": 0.5})  # the same change as half of each
    assert psnr(pipe("cat", **DRAW).images, both.images) > 60
    assert set(pipe.system.checkpoint().tensors["unet"]) == names
    with pytest.warns(UserWarning, match=r"not written, .*: one, two"):
        pipe.save_pretrained(tmp_path / "apart")
    pipe.adapters.merge()
    with pytest.warns(UserWarning, match=r"written as part of the weights.*: one, two"):
        pipe.save_pretrained(tmp_path / "merged")
    for saved, expected in (("apart", plain), ("merged", both.images)):
        again = TextToImagePipeline.from_pretrained(tmp_path / saved, device="cpu")
        assert psnr(again("cat", **DRAW).images, expected) > 60
    pipe.adapters.unload_loras(["two", "one"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.save_pretrained(tmp_path / "plain")
    for call in (lambda: pipe.adapters.set_weights({"on": 1.0}), lambda: pipe.adapters.unload_loras(["one"])):
        with pytest.raises(UserError, match="no LoRA is named"):
            call()


def test_offloaded_and_in_another_precision(folder: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    offloaded = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu", low_memory=True)
    write_lora(tmp_path / "a.safetensors", made(pipe, CASES["sd1"]))
    for each in (pipe, offloaded):
        each.adapters.load_lora(tmp_path / "a.safetensors")
    expected = pipe("cat", **DRAW).images
    np.testing.assert_array_equal(offloaded("cat", **DRAW).images, expected)
    half = pipe.to("cpu", torch.bfloat16)
    assert all(each.dtype == torch.bfloat16 for part in half.adapters._parts() for each in part.parameters())
    assert psnr(half("cat", **DRAW).images, expected) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True])
def test_half_precision_on_cuda(folder: Callable[[str], Path], tmp_path: Path, low_memory: bool) -> None:
    on_cpu = TextToImagePipeline.from_pretrained(folder("sdxl"), device="cpu")
    write_lora(tmp_path / "a.safetensors", made(on_cpu, CASES["sdxl"]))
    pipe = TextToImagePipeline.from_pretrained(
        folder("sdxl"), device="cuda", torch_dtype=torch.float16, low_memory=low_memory
    )
    for each in (on_cpu, pipe):
        each.adapters.load_lora(tmp_path / "a.safetensors", 0.5)
    expected = on_cpu("cat", **DRAW).images
    assert psnr(pipe("cat", **DRAW).images, expected) > 30
    pipe.adapters.merge()
    assert psnr(pipe("cat", **DRAW).images, expected) > 30


def test_the_command_line_draws_it_again(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    weights = made(pipe, CASES["sd1"])
    file = tmp_path / "style:1.safetensors"  # a colon that is part of the name
    write_lora(file, weights)
    old, again = tmp_path / "old.png", tmp_path / "again.png"
    settings = ["--model", str(folder("sd1")), "--seed", "1", "--steps", "2", "--quiet"]
    assert main(["cat", *settings, "--lora", f"{file}:0.5", "--out", str(old)]) == 0
    assert [each.weight for each in read_recipe(old).loras] == [0.5]
    assert main(["--from-image", str(old), "--trust", "--out", str(again), "--quiet"]) == 0
    assert read_recipe(again) == read_recipe(old)
    assert "note" not in capsys.readouterr().err
    write_lora(file, {"unet": weights["unet"]})
    assert main(["--from-image", str(old), "--trust", "--out", str(again), "--quiet"]) == 0
    assert "has changed since the picture was drawn" in capsys.readouterr().err
    file.unlink()
    assert main(["--from-image", str(old), "--trust", "--out", str(again), "--quiet"]) == 2
    assert "which is not there" in capsys.readouterr().err
