"""LCM-LoRA (Luo et al. 2023, arXiv:2311.05556): its files in all their spellings, drawn as diffusers draws them.

The noise of each step is shared by the seed: both draw it in the same order from a generator of the CPU. What is left
is float32's rounding, of sums in another order, through a few passes of a U-Net and one of a decoder: some 1e-6 of
a pixel's range: 120 dB and more. Without the LoRA the picture is another at 30 dB.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lora import made, unet_config
from safetensors.torch import save_file
from test_distillation import text_setup
from test_pipeline import psnr
from tiny import Family, tiny_pipeline_folder, tiny_unet
from torch import Tensor

from ldm.checkpoints.lora import FILE, write_lora
from ldm.models.lora import select
from ldm.models.unet import UNet, UNetConfig
from ldm.training.run import train
from pipelines import TextToImagePipeline

# What diffusers' examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py trains.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
RANK, ALPHA = 64, 8
SAME, CHANGED = 90.0, 50.0  # dB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    return cache(lambda family: tiny_pipeline_folder(tmp_path_factory.mktemp(family), family))


def peft_unet(family: Family, alpha: float = ALPHA) -> Any:
    """A U-Net as diffusers' script has it, with an LCM-LoRA of random weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(TARGETS))
    model = peft.get_peft_model(tiny_unet(family), config)
    generator = torch.Generator().manual_seed(5)
    for name, each in model.named_parameters():
        if "lora_" in name:
            each.data = torch.randn(each.shape, generator=generator) * each[0].numel() ** -0.5
    return model


def write(folder: Path, spelling: str, family: Family) -> Any:
    """Write an LCM-LoRA in a spelling that they are found in, and return the network that it was trained in."""
    import diffusers
    from peft import get_peft_model_state_dict

    # Where nothing beside the tensors tells alpha, it is the rank.
    unet = peft_unet(family, RANK if spelling == "script" else ALPHA)
    state: dict[str, Tensor] = get_peft_model_state_dict(unet)
    plain = {name.removeprefix("base_model.model."): each.contiguous() for name, each in state.items()}
    folder.mkdir()
    if spelling == "kohya":  # as lcm-lora-sdv1-5 and lcm-lora-sdxl are published
        tensors: dict[str, Tensor] = {}
        for name, each in plain.items():
            layer, _, half = name.removesuffix(".weight").rpartition(".")
            stem = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{stem}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[half] }.weight"] = each
            tensors[f"{stem}.alpha"] = torch.tensor(float(ALPHA))
        save_file(tensors, folder / FILE)
    elif spelling == "diffusers":
        settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
        diffusers.StableDiffusionPipeline.save_lora_weights(
            folder, plain, unet_lora_adapter_metadata=settings
        )
    elif spelling == "script":  # the script's own last words
        diffusers.StableDiffusionPipeline.save_lora_weights(folder, state)
    else:
        unet.save_pretrained(folder)
    return unet.get_base_model()


def theirs(folder: Path, lora: Path | None, network: Any, scheduler: Path | None = None) -> Any:
    """Diffusers' pipeline with an LCM-LoRA's file, or else with the network that was trained."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    read = diffusers.LCMScheduler
    pipe.scheduler = (
        read.from_pretrained(scheduler, subfolder="scheduler")
        if scheduler
        else read.from_config(pipe.scheduler.config)
    )
    if lora:
        pipe.load_lora_weights(lora, weight_name=FILE)
    else:
        pipe.unet = network
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_picture(pipe: Any, **told: Any) -> np.ndarray:
    drawn = pipe("the cat", generator=torch.Generator().manual_seed(3), output_type="np", **told)
    return np.asarray(drawn.images)


def our_picture(pipe: TextToImagePipeline, **told: Any) -> np.ndarray:
    return np.asarray(pipe("the cat", seed=3, output_type="np", progress=False, **told).images)


@pytest.mark.parametrize(
    ("family", "spelling"),
    [
        *(("sd1", each) for each in ("kohya", "diffusers", "script", "peft")),
        *(("sdxl", each) for each in ("kohya", "diffusers")),
    ],
)
def test_an_lcm_lora_draws_as_in_diffusers(
    folder: Callable[[Family], Path], tmp_path: Path, family: Family, spelling: str
) -> None:
    """Diffusers itself reads neither its script's last words nor peft's files: there it has the trained network."""
    trained = write(tmp_path / "lora", spelling, family)
    lora = tmp_path / "lora" if spelling in ("kohya", "diffusers") else None
    expected = theirs(folder(family), lora, trained)
    pipe = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
    plain = our_picture(pipe, sampler="lcm", num_inference_steps=1, guidance_scale=1.0)
    pipe.adapters.load_lora(tmp_path / "lora")
    for steps, scale in ((1, 1.0), (2, 1.0), (4, 1.5)):
        told = {"num_inference_steps": steps, "guidance_scale": scale}
        drawn = our_picture(pipe, sampler="lcm", **told)
        assert psnr(drawn, their_picture(expected, **told)) > SAME
        if steps == 1:
            assert psnr(drawn, plain) < CHANGED


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_blocks_are_the_layers_of_the_script(family: Family) -> None:
    theirs = {name.removeprefix("base_model.model.") for name in peft_unet(family).targeted_module_names}
    ours = UNet(UNetConfig.from_diffusers(dict(tiny_unet(family).config)))
    assert set(select(ours, "blocks")) == theirs


def test_blocks_of_a_real_size_are_the_list() -> None:
    """All but what embeds, first and last: of Stable Diffusion 1.5's U-Net with the guidance told."""
    with torch.device("meta"):
        network = UNet(UNetConfig(time_cond_proj_dim=256))
    listed = {path for path in select(network, ".*") if path.endswith(tuple(f".{each}" for each in TARGETS))}
    assert set(select(network, "blocks")) == listed
    left = set(select(network, ".*")) - listed
    embeds = {f"time_embedding.{each}" for each in ("linear_1", "linear_2", "cond_proj")}
    assert left == {"conv_in", "conv_out", *embeds}


def test_ours_for_sdxl_with_ldms_names_is_drawn_by_theirs(
    folder: Callable[[Family], Path], tmp_path: Path
) -> None:
    """Kohya's trainers name SDXL's layers as LDM does, where published LCM-LoRAs have diffusers' names."""
    pipe = TextToImagePipeline.from_pretrained(folder("sdxl"), device="cpu")
    write_lora(
        tmp_path / FILE, made(pipe, {"unet": "blocks"}, rank=RANK, alpha=ALPHA), "kohya", unet_config(pipe)
    )
    expected = theirs(folder("sdxl"), tmp_path, None)
    told = {"num_inference_steps": 4, "guidance_scale": 1.0}
    plain = our_picture(pipe, sampler="lcm", **told)
    pipe.load_lora_weights(tmp_path)
    drawn = our_picture(pipe, sampler="lcm", **told)
    assert psnr(drawn, their_picture(expected, **told)) > SAME
    assert psnr(drawn, plain) < CHANGED


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_that_was_distilled_here_draws_the_same_there(tmp_path: Path, layout: str) -> None:
    pytest.importorskip("peft")
    lora = {"kind": "lora", "rank": 4, "alpha": 6, "targets": "blocks", "layout": layout}
    optimizer = {"learning_rate": 3e-2, "warmup": 0}
    loop = {"pictures": 16, "save_every": 8, "optimizer": optimizer}
    path = text_setup(tmp_path, train=lora, guidance=3.0, loop=loop, steps=[1, 4])
    assert train(path)
    made, base = tmp_path / "run" / "export", tmp_path / "models" / "sd1"
    expected = theirs(base, made, None, scheduler=made)
    pipe = TextToImagePipeline.from_pretrained(made, device="cpu", torch_dtype=torch.float32)
    plain = TextToImagePipeline.from_pretrained(base, device="cpu")
    for steps in (1, 2, 4):
        drawn = our_picture(pipe, num_inference_steps=steps)
        told = {"num_inference_steps": steps, "guidance_scale": 1.0}
        print(
            "RES",
            psnr(drawn, their_picture(expected, **told)),
            psnr(drawn, our_picture(plain, sampler="lcm", **told)),
        )
        assert psnr(drawn, their_picture(expected, **told)) > SAME
        assert psnr(drawn, our_picture(plain, sampler="lcm", **told)) < CHANGED
