"""LoRA files: diffusers draws from ours what we draw, we read what diffusers and kohya write, mistakes are named."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from random_lora import CASES, DRAW, made, networks, unet_config
from safetensors.torch import load_file, save_file
from test_pipeline import psnr
from tiny import tiny_pipeline_folder, tiny_unet
from torch import Tensor

from ldm.checkpoints import lora as files
from ldm.checkpoints.files import read_metadata, write_tensors
from ldm.checkpoints.lora import read_lora, write_lora
from ldm.checkpoints.lora_names import layers_of, spellings
from ldm.errors import UserError
from ldm.models.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_pipeline_folder(tmp_path_factory.mktemp(family), family))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", list(CASES))
def test_diffusers_draws_the_same_picture_from_our_file(
    folder: Callable[[str], Path], tmp_path: Path, family: str, layout: files.Layout
) -> None:
    pytest.importorskip("peft")
    import diffusers

    pipe = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
    weights = made(pipe, CASES[family])
    write_lora(tmp_path / files.FILE, weights, layout, unet_config(pipe))
    plain = pipe("the cat", **DRAW).images
    pipe.adapters.load_lora(tmp_path, weight=0.8)
    drawn = pipe("the cat", **DRAW).images
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder(family), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, weight_name=files.FILE, adapter_name="ours")
    theirs.set_adapters(["ours"], [0.8])
    settings = {key: value for key, value in DRAW.items() if key != "seed"}
    expected = theirs("the cat", generator=torch.Generator().manual_seed(3), **settings).images
    assert psnr(drawn, plain) < 40  # the LoRA does something
    assert psnr(drawn, expected) > 60
    pipe.adapters.merge()
    assert psnr(pipe("the cat", **DRAW).images, drawn) > 60
    pipe.adapters.unload_loras()
    np.testing.assert_array_equal(pipe("the cat", **DRAW).images, plain)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", list(CASES))
def test_a_file_keeps_every_bit(
    folder: Callable[[str], Path], tmp_path: Path, family: str, layout: files.Layout
) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
    weights = made(pipe, CASES[family])
    for k, (path, (down, up, _)) in enumerate(
        list(weights["unet"].items())[::3]
    ):  # ranks and alphas of its own
        weights["unet"][path] = (torch.cat([down, down]), torch.cat([up, up], 1), 0.5 + k)
    file = tmp_path / "a.safetensors"
    write_lora(file, weights, layout, unet_config(pipe), {"config": "rank: 3"})
    assert read_metadata(file)["config"] == "rank: 3"
    names = set(load_file(file))
    if layout == "kohya":
        assert any(name.startswith("lora_unet_middle_block_1_") for name in names) == (family == "sdxl")
        assert any(name.startswith("lora_te1_text_model_encoder_layers_0_") for name in names) == (
            family == "sdxl"
        )
    else:
        assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in names
    again = read_lora(file, networks(pipe), unet_config(pipe))
    assert again.keys() == weights.keys()
    for part, adapter in weights.items():
        assert again[part].keys() == adapter.keys()
        for path, (down, up, alpha) in adapter.items():
            assert torch.equal(again[part][path][0], down) and torch.equal(again[part][path][1], up)
            assert again[part][path][2] == alpha


def test_what_diffusers_writes_and_has_written(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Today's files of its training scripts, and by hand the spellings of its older versions."""
    pytest.importorskip("peft")
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    unet = tiny_unet("sd1")
    targets = ["to_q", "to_out.0", "conv1"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"conv1": 2}, "use_rslora": True}
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=settings)
    found = read_lora(tmp_path, networks(pipe))
    assert {alpha for path, (_, _, alpha) in found["unet"].items() if path.endswith("to_q")} == {16.0}
    assert {alpha for path, (_, _, alpha) in found["unet"].items() if path.endswith("conv1")} == {4.0}

    attention, clip = "mid_block.attentions.0.transformer_blocks.0.attn1", "text_model.encoder.layers.1"
    pair = {"down": torch.randn(4, 64), "up": torch.randn(64, 4)}
    text = {"down": torch.randn(4, 32), "up": torch.randn(32, 4)}
    fc1 = {"down": torch.randn(4, 32), "up": torch.randn(64, 4)}
    old: dict[str, Tensor] = {}
    for half in ("down", "up"):
        old[f"unet.{attention}.processor.to_out_lora.{half}.weight"] = pair[half]
        old[f"{attention}.processor.to_q_lora.{half}.weight"] = pair[half]
        old[f"unet.{attention}.to_v.lora.{half}.weight"] = pair[half]
        old[f"text_encoder.{clip}.self_attn.to_out_lora.{half}.weight"] = text[half]
        old[f"text_encoder.{clip}.self_attn.q_proj.lora_linear_layer.{half}.weight"] = text[half]
        old[f"text_encoder.{clip}.mlp.fc1.lora_linear_layer.{half}.weight"] = fc1[half]
    old[f"unet.{attention}.to_v.alpha"] = torch.tensor(1.0)
    write_tensors(tmp_path / "old.safetensors", old)
    found = read_lora(tmp_path / "old.safetensors", networks(pipe))
    assert {path: alpha for path, (_, _, alpha) in found["unet"].items()} == {
        f"{attention}.to_out.0": 4.0,
        f"{attention}.to_q": 4.0,
        f"{attention}.to_v": 1.0,
    }
    assert {path.partition("layers.1.")[2] for path in found["text_encoder"]} == {
        "self_attn.out_proj",
        "self_attn.q_proj",
        "mlp.fc1",
    }


def test_alphas_that_cannot_be_read(folder: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    write_lora(tmp_path / "a.safetensors", made(pipe, {"unet": "attention"}))
    tensors = load_file(tmp_path / "a.safetensors")
    for said in ("no JSON", "[1]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": {"(": 1}}'):
        save_file(tensors, tmp_path / "b.safetensors", {files.METADATA: said})
        with pytest.raises(
            UserError, match=r"metadata lora_adapter_metadata (can't be read|is not valid JSON|holds a list)"
        ):
            read_lora(tmp_path / "b.safetensors", networks(pipe))


def test_kohyas_names_of_the_published_sizes() -> None:
    """Every name is of one layer only, and SDXL's U-Net has the names that published files have."""
    config = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for settings in ({}, config):
        with torch.device("meta"):
            unet = UNet(UNetConfig(**settings))
        layers = layers_of("unet", unet)
        names = spellings(layers, unet.config.to_diffusers())  # raises where a name is of two layers
        assert set(names.values()) == set(layers)
    attention = "transformer_blocks.0.attn1.to_q"
    for name, path in {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": f"down_blocks.1.attentions.0.{attention}",
        "middle_block_1_transformer_blocks_0_attn1_to_q": f"mid_block.attentions.0.{attention}",
        "output_blocks_5_1_transformer_blocks_0_attn1_to_q": f"up_blocks.1.attentions.2.{attention}",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "label_emb_0_0": "add_embedding.linear_1",
    }.items():
        assert names[f"lora_unet_{name}"].path == path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"unet.mid_block.odd.lora_A.weight": (3, 64)},
            "keys of no layer of this model .*: 1 of .*mid_block.odd",
        ),
        ({"text_encoder_2.x.lora_A.weight": (3, 64)}, "text_encoder_2.x.lora_A.weight"),
        ({"unet.ATT.to_q.lora_B.weight": None}, "ATT.to_q.lora_B.weight is missing"),
        ({"unet.ATT.to_q.lora_A.weight": (3, 48)}, r"lora_A.weight is \(3, 48\) .* the layer is \(64, 64\)"),
        ({"unet.ATT.to_q.lora_A.weight": (4, 64)}, "a LoRA for another model"),
        ({"unet.ATT.processor.to_q_lora.down.weight": (3, 64)}, "gives some layer twice"),
        ({"unet.ATT.to_q.oft_R.weight": (3, 3)}, "is an OFT"),
        ({"unet.ATT.to_q.a1.weight": (3, 3)}, "is a GLoRA"),
        ({"text_encoder.x.lora_embedding_A": (3, 3)}, "is a LoRA of embeddings"),
        ({"unet.ATT.to_q.hada_w1_a": (64, 3)}, "two kinds of adapter at once"),
        (
            {"unet.ATT.to_k.odd_thing": (3, 3)},
            "1 of 65 keys are no part of an adapter .* other 64 fit this model",
        ),
        ({"unet.ATT.to_k.weight": (64, 64)}, "whole weights of layers, not changes of them"),
        ({"unet.ATT.to_q.lora_A.weight": (10000, 64)}, "no rank is that"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (3, 64)}, "by their names Flux"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (3, 64)}, "by their names SDXL"),
    ],
)
def test_files_that_do_not_fit(
    folder: Callable[[str], Path], tmp_path: Path, change: dict[str, tuple[int, ...] | None], words: str
) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    write_lora(tmp_path / "a.safetensors", made(pipe, {"unet": "attention"}))
    tensors = load_file(tmp_path / "a.safetensors")
    for name, shape in change.items():
        name = name.replace("ATT", attention)
        tensors.pop(name) if shape is None else tensors.update({name: torch.ones(shape)})
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=words.replace("ATT", re.escape(attention))):
        pipe.adapters.load_lora(tmp_path / "b.safetensors")
