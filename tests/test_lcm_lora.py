"""LCM-LoRA (Luo et al. 2023, arXiv:2311.05556): files as diffusers and peft write them, and ours, drawn by both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lora import made, unet_config
from tiny import tiny_pipeline_folder, tiny_unet
from torch import Tensor

from ldm.checkpoints.lora import FILE, write_lora
from ldm.models.lora import select
from ldm.models.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline

# Of diffusers' examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py.
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]
RANK, ALPHA = 64, 8.0


def theirs_of(folder: Path) -> Any:
    import diffusers

    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(ours: TextToImagePipeline, theirs: Any, lora: Path) -> None:
    """Both draw the same picture with the file, another one than without it, guided and not."""

    def drawn(scale: float, other: bool) -> np.ndarray:
        how: dict[str, Any] = {"negative_prompt": "dog", "num_inference_steps": 4, "guidance_scale": scale}
        if other:
            return theirs("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **how).images
        return ours("a cat", seed=3, sampler="lcm", output_type="np", **how).images

    plain = drawn(1.0, False)
    ours.load_lora_weights(lora)
    theirs.load_lora_weights(lora)
    for scale in (1.0, 2.0):
        expected = drawn(scale, True)
        error, change = (float(np.square(each - expected).mean()) for each in (drawn(scale, False), plain))
        assert error < 1e-6 < 1e-4 < change, scale  # 60 dB


def by_peft(unet: Any) -> dict[str, Tensor]:
    """Random weights of an adapter that peft makes for diffusers' U-Net."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            size = parameter[0].numel() ** -0.5
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return get_peft_model_state_dict(unet)


def as_kohya(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As latent-consistency/lcm-lora-sdv1-5 is published: diffusers' names with underscores, alphas as tensors."""
    tensors: dict[str, Tensor] = {}
    for name, each in weights.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        flat = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{flat}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = each
        tensors[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return tensors


@pytest.mark.parametrize(("family", "layout"), [("sd1", "kohya"), ("sdxl", "diffusers")])
def test_their_files_are_drawn_as_they_draw_them(tmp_path: Path, family: Any, layout: str) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file

    folder = tiny_pipeline_folder(tmp_path, family)
    weights, theirs = by_peft(tiny_unet(family)), theirs_of(folder)
    assert {"lora_A", "lora_B"} == {name.removesuffix(".weight").rpartition(".")[2] for name in weights}
    if layout == "kohya":
        (tmp_path / "lora").mkdir()
        save_file(as_kohya(weights), tmp_path / "lora" / FILE)
    else:
        said = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS).to_dict()
        theirs.save_lora_weights(tmp_path / "lora", unet_lora_layers=weights, unet_lora_adapter_metadata=said)
    compare(TextToImagePipeline.from_pretrained(folder, device="cpu"), theirs, tmp_path / "lora")


@pytest.mark.parametrize(("family", "layout"), [("sd1", "diffusers"), ("sdxl", "kohya")])
def test_ours_is_drawn_by_theirs(tmp_path: Path, family: Any, layout: Any) -> None:
    """`targets: blocks` are the layers that peft adapts by the script's list."""
    pytest.importorskip("peft")
    folder = tiny_pipeline_folder(tmp_path, family)
    ours, theirs = TextToImagePipeline.from_pretrained(folder, device="cpu"), theirs_of(folder)
    adapters = made(ours, {"unet": "blocks"}, rank=RANK, alpha=ALPHA)
    own = {name.rpartition(".lora_")[0] for name in by_peft(tiny_unet(family))}
    assert set(adapters["unet"]) == own
    write_lora(tmp_path / "lora" / FILE, adapters, layout, unet_config(ours))
    compare(ours, theirs, tmp_path / "lora")


def test_blocks_of_a_real_size_are_the_list() -> None:
    """All but what embeds, first and last: of Stable Diffusion 1.5's U-Net with the guidance told."""
    with torch.device("meta"):
        network = UNet(UNetConfig(time_cond_proj_dim=256))
    listed = {path for path in select(network, ".*") if path.endswith(tuple(f".{each}" for each in TARGETS))}
    assert set(select(network, "blocks")) == listed
    left = set(select(network, ".*")) - listed
    embeds = {f"time_embedding.{each}" for each in ("linear_1", "linear_2", "cond_proj")}
    assert left == {"conv_in", "conv_out", *embeds}
