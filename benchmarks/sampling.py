"""Whole pictures, from prompt to pixels: our pipeline against diffusers' on the same folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import TextToImagePipeline

Draw = Callable[[], Any]


def contenders(
    model: Path, prompts: list[str], precision: str, steps: int | None = None, device: str | None = None
) -> tuple[dict[str, Callable[[], int]], float]:
    """Each draws all `prompts` in one batch a round. Beside them: how far the two are apart, as PSNR in dB.

    steps: None is the model's own. Both get the model's own solver and guidance.
    """
    import diffusers

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ours = TextToImagePipeline.from_pretrained(model, torch_dtype=dtype, device=device)
    theirs = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, safety_checker=None)
    theirs = theirs.to(ours.device)
    theirs.set_progress_bar_config(disable=True)
    seeds = list(range(len(prompts)))
    defaults = ours(prompts[0], num_inference_steps=1, progress=False).recipes[0]
    count = steps or int(ours.system.options.get("num_inference_steps", 50))

    def draw_ours() -> Any:
        return ours(prompts, num_inference_steps=count, seed=seeds, output_type="np", progress=False).images

    def draw_theirs() -> Any:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        scale = defaults.guidance_scale
        return theirs(
            prompts, num_inference_steps=count, guidance_scale=scale, generator=generators, output_type="np"
        ).images

    error = float(np.square(np.asarray(draw_ours()) - np.asarray(draw_theirs())).mean())
    works = {"diffusers": _counted(draw_theirs, len(prompts)), "ours": _counted(draw_ours, len(prompts))}
    return works, -10 * float(np.log10(max(error, 1e-12)))


def _counted(draw: Draw, pictures: int) -> Callable[[], int]:
    def work() -> int:
        draw()
        return pictures

    return work
