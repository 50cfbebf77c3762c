"""ControlNets from and to disk."""

from pathlib import Path

import torch
from torch import nn

from ldm.checkpoints.control_lora import Encoder, write_control_lora
from ldm.checkpoints.controlnet import read_controlnet, write_controlnet_file, write_controlnet_folder
from ldm.checkpoints.files import load_strict
from ldm.checkpoints.hub import resolve
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.diffusers_config import check_layers
from ldm.models.unet import UNet


def load_controlnet(
    name: str | Path,
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    unet: nn.Module | None = None,
) -> ControlNet:
    """Load a ControlNet, frozen and in evaluation mode, on the CPU.

    name: a folder of diffusers', a single file (diffusers' names or LDM's, safetensors or a pickle), or a hub id.
    variant: of a folder's files, "fp16" and the like. unet: that it is for, of whose encoder a Control-LoRA's file
    holds the changes. Raises UserError, which for other files says what they are.
    """
    path = resolve(name, variant)
    encoder = encoder_of(unet) if isinstance(unet, UNet) else None
    mapping, tensors = read_controlnet(path, variant, encoder)
    config = ControlNetConfig.from_diffusers(mapping, str(path))
    check_layers(config.layers, str(path), len(tensors))
    with torch.device("meta"):
        network = ControlNet(config)
    load_strict(network, tensors, path)
    return network.to(torch_dtype).eval().requires_grad_(False)


def encoder_of(unet: UNet) -> Encoder:
    """Return what a ControlNet has of a U-Net."""
    config = ControlNetConfig.from_unet(unet.config)
    with torch.device("meta"):
        own = ControlNet(config).state_dict()
    tensors = {name: each for name, each in unet.state_dict().items() if name in own}
    return Encoder(config.to_diffusers(), tensors)


def save_control_lora(network: ControlNet, unet: UNet, path: str | Path, rank: int) -> None:
    """Write a ControlNet as a Control-LoRA: what it changes of the U-Net's encoder, up to a rank. Raises UserError."""
    write_control_lora(path, network.config.to_diffusers(), network.state_dict(), encoder_of(unet), rank)


def save_controlnet(network: ControlNet, folder: str | Path) -> None:
    """Write a folder that diffusers' ControlNetModel loads, whole or not at all. Raises UserError."""
    write_controlnet_folder(folder, network.config.to_diffusers(), network.state_dict())


def save_controlnet_file(network: ControlNet, path: str | Path) -> None:
    """Write one `.safetensors` in LDM's names, as AUTOMATIC1111's and ComfyUI's folders of ControlNets have them."""
    write_controlnet_file(path, network.config.to_diffusers(), network.state_dict())
