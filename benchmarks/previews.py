"""Previews of the bundled model: what the tiny decoder and the linear map lose against the decoder, and what they cost.

    python -m benchmarks.previews [FOLDER]      benchmarks/previews.jpg, and tables; FOLDER holds another vae_preview

It needs the sprites of scripts/prepare_data.py. Pictures are compositions that nothing was trained on, and the
estimates of the steps of a few drawings. Costs are of the process's own time, the best of rounds that take turns.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.checkpoints.folder import PREVIEW
from ldm.emoji.pools import CompositionsConfig
from ldm.evaluation.timing import machine
from ldm.pictures import to_pil
from ldm.sampling import decode
from pipelines import TextToImagePipeline
from pipelines.preview import LatentPreview

PROMPTS = ("a raccoon astronaut", "a red fox in the snow", "a cat with a hat", "a blue teapot")
COMPOSITIONS, ROUNDS, SHOWN = 256, 20, 8
Ways = dict[str, Callable[[Tensor], list[Image.Image]]]


def main() -> None:
    """Print the tables, and write the sheet."""
    pipe = TextToImagePipeline.from_pretrained(device="cpu", torch_dtype=torch.float32)
    if len(sys.argv) > 1:
        pipe.load_preview(Path(sys.argv[1]) / PREVIEW)
    autoencoder = pipe.system.autoencoder
    ways: Ways = {
        "decoder": lambda latents: to_pil(decode(autoencoder, latents)),
        "tiny": pipe.preview,
        "linear": LatentPreview(autoencoder),
    }
    with torch.inference_mode():
        examples = CompositionsConfig().examples("", None, COMPOSITIONS)
        pictures = [examples.whole(start, 32).pictures for start in range(0, COMPOSITIONS, 32)]
        latents = torch.cat([autoencoder.scale(autoencoder.encode(each).mean) for each in pictures])
        steps = _steps(pipe)
        print(f"{machine()}; float32\n")
        _costs(ways, latents[:1])
        _losses(ways, latents, steps)
    rows = [("", latents[:SHOWN]), ("the steps of\n" + PROMPTS[0], steps[:, 0])]
    _sheet(ways, rows).save(Path(__file__).with_suffix(".jpg"), quality=88)


def _steps(pipe: TextToImagePipeline) -> Tensor:
    """The estimates of the end after each step of drawing the prompts: (steps, prompts, C, h, w)."""
    found = list[Tensor]()

    def callback(owner: Any, index: int, timestep: int, state: dict[str, Any]) -> None:
        found.append(state["denoised"].clone())

    seeds = list(range(len(PROMPTS)))
    pipe(PROMPTS, seed=seeds, output_type="latent", progress=False, callback_on_step_end=callback)
    return torch.stack(found)


def _costs(ways: Ways, latents: Tensor) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            begun = time.process_time()
            way(latents)
            if turn:
                seconds[name].append(time.process_time() - begun)
    best = {name: min(each) for name, each in seconds.items()}
    print("| one picture | ms | ratio |\n|---|---|---|")
    for name, each in best.items():
        print(f"| {name} | {1000 * each:.1f} | {best['decoder'] / each:.1f} |")


def _losses(ways: Ways, latents: Tensor, steps: Tensor) -> None:
    """Print the PSNR of each way to the decoder's pictures, of eight bits; small pictures are enlarged first."""
    rows = [(f"{COMPOSITIONS} compositions", latents)]
    rows += [(f"after step {k} of {len(steps)}", each) for k, each in enumerate(steps, start=1)]
    print(f"\n| dB to the decoder's picture (worst) | {' | '.join(list(ways)[1:])} |\n|---|---|---|")
    for name, each in rows:
        exact, *others = (partial(_pixels, way, each) for way in ways.values())
        target = exact()
        errors = [np.square(other() - target).mean((1, 2, 3)) for other in others]
        ratios = [-10 * np.log10(np.maximum(found, 1e-10)) for found in errors]
        print(f"| {name} | {' | '.join(f'{found.mean():.1f} ({found.min():.1f})' for found in ratios)} |")


def _pixels(way: Callable[[Tensor], list[Image.Image]], latents: Tensor) -> np.ndarray:
    """Its pictures (B, H, W, 3) in [0, 1], eight at a time."""
    side = 8 * latents.shape[-1]
    made = [each for some in latents.split(8) for each in way(some)]
    return np.stack([np.asarray(each.resize((side, side), Image.Resampling.BILINEAR)) / 255 for each in made])


def _sheet(ways: Ways, rows: list[tuple[str, Tensor]]) -> Image.Image:
    """A row for each way of seeing each of these latents, whose name stands before it."""
    left, side = 140, 8 * rows[0][1].shape[-1]
    columns = max(len(latents) for _, latents in rows)
    sheet = Image.new("RGB", (left + side * columns, side * len(rows) * len(ways)), "white")
    top = 0
    for what, latents in rows:
        for name, way in ways.items():
            ImageDraw.Draw(sheet).text((6, top + side // 2 - 12), f"{name}\n{what}", fill="black")
            for column, pixels in enumerate((_pixels(way, latents) * 255).round().astype(np.uint8)):
                sheet.paste(Image.fromarray(pixels), (left + column * side, top))
            top += side
    return sheet


if __name__ == "__main__":
    main()
