"""Tiny IP-Adapters with random weights, by the names of published files, and an image encoder of transformers."""

from pathlib import Path
from typing import Any

import torch
from tiny import randomize, tiny_unet
from torch import Tensor

STATES = 17  # of the encoder: 4 x 4 patches and the whole picture


def image_encoder(seed: int = 5) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=20,
        hidden_act="gelu",
    )
    network = CLIPVisionModelWithProjection(config)
    with torch.no_grad():
        for each in network.parameters():
            each.copy_(torch.randn(each.shape) * each.shape[-1] ** -0.5)
    return randomize(network, seed)


def projection_tensors(kind: str, context: int) -> dict[str, Tensor]:
    """The published names and shapes of a projection, in the sizes of `image_encoder`."""
    if kind == "base":
        sizes: dict[str, tuple[int, ...]] = {"proj.weight": (4 * context, 20), "proj.bias": (4 * context,)}
        norms = {"norm": context}
    elif kind == "full":
        sizes = {"proj.0.weight": (24, 24), "proj.0.bias": (24,)}
        sizes |= {"proj.2.weight": (context, 24), "proj.2.bias": (context,)}
        norms = {"proj.3": context}
    else:
        sizes = {"latents": (1, 6, 40), "proj_in.weight": (40, 24), "proj_in.bias": (40,)}
        sizes |= {"proj_out.weight": (context, 40), "proj_out.bias": (context,)}
        norms = {"norm_out": context}
        for i in range(4):
            layer = f"layers.{i}."
            sizes |= {f"{layer}0.to_q.weight": (128, 40), f"{layer}0.to_kv.weight": (256, 40)}
            sizes |= {f"{layer}0.to_out.weight": (40, 128)}
            sizes |= {f"{layer}1.1.weight": (160, 40), f"{layer}1.3.weight": (40, 160)}
            norms |= {f"{layer}0.norm1": 40, f"{layer}0.norm2": 40, f"{layer}1.0": 40}
    made = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in sizes.items()}
    for name, size in norms.items():
        made |= {f"{name}.weight": 1 + 0.3 * torch.randn(size), f"{name}.bias": 0.1 * torch.randn(size)}
    return made


def adapter_tensors(kind: str, family: Any = "sd1", seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """{image_proj, ip_adapter} for `tiny_unet(family)`, whose layers are walked in diffusers' own order."""
    torch.manual_seed(seed)
    unet = tiny_unet(family)
    torch.manual_seed(seed)
    layers: dict[str, Tensor] = {}
    modules = dict(unet.named_modules())
    places = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for i, place in enumerate(places):
        key = modules[place].to_k.weight
        for name in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{name}.weight"] = torch.randn(key.shape) * key.shape[1] ** -0.5
    return {"image_proj": projection_tensors(kind, unet.config.cross_attention_dim), "ip_adapter": layers}


def saved_adapter(
    folder: Path, kind: str, family: Any = "sd1", seed: int = 0, ending: str = "safetensors"
) -> Path:
    """A file as published, and `image_encoder/` beside it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors(kind, family, seed)
    path = folder / f"ip-adapter-{kind}-{seed}.{ending}"
    if ending == "safetensors":
        save_file(
            {f"{part}.{name}": each for part, own in tensors.items() for name, each in own.items()}, path
        )
    else:
        torch.save(tensors, path)
    if not (folder / "image_encoder").exists():
        image_encoder().save_pretrained(folder / "image_encoder")
    return path
