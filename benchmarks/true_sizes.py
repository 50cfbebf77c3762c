"""Systems of random weights at published sizes: what a tiny model can't show, and what speed is measured on."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.parts import quiet
from ldm.checkpoints.families import FAMILIES, UNET, family_configs
from ldm.conditioning.tokenizer import clip_tokenizer
from ldm.files import replaced_folder

FAMILY_OF = {"sd15": "sd1", "sdxl": "sdxl"}
_NAMES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def random_weights(network: nn.Module, seed: int) -> Any:
    """Draw all anew: matrices that keep a variance, norms and biases that show where they are left out; in place."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in network.named_parameters():
            if each.ndim > 1:
                each.normal_(0, each[0].numel() ** -0.5, generator=rng)
            elif name.endswith("weight"):
                each.normal_(1, 0.3, generator=rng)
            else:
                each.normal_(0, 0.1, generator=rng)
    return network.eval()


@torch.no_grad()
def scaled(last: nn.Module, out: Tensor, deviation: float) -> None:
    """Scale the last layer so that what came out as `out` has this deviation."""
    for each in last.parameters():
        each.mul_(deviation / out.std())


def configs(family: str = "sd1", channels: int = 4) -> dict[str, Any]:
    """The published configs, from the table that single files are read with."""
    told = FAMILIES[family].unet
    width = told.get("block_out_channels", (320,))[0]
    shapes = {
        UNET + "input_blocks.0.0.weight": (width, channels, 3, 3),
        "attn2.to_k.weight": (width, told["cross_attention_dim"]),
    }
    found = family_configs(family, {name: torch.empty(shape) for name, shape in shapes.items()}, "the table")
    return {
        part: {key: value for key, value in own.items() if not key.startswith("_") and key != "architectures"}
        for part, own in found.items()
    }


@torch.no_grad()
def network(kind: str, config: dict[str, Any]) -> Any:
    """A U-Net ("unet") or an autoencoder ("vae") of diffusers' with random weights, by which pictures have contrast."""
    diffusers: Any = importlib.import_module("diffusers")
    made = random_weights(getattr(diffusers, _NAMES[kind])(**config), {"unet": 1, "vae": 2}[kind])
    rng = torch.Generator().manual_seed(0)
    if kind == "unet":
        noise = torch.randn(1, config["in_channels"], 32, 32, generator=rng)
        hidden = torch.randn(1, 77, config["cross_attention_dim"], generator=rng)
        more: dict[str, Any] = {}
        if config.get("addition_embed_type"):
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            more["added_cond_kwargs"] = {
                "text_embeds": torch.randn(1, pooled, generator=rng),
                "time_ids": torch.tensor([[256.0, 256, 0, 0, 256, 256]]),
            }
        scaled(made.conv_out, made(noise, 500, hidden, **more).sample, 1)
        return made
    latents = torch.randn(1, config["latent_channels"], 32, 32, generator=rng)
    scaled(made.decoder.conv_out, made.decode(latents).sample, 0.4)
    pixels = nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=rng), 256, mode="bicubic") * 2 - 1
    scaled(made.quant_conv, made.encode(pixels).latent_dist.parameters, 5)
    return made


def make_system(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    changes: dict[str, dict[str, Any]] | None = None,
    pipeline: str | None = None,
    scheduler: str | None = None,
    channels: int = 4,
) -> None:
    """Write a folder as diffusers has it, whole or not at all.

    family: a key of FAMILIES. changes: to the configs, by component. pipeline, scheduler: diffusers' classes in place
    of the published ones. channels: that the U-Net takes; 9 of inpainting.
    """
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")

    told, published = configs(family, channels), FAMILIES[family]
    for part, change in (changes or {}).items():
        told[part] |= change
    parts: dict[str, Any] = {kind: _cast(network(kind, told[kind]), dtype) for kind in _NAMES}
    for seed, name in enumerate(published.text, 3):
        kind = (
            transformers.CLIPTextModel if name == "text_encoder" else transformers.CLIPTextModelWithProjection
        )
        encoder = kind(transformers.CLIPTextConfig(**told[name]))
        parts[name] = _cast(random_weights(encoder, seed), dtype)
        pad = {"pad_token": "!"} if name == "text_encoder_2" else {}
        parts[name.replace("text_encoder", "tokenizer")] = clip_tokenizer(**pad)
    solver = getattr(diffusers, scheduler or published.scheduler["_class_name"])
    known = inspect.signature(solver).parameters
    parts["scheduler"] = solver(**{k: v for k, v in told["scheduler"].items() if k in known})
    if "XL" not in published.pipeline:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with replaced_folder(folder) as new:
        getattr(diffusers, pipeline or published.pipeline)(**parts).save_pretrained(new)


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(network, dtype)  # diffusers' own says more than there is to say


def true_size(name: str, folder: Path) -> Path:
    """Return the folder of "sd15" or "sdxl" inside `folder`; where it is not there, it is made, in bfloat16."""
    place = folder / name
    if not (place / "model_index.json").exists():
        quiet()
        make_system(place, FAMILY_OF[name], torch.bfloat16)
    return place
