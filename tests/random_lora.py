"""Adapters of random weights for the tests, and what they are for."""

from typing import Any

import torch
from tiny import tiny_unet
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models.lora import LoRA
from ldm.models.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline

# What is changed in each network of a tiny pipeline.
CASES = {
    "sd1": {"unet": "attention+conv", "text_encoder": "all-linear"},
    "sdxl": {"unet": "attention+conv", "text_encoder": "attention", "text_encoder_2": "attention"},
}
DRAW: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}


def trained(
    network: nn.Module, targets: str = "attention", rank: int = 3, alpha: float = 2.0, seed: int = 0
) -> LoRA:
    """An adapter that does something: a random `up`."""
    adapter = LoRA(network, targets, rank, alpha)
    generator = torch.Generator().manual_seed(seed)
    for down, up, _ in adapter.weights().values():
        down.normal_(generator=generator).mul_(down[0].numel() ** -0.5)
        up.normal_(generator=generator).mul_(0.7)
    return adapter


def made(pipe: TextToImagePipeline, targets: dict[str, str], **settings: Any) -> dict[str, Any]:
    """Random weights for a pipeline's networks, which they no longer touch."""
    adapters = {
        part: trained(pipe.system.modules()[part], each, seed=k, **settings)
        for k, (part, each) in enumerate(targets.items())
    }
    for adapter in adapters.values():
        adapter.detach()
    return {part: adapter.weights() for part, adapter in adapters.items()}


def networks(pipe: TextToImagePipeline) -> dict[str, nn.Module]:
    return {name: each for name, each in pipe.system.modules().items() if name != "vae"}


def unet_config(pipe: TextToImagePipeline) -> dict[str, Any]:
    return pipe.system.network.config.to_diffusers()


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
CONV = "mid_block.resnets.0.conv1"


def our_unet() -> tuple[UNet, Any]:
    """Our tiny U-Net and diffusers', with the same weights."""
    theirs = tiny_unet("sd1")
    ours = UNet(UNetConfig.from_diffusers(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval().requires_grad_(False), theirs


def inputs() -> tuple[Tensor, Tensor, Condition]:
    """What that U-Net takes."""
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 7, 32)))
    return x, torch.tensor([3, 700]), Condition(context)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter that is trained, moved by noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the order of sums in float32."""
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
