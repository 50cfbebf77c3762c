"""Whole pictures at Stable Diffusion 1.5's true size, from random weights in float32: ours against diffusers'.

python -m benchmarks.true_size_parity FOLDER [part of a case's name ...]

Writes the weights into FOLDER, 15 GB, where they are not there yet. What shares weights is drawn in one process, after
diffusers has drawn it in another. PSNR with a mask is of what is drawn anew.
"""

import importlib
import multiprocessing
import resource
import sys
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.true_sizes import configs, make_system, random_weights
from ldm.checkpoints.files import write_tensors
from ldm.evaluation.timing import machine

SIZE, SEED, CONTEXT = 256, 3, 768
PROMPT, NEGATIVE = "a raccoon astronaut", "blurry"


@dataclass(frozen=True)
class Case:
    """A picture. control: how many ControlNets; adapter: the kind of IP-Adapter; given: the arguments of both sides."""

    name: str
    pipeline: str = ""
    model: str = "base"
    control: int = 0
    adapter: str = ""
    steps: int = 2
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[str, int, str]:
        return self.model, self.control, self.adapter


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def mask() -> Image.Image:
    drawn = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(drawn).rectangle((SIZE // 4, SIZE // 8, SIZE * 3 // 4, SIZE * 5 // 8), fill=255)
    return drawn


def cases() -> list[Case]:
    masked = {"image": picture(0), "mask_image": mask(), "strength": 1.0}
    one = {"control_image": picture(1), "controlnet_conditioning_scale": 0.9}
    two = {"control_image": [picture(1), picture(2)], "controlnet_conditioning_scale": [0.7, 1.2]}
    window = {"control_guidance_start": 0.3, "control_guidance_end": 0.7}
    shown = {"ip_adapter_image": picture(4)}
    return [
        Case("text to image"),
        # 0.6 of 4 steps are the last two
        Case(
            "image to image, strength 0.6", "Img2Img", steps=4, given={"image": picture(0), "strength": 0.6}
        ),
        Case("inpainting, 4 channels", "Inpaint", given=masked),
        Case("inpainting, 9 channels", "Inpaint", "inpaint", given=masked),
        Case("ControlNet", "ControlNet", control=1, given=one),
        Case("ControlNet, guess mode", "ControlNet", control=1, given={**one, "guess_mode": True}),
        Case("ControlNet, 0.3 to 0.7", "ControlNet", control=1, steps=3, given={**one, **window}),
        Case(
            "ControlNet, image to image",
            "ControlNetImg2Img",
            control=1,
            steps=4,
            given={**one, "image": picture(0), "strength": 0.6},
        ),
        Case("two ControlNets", "ControlNet", control=2, given=two),
        Case("IP-Adapter", adapter="base", given=shown),
        Case("IP-Adapter Plus", adapter="plus", given=shown),
    ]


# The weights


def make_model(folder: Path, channels: int) -> None:
    kind = "StableDiffusionInpaintPipeline" if channels == 9 else "StableDiffusionPipeline"
    make_system(folder, "sd1", pipeline=kind, scheduler="DDIMScheduler", channels=channels)


def make_controlnet(folder: Path, seed: int) -> None:
    diffusers: Any = importlib.import_module("diffusers")

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**configs()["unet"])
    network = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    random_weights(network, seed).save_pretrained(folder)


def make_adapter(folder: Path, kind: str) -> None:
    """A file of the published names and shapes; the encoder, of ViT-H/14's size, stands beside it."""
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")

    rng = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel(**configs()["unet"])
    places = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    sizes: dict[str, tuple[int, ...]] = {}
    for i, place in enumerate(places):
        for name in ("to_k_ip", "to_v_ip"):
            sizes[f"ip_adapter.{2 * i + 1}.{name}.weight"] = unet.get_submodule(place).to_k.weight.shape
    if kind == "base":
        sizes |= {"image_proj.proj.weight": (4 * CONTEXT, 1024), "image_proj.proj.bias": (4 * CONTEXT,)}
        norms = ["norm"]
    else:
        sizes |= {"image_proj.latents": (1, 16, CONTEXT), "image_proj.proj_in.weight": (CONTEXT, 1280)}
        sizes |= {"image_proj.proj_out.weight": (CONTEXT, CONTEXT)}
        sizes |= {f"image_proj.proj_{side}.bias": (CONTEXT,) for side in ("in", "out")}
        norms = ["norm_out"]
        shapes = {"0.to_q": (1, 1), "0.to_kv": (2, 1), "0.to_out": (1, 1), "1.1": (4, 1), "1.3": (1, 4)}
        for i in range(4):
            for name, (out, into) in shapes.items():
                sizes[f"image_proj.layers.{i}.{name}.weight"] = (out * CONTEXT, into * CONTEXT)
            norms += [f"layers.{i}.{name}" for name in ("0.norm1", "0.norm2", "1.0")]
    tensors = {
        name: torch.randn(shape, generator=rng) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in sizes.items()
    }
    for name in norms:
        tensors[f"image_proj.{name}.weight"] = 1 + 0.3 * torch.randn(CONTEXT, generator=rng)
        tensors[f"image_proj.{name}.bias"] = 0.1 * torch.randn(CONTEXT, generator=rng)
    write_tensors(folder / f"{kind}.safetensors", tensors)
    if not (folder / "image_encoder").exists():
        config = transformers.CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
            projection_dim=1024,
            hidden_act="gelu",
        )
        encoder = transformers.CLIPVisionModelWithProjection(config)
        random_weights(encoder, 8).save_pretrained(folder / "image_encoder")


def make(folder: Path, case: Case) -> None:
    """Write what a case needs and is not there."""
    if not (folder / case.model / "model_index.json").exists():
        make_model(folder / case.model, 9 if case.model == "inpaint" else 4)
    for k in range(case.control):
        if not (folder / f"control{k}").exists():
            make_controlnet(folder / f"control{k}", 10 + k)
    if case.adapter and not (folder / "adapters" / f"{case.adapter}.safetensors").exists():
        (folder / "adapters").mkdir(exist_ok=True)
        make_adapter(folder / "adapters", case.adapter)


# The pictures


def settings(case: Case) -> dict[str, Any]:
    told = {"num_inference_steps": case.steps, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
    return {**told, "height": SIZE, "width": SIZE, "output_type": "np", **case.given}


def draw_theirs(folder: Path, group: list[Case]) -> list[np.ndarray]:
    diffusers: Any = importlib.import_module("diffusers")

    case, drawn = group[0], []
    more: dict[str, Any] = {}
    if case.control:
        nets = [
            diffusers.ControlNetModel.from_pretrained(folder / f"control{k}") for k in range(case.control)
        ]
        more = {"controlnet": nets if len(nets) > 1 else nets[0]}
    first = diffusers.DiffusionPipeline.from_pretrained(
        folder / case.model, local_files_only=True, low_cpu_mem_usage=True
    )
    if case.adapter:
        first.load_ip_adapter(
            str(folder / "adapters"), subfolder="", weight_name=f"{case.adapter}.safetensors"
        )
        first.set_ip_adapter_scale(0.6)
    for each in group:
        kind = getattr(diffusers, f"StableDiffusion{each.pipeline}Pipeline")
        pipe = kind(**{**first.components, **more}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        told = settings(each)
        if each.pipeline == "ControlNet":
            told["image"] = told.pop("control_image")
        if "Img2Img" in each.pipeline:
            del told["height"], told["width"]  # the picture's own
        drawn.append(pipe(PROMPT, generator=torch.Generator().manual_seed(SEED), **told).images[0])
    return drawn


def draw_ours(folder: Path, group: list[Case]) -> list[np.ndarray]:
    from pipelines import TextToImagePipeline

    case = group[0]
    pipe = TextToImagePipeline.from_pretrained(folder / case.model, device="cpu")
    for k in range(case.control):
        pipe.load_controlnet(folder / f"control{k}")
    if case.adapter:
        pipe.load_ip_adapter(folder / "adapters" / f"{case.adapter}.safetensors")
        pipe.set_ip_adapter_scale(0.6)
    return [np.asarray(pipe(PROMPT, seed=SEED, progress=False, **settings(each)).images[0]) for each in group]


def measured(folder: Path, group: list[Case], side: str) -> tuple[list[np.ndarray], float]:
    """Draw a group and keep its pictures in the folder; return them, and the process's peak in GB."""
    drawn = draw_ours(folder, group) if side == "ours" else draw_theirs(folder, group)
    for case, each in zip(group, drawn, strict=True):
        np.save(folder / f"{case.name}, {side}.npy", each)
    return drawn, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.square(one - other).mean(), 1e-20)))


def row(
    case: Case, ours: np.ndarray, theirs: np.ndarray, plain: np.ndarray | None, peaks: list[float]
) -> str:
    where = np.asarray(mask()) > 0 if "mask_image" in case.given else np.ones((SIZE, SIZE), bool)
    moved = case.weights != ("base", 0, "") and "image" not in case.given and case.steps == 2
    away = f"{psnr(ours, plain):.1f} dB" if moved and plain is not None else ""
    first = f"| {case.name} | {case.steps} | {psnr(ours[where], theirs[where]):.1f} dB | {theirs[where].std():.2f} "
    return first + f"| {away} | {peaks[0]:.1f} GB | {peaks[1]:.1f} GB |"


def main() -> None:
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    chosen = [case for case in cases() if not wanted or any(each in case.name for each in wanted)]
    print(f"{machine()}; {SIZE} x {SIZE} pixels\n")
    print("| case | steps | PSNR | deviation | to the plain picture | peak, diffusers | peak, ours |")
    print("|---|---|---|---|---|---|---|", flush=True)
    fresh = multiprocessing.get_context("spawn")
    for _, cases_of in groupby(chosen, lambda case: case.weights):
        group = list(cases_of)
        with fresh.Pool(1, maxtasksperchild=1) as pool:  # memory goes back with a process
            pool.apply(make, (folder, group[0]))
            sides = [pool.apply(measured, (folder, group, side)) for side in ("theirs", "ours")]
        kept = folder / f"{cases()[0].name}, ours.npy"
        plain = np.load(kept) if kept.exists() else None
        for case, theirs, ours in zip(group, sides[0][0], sides[1][0], strict=True):
            print(row(case, ours, theirs, plain, [peak for _, peak in sides]), flush=True)


if __name__ == "__main__":
    main()
