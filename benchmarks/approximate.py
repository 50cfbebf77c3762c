"""The approximate ways: what each saves, and what it loses against the exact picture of the same seed.

    python benchmarks/approximate.py            the bundled model: benchmarks/approximate.jpg, and a table
    python benchmarks/approximate.py step       one guided step of Stable Diffusion 1.5's U-Net, 512 pixels
    python benchmarks/approximate.py products   multiplications of a step, counted, of three sizes of model

Speeds are ratios within one run, whose contenders take turns: by the clock (medians), and by the process's own time
(the best rounds), which others on the machine disturb less. int8 is left out where torchao is not installed.
"""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.condition import Condition
from ldm.evaluation.timing import compare, machine, table
from ldm.models import attention, onednn, packed
from ldm.models.feature_reuse import Features
from ldm.models.quantization import quantize, weight_bytes
from ldm.models.token_merging import merged_tokens
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.system import System
from pipelines import TextToImagePipeline

PROMPTS = (
    "a raccoon astronaut",
    "a red fox in the snow",
    "a cat with a hat",
    "a blue teapot",
    "a smiling sun",
)
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "token_merging 0.3": {"token_merging": 0.3},
    "token_merging 0.5": {"token_merging": 0.5},
    "feature_reuse 2": {"feature_reuse": 2},
    "feature_reuse 3": {"feature_reuse": 3},
    "guidance_interval 0.28 to 5.42": {"guidance_interval": (0.28, 5.42)},
    "feature_reuse 2, guidance_interval": {"feature_reuse": 2, "guidance_interval": (0.28, 5.42)},
    "8 of 12 steps (exact)": {"num_inference_steps": 8},
}
ROUNDS = 3
SD = {"cross_attention_dim": 768, "sample_size": 64}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "sample_size": 128,
}  # without what it is told of sizes, which costs next to nothing


def pictures() -> None:
    """Draw the grid, and print the table of gains and losses."""
    pipe = TextToImagePipeline.from_pretrained()
    works: dict[str, Callable[[], np.ndarray]] = {
        name: partial(_drawn, pipe, how) for name, how in WAYS.items()
    }
    if find_spec("torchao") is not None:
        works["int8"] = partial(_drawn, TextToImagePipeline.from_pretrained(quantization="int8"), {})
    drawn = dict[str, np.ndarray]()
    seconds: dict[str, list[float]] = {name: [] for name in works}

    def kept(name: str) -> int:
        begun = time.process_time()
        drawn[name] = works[name]()
        seconds[name].append(time.process_time() - begun)
        return len(PROMPTS)

    speeds = compare({name: partial(kept, name) for name in works}, ROUNDS, warm_up=0)
    _grid({name: drawn[name] for name in works}).save(Path(__file__).with_suffix(".jpg"), quality=88)
    exact = drawn["exact"]
    print(f"{machine()}; {len(PROMPTS)} pictures at once, {ROUNDS} rounds\n")
    print(
        "| | speed | by processor time | PSNR to the exact picture, dB (worst) | relative L2 |\n|---|---|---|---|---|"
    )
    for name in works:
        found = drawn[name]
        errors = np.square(found - exact).mean((1, 2, 3))
        loss = "| exact | 0 |"
        if errors.any():
            psnr = -10 * np.log10(errors)
            distance = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            loss = f"| {psnr.mean():.1f} ({psnr.min():.1f}) | {distance:.3f} |"
        by_clock = speeds[name].median / speeds["exact"].median
        print(f"| {name} | {by_clock:.2f} | {min(seconds['exact']) / min(seconds[name]):.2f} {loss}")


def _drawn(pipe: TextToImagePipeline, how: dict[str, Any]) -> np.ndarray:
    seeds = list(range(len(PROMPTS)))
    return np.asarray(pipe(PROMPTS, seed=seeds, output_type="np", progress=False, **how).images)


def _counted(work: Callable[[], Any]) -> Callable[[], int]:
    return lambda: (work(), 1)[1]


def _grid(drawn: dict[str, np.ndarray]) -> Image.Image:
    """A row a way, whose name stands before it."""
    left, side = 200, next(iter(drawn.values())).shape[1]
    sheet = Image.new("RGB", (left + side * len(PROMPTS), side * len(drawn)), "white")
    for row, (name, found) in enumerate(drawn.items()):
        ImageDraw.Draw(sheet).text((6, row * side + side // 2), name, fill="black")
        for column, pixels in enumerate((found * 255).round().astype(np.uint8)):
            sheet.paste(Image.fromarray(pixels), (left + column * side, row * side))
    return sheet


def _calls(network: UNet, side: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """One guided call of a network in each way, the same for each network."""
    torch.manual_seed(0)
    with torch.device(device):
        x, time = torch.randn(2, network.config.in_channels, side, side), torch.full((2,), 500.0)
        told = Condition(hidden=torch.randn(2, 77, network.config.cross_attention_dim))
    features = Features()

    @torch.no_grad()
    def call(ratio: float = 0.0, held: Features | None = None) -> Tensor:
        with merged_tokens(network, ratio):
            return network(x, time, told, None, held)

    call(0.0, features)
    return {
        "exact": call,
        "token_merging 0.3": partial(call, 0.3),
        "token_merging 0.5": partial(call, 0.5),
        "a step of feature_reuse that reuses": partial(call, 0.0, features),
    }


def step() -> None:
    """Print the speeds of a guided step of a large U-Net of random weights, and of int8 what it saves and loses."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(**SD)).eval()
    for each in network.parameters():  # none that starts at zero, as last layers do
        if each.ndim > 1:
            nn.init.normal_(each, std=each[0].numel() ** -0.5)
    works = _calls(network, 64)
    if find_spec("torchao") is not None:
        smaller = copy.deepcopy(network)
        quantize(smaller, "int8")
        works["int8"] = _calls(smaller, 64)["exact"]
        print(f"weights: {weight_bytes(network) / 1e6:.0f} MB, int8 {weight_bytes(smaller) / 1e6:.0f} MB")
    speeds = compare({name: _counted(work) for name, work in works.items()}, ROUNDS, warm_up=0)
    print(f"{machine()}\n\n{table(speeds, 'exact', 'steps')}\n")
    exact = works["exact"]()
    for name, work in works.items():
        print(f"{name}: relative L2 {float((work() - exact).norm() / exact.norm()):.1e}")


def products() -> None:
    """Print what share of the exact step's multiplications each way makes: counted, on no machine."""
    bundled = System.load().network.config
    print("| | bundled, 128 px | Stable Diffusion 1.5, 512 px | SDXL, 1024 px |\n|---|---|---|---|")
    shares: dict[str, list[str]] = {}
    for config, side in ((bundled, 16), (UNetConfig(**SD), 64), (UNetConfig(**SDXL), 128)):
        with torch.device("meta"):
            network = UNet(config).eval()
        # By operators that are counted.
        with (
            patch.object(onednn, "mkl_is_slow", lambda: False),
            patch.object(packed, "multiplies", lambda _: False),
            patch.object(attention, "_backend", "sdpa"),
        ):
            counts = {name: _products(work) for name, work in _calls(network, side, "meta").items()}
        for name, count in counts.items():
            shares.setdefault(name, []).append(f"{count / counts['exact']:.2f}")
    for name, row in shares.items():
        print(f"| {name} | {' | '.join(row)} |")


def _products(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


if __name__ == "__main__":
    {"pictures": pictures, "step": step, "products": products}[
        sys.argv[1] if len(sys.argv) > 1 else "pictures"
    ]()
