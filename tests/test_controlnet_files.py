"""ControlNets on disk: names and shapes of the published ones, both layouts there and back, other files refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from controls import saved_controlnet, tiny_controlnet
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline_folder
from torch import Tensor

from ldm.checkpoints.controlnet import CONFIG, config_of, read_controlnet
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.layouts import controlnet_rows
from ldm.conditioning.controlnets import load_controlnet, save_controlnet, save_controlnet_file
from ldm.errors import UserError
from ldm.models.controlnet import ControlNet, ControlNetConfig

XL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768},
    "SD 2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": XL,
    "SDXL, mid": XL | {"transformer_layers_per_block": (0, 0, 1)},
    "SDXL, small": XL | {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
}


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in tensors.items()}


# Names


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    """Ours by diffusers' names; the rows there and back; LDM's names as diffusers itself reads them."""
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    with torch.device("meta"):
        theirs = ControlNetModel(**PUBLISHED[name])
        network = ControlNet(ControlNetConfig.from_diffusers(dict(theirs.config)))
    ours = network.state_dict()
    assert shapes(ours) == shapes(theirs.state_dict())

    rows = controlnet_rows(network.config.to_diffusers())
    there = KeyMap.over_ours(rows, ours, name)
    renamed = there.to_theirs(ours)
    assert len(renamed) == len(ours) and "input_hint_block.14.weight" in renamed
    assert KeyMap.over_theirs(rows, renamed, name).names() == there.names()
    if "small" not in name:  # diffusers' own reader takes a middle with attention for granted
        back = convert_controlnet_checkpoint(dict(renamed), network.config.to_diffusers())
        known = {each: tensor for each, tensor in ours.items() if not each.startswith("add_embedding")}
        assert shapes(back) == shapes(known)  # it passes over SDXL's sizes


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL"])
def test_settings_are_read_off_published_files(name: str) -> None:
    with torch.device("meta"):
        config = ControlNetConfig(**PUBLISHED[name])
        tensors = ControlNet(config).state_dict()
    assert ControlNetConfig.from_diffusers(config_of(tensors, "control.safetensors")) == config
    shuffle = ControlNetConfig.from_diffusers(config_of(tensors, "x/control_v11e_sd15_shuffle.pth"))
    assert shuffle.global_pool_conditions


# There and back


def same(network: ControlNet, tensors: dict[str, Tensor]) -> bool:
    own = network.state_dict()
    return own.keys() == tensors.keys() and all(
        torch.equal(own[name], each) for name, each in tensors.items()
    )


def test_folders_go_to_diffusers_and_back(tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    theirs = tiny_controlnet("sdxl", controlnet_conditioning_channel_order="bgr", global_pool_conditions=True)
    theirs.save_pretrained(tmp_path / "theirs")
    network = load_controlnet(tmp_path / "theirs")
    assert same(network, theirs.state_dict()) and not network.training
    assert not any(each.requires_grad for each in network.parameters())
    save_controlnet(network, tmp_path / "ours")
    again = ControlNetModel.from_pretrained(tmp_path / "ours")
    assert same(network, again.state_dict())
    ours, expected = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")
    )
    assert ours.items() <= expected.items()
    (tmp_path / "ours" / "README.md").write_text("mine")
    save_controlnet(load_controlnet(tmp_path / "ours", torch.float16), tmp_path / "ours")
    assert load_controlnet(tmp_path / "ours").conv_in.weight.dtype == torch.float32
    assert (
        load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].dtype
        == torch.float16
    )
    assert (tmp_path / "ours" / "README.md").read_text() == "mine"


def test_pickles_variants_and_pipelines_are_read(tmp_path: Path) -> None:
    theirs = tiny_controlnet("sd1")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert same(load_controlnet(tmp_path / "bin"), theirs.state_dict())
    theirs.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert same(load_controlnet(tmp_path / "fp16", variant="fp16"), theirs.state_dict())
    with pytest.raises(UserError, match="variant='fp16'"):
        load_controlnet(tmp_path / "fp16")
    whole = tiny_pipeline_folder(tmp_path, "sd1")
    with pytest.raises(UserError, match="whole system without a ControlNet"):
        load_controlnet(whole)
    shutil.copytree(tmp_path / "bin", whole / "controlnet")
    assert same(load_controlnet(whole), theirs.state_dict())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_single_files_go_there_and_back(tmp_path: Path, family: Any) -> None:
    """Ours with its settings; anybody's by diffusers' names, by LDM's, with the prefix, as a pickle, inside a model."""
    network = load_controlnet(
        saved_controlnet(tmp_path / "folder", family, controlnet_conditioning_channel_order="bgr")
    )
    save_controlnet_file(network, tmp_path / "ours.safetensors")
    again = load_controlnet(tmp_path / "ours.safetensors")
    assert same(again, network.state_dict()) and again.config == network.config

    bare = load_file(tmp_path / "ours.safetensors")
    assert {"input_hint_block.0.weight", "zero_convs.0.0.bias", "middle_block_out.0.weight"} <= bare.keys()
    prefixed = {f"control_model.{name}": each for name, each in bare.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    torch.save({"state_dict": prefixed}, tmp_path / "pickle.pth")
    more = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
    save_file(prefixed | more, tmp_path / "whole.safetensors")
    shutil.copy(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", tmp_path / "named.safetensors")
    for file in (
        "bare.safetensors",
        "prefixed.safetensors",
        "pickle.pth",
        "whole.safetensors",
        "named.safetensors",
    ):
        assert same(load_controlnet(tmp_path / file), network.state_dict()), file


def test_diffusers_reads_our_single_file(tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    widths = {"conditioning_embedding_out_channels": (4, 4, 8, 8)}  # it knows files of four only
    network = load_controlnet(saved_controlnet(tmp_path / "folder", "sd1", **widths))
    save_controlnet_file(network, tmp_path / "ours.safetensors")
    theirs = ControlNetModel.from_single_file(tmp_path / "ours.safetensors", config=str(tmp_path / "folder"))
    assert same(network, theirs.state_dict())


# What is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_controlnet", "input_blocks.0.0.weight"], "a Control-LoRA"),
        (
            ["difference", "control_model.input_hint_block.0.weight"],
            "difference from a model: add that model's",
        ),
        (["task_embedding", "controlnet_cond_embedding.conv_in.weight"], "a ControlNet-Union"),
        (["body.0.in_conv.weight", "conv_in.weight"], "a T2I-Adapter"),
        (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
        (["lllite_unet_input_blocks_4_1.down.0.weight"], "a ControlLLLite"),
        (["pos_embed_input.proj.weight", "controlnet_blocks.0.weight"], "a ControlNet of Stable Diffusion 3"),
        (["controlnet_x_embedder.weight"], "a ControlNet of Flux"),
        (["lora_unet_down.lora_up.weight"], "a LoRA, which goes on top of a model, and no ControlNet"),
        (["first_stage_model.decoder.conv_in.weight"], "an autoencoder without .* and no ControlNet"),
        (["encoder.down.0.block.0.norm1.weight"], "an autoencoder alone and no ControlNet"),
        (["conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"], "one network of a diffusers folder"),
        (["apple"], "a file of names like apple and no ControlNet"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        load_controlnet(tmp_path / "x.safetensors")
    assert "\n" not in str(refused.value)


def test_other_folders_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved_controlnet(tmp_path / "one", "sd1")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "ControlNetUnionModel"}, "holds a 'ControlNetUnionModel', and no ControlNetModel"),
        ({"_class_name": "T2IAdapter"}, "holds a 'T2IAdapter'"),
        ({"_class_name": 3}, "holds a 3"),
        ({"num_control_type": 6}, "'num_control_type' is not one this network knows"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not supported"),
        ({"controlnet_conditioning_channel_order": "rbg"}, "controlnet_conditioning_channel_order"),
        ({"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels is"),
        ({"conditioning_embedding_out_channels": [8] * 99}, "conditioning_embedding_out_channels is"),
        ({"conditioning_channels": 0}, "conditioning_channels is 0"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"cross_attention_dim": 48}, "weights of another family"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_controlnet(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is no ControlNet: it has no config"):
        load_controlnet(folder)
    with pytest.raises(UserError, match="no such folder or file"):
        load_controlnet(tmp_path / "none")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    network = load_controlnet(saved_controlnet(tmp_path / "one", "sd1"))
    save_controlnet_file(network, tmp_path / "x.safetensors")
    bare, file = load_file(tmp_path / "x.safetensors"), tmp_path / "y.safetensors"

    def refuses(tensors: dict[str, Tensor], message: str, said: Any = None) -> None:
        save_file(tensors, file, None if said is None else {CONFIG: json.dumps(said)})
        with pytest.raises(UserError, match=message):
            load_controlnet(file)

    for name in ("zero_convs.1.0.weight", "input_blocks.1.1.norm.bias", "time_embed.0.bias"):
        refuses({k: v for k, v in bare.items() if k != name}, "1 missing")
    refuses({k: v for k, v in bare.items() if not k.startswith("input_blocks")}, "names that are unknown")
    refuses({k: v for k, v in bare.items() if k != "input_blocks.0.0.weight"}, "first layers are missing")
    refuses(
        bare | {"apple": torch.zeros(1)}, "names that are unknown in the single-file layout of ControlNets"
    )
    refuses(
        bare | {"input_blocks.0.0.weight": torch.zeros(3)}, "first layers are missing or of another shape"
    )
    refuses(bare | {"input_hint_block.4.weight": torch.zeros(3)}, "missing or of another shape")
    refuses(bare | {"time_embed.0.bias": torch.full_like(bare["time_embed.0.bias"], torch.nan)}, "NaN")
    config = network.config.to_diffusers()
    refuses(bare, "holds a list", [])
    refuses(bare, "stands where a list is needed", config | {"down_block_types": 3})
    refuses(bare, "stands where a list is needed", config | {"conditioning_embedding_out_channels": ["a"]})
    refuses(bare, "layers_per_block is 'x'", config | {"layers_per_block": "x"})
    refuses(bare, "are missing|unknown", config | {"layers_per_block": 90})
    refuses(bare, "weights of another family", config | {"cross_attention_dim": 48})
    file.write_bytes((tmp_path / "x.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        read_controlnet(file)


def test_other_folders_are_not_written_over(tmp_path: Path) -> None:
    network = load_controlnet(saved_controlnet(tmp_path / "one", "sd1"))
    whole = tiny_pipeline_folder(tmp_path, "sd1")
    for place in (whole, whole / "unet"):
        before = sorted(each.name for each in place.iterdir())
        with pytest.raises(UserError, match="there already and is no saved ControlNetModel"):
            save_controlnet(network, place)
        assert sorted(each.name for each in place.iterdir()) == before
    with pytest.raises(UserError, match=r"written as \.safetensors only"):
        save_controlnet_file(network, tmp_path / "x.ckpt")
