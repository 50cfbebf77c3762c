"""Control-LoRAs: what a file changes of a U-Net's encoder, by the formula; written up to a rank; other families."""

from pathlib import Path

import pytest
import torch
from controls import control_picture, saved_controlnet
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline_folder

from ldm.conditioning.controlnets import load_controlnet, save_control_lora, save_controlnet_file
from ldm.errors import UserError
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from ldm.system import System
from pipelines import TextToImagePipeline


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny system and a ControlNet for it, all of whose weights are others than the U-Net's."""
    folder = tmp_path_factory.mktemp(request.param)
    system = tiny_pipeline_folder(folder / "system", request.param)
    return system, saved_controlnet(folder / "control", request.param)


def moved(path: Path) -> ControlNet:
    """The ControlNet with another encoder than the U-Net's."""
    network = load_controlnet(path)
    generator = torch.Generator().manual_seed(0)
    for name, each in network.named_parameters():
        if each.ndim > 1 and not name.startswith("controlnet_"):
            each += 0.3 * each.std() * torch.randn(each.shape, generator=generator)
    return network


def unet_of(folder: Path) -> UNet:
    network = System.load(folder).network
    assert isinstance(network, UNet)
    return network


def test_a_file_is_the_formula(made: tuple[Path, Path], tmp_path: Path) -> None:
    """W + up @ down for one linear layer and one convolution of LDM's names, all else the U-Net's or the file's own."""
    unet, network = unet_of(made[0]), load_controlnet(made[1])
    save_controlnet_file(network, tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    file = {
        name: each
        for name, each in whole.items()
        if name.startswith(("input_hint_block", "zero_convs", "middle_block_out"))
    }
    base = unet.state_dict()
    torch.manual_seed(0)
    linear, conv = base["time_embedding.linear_1.weight"], base["down_blocks.0.resnets.0.conv1.weight"]
    halves = {
        "time_embed.0": (torch.randn(linear.shape[0], 3), torch.randn(3, linear.shape[1])),
        "input_blocks.1.0.in_layers.2": (
            torch.randn(conv.shape[0], 2, 1, 1),
            torch.randn(2, *conv.shape[1:]),
        ),
    }
    for layer, (up, down) in halves.items():
        file |= {f"{layer}.up": up, f"{layer}.down": down}
    file |= {
        "input_blocks.0.0.bias": torch.full_like(base["conv_in.bias"], 0.5),
        "lora_controlnet": torch.zeros(0),
    }
    save_file(file, tmp_path / "lora.safetensors")
    found = load_controlnet(tmp_path / "lora.safetensors", unet=unet).state_dict()
    up, down = halves["time_embed.0"]
    torch.testing.assert_close(found["time_embedding.linear_1.weight"], linear + up @ down)
    up, down = halves["input_blocks.1.0.in_layers.2"]
    change = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    torch.testing.assert_close(found["down_blocks.0.resnets.0.conv1.weight"], conv + change)
    assert (found["conv_in.bias"] == 0.5).all()
    own = {"time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_in.bias"}
    for name, each in found.items():
        if name in base and name not in own:
            assert torch.equal(each, base[name]), name
    assert torch.equal(
        found["controlnet_mid_block.weight"], network.state_dict()["controlnet_mid_block.weight"]
    )


def test_a_high_rank_is_the_network_and_a_low_one_the_nearest(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    unet, network = unet_of(made[0]), moved(made[1])
    base, own = unet.state_dict(), network.state_dict()
    save_control_lora(network, unet, tmp_path / "full.safetensors", rank=10_000)
    full = load_controlnet(tmp_path / "full.safetensors", unet=unet).state_dict()
    for name, each in own.items():
        assert (full[name] - each).norm() <= 1e-3 * each.norm(), name  # float16 has 11 bits
    save_control_lora(network, unet, tmp_path / "low.safetensors", rank=4)
    low = load_controlnet(tmp_path / "low.safetensors", unet=unet).state_dict()
    name = "mid_block.resnets.0.conv1.weight"
    change, kept = ((each[name] - base[name]).flatten(1) for each in (own, low))
    rest = torch.linalg.svdvals(change)[4:].norm()  # what no matrix of rank 4 can come nearer than
    assert rest > 0.1 * change.norm()
    torch.testing.assert_close((change - kept).norm(), rest, rtol=1e-3, atol=0)
    assert (tmp_path / "low.safetensors").stat().st_size < (tmp_path / "full.safetensors").stat().st_size


def test_a_pipeline_loads_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    unet, network = unet_of(made[0]), moved(made[1])
    save_control_lora(network, unet, tmp_path / "full.safetensors", rank=10_000)
    pipe = TextToImagePipeline.from_pretrained(made[0], device="cpu")
    save_controlnet_file(network, tmp_path / "whole.safetensors")
    pipe.load_controlnet(tmp_path / "whole.safetensors")
    pipe.load_controlnet(tmp_path / "full.safetensors")
    whole, lora = (
        pipe(
            "cat",
            seed=1,
            num_inference_steps=3,
            output_type="np",
            progress=False,
            control_image={name: control_picture()},
        )
        for name in ("whole", "full")
    )
    assert abs(whole.images - lora.images).max() < 0.02  # of float16's rounding


def test_what_does_not_fit_is_one_line(made: tuple[Path, Path], tmp_path: Path) -> None:
    unet, network = unet_of(made[0]), moved(made[1])
    path = tmp_path / "lora.safetensors"
    save_control_lora(network, unet, path, rank=2)
    with pytest.raises(UserError, match="load it into a pipeline"):
        load_controlnet(path)
    tensors = load_file(path)
    up = next(name for name in tensors if name.endswith(".up"))
    cases = {
        "half .down": {name: each for name, each in tensors.items() if name != up[:-2] + "down"},
        "no change of": tensors | {up: torch.zeros(tensors[up].shape[0] + 1, *tensors[up].shape[1:])},
        "no layer in the model": tensors | {"input_blocks.77.0.up": torch.zeros(2, 2)},
        "names that are unknown": tensors | {"rest.weight": torch.zeros(2, 2)},
        "no input_hint_block": {name: each for name, each in tensors.items() if "hint" not in name},
    }
    for words, changed in cases.items():
        save_file({name: each.contiguous() for name, each in changed.items()}, path)
        with pytest.raises(UserError, match=words) as caught:
            load_controlnet(path, unet=unet)
        assert "\n" not in str(caught.value)
