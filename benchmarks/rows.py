"""Many rows of a file, uniform or mixed: ours, which share the network's calls step by step, against diffusers.

diffusers has two ways: a loop over the rows, and batches of those rows whose settings are equal. Ours are one process,
as theirs, and on a CPU also one process a core, which is how `ldm-batch` draws there.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import TextToImagePipeline
from pipelines.crowd import likeness
from pipelines.recipe import Recipe

_CLASSES = {
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
_PROMPTS = (
    "a fox",
    "a cat wearing a top hat",
    "two apples",
    "a house next to a tree",
    "a blue car",
    "a rocket",
)


@dataclass(frozen=True, order=True)
class Row:
    """A row's settings, but for its prompt and seed."""

    sampler: str = "ddim"
    steps: int = 12
    scale: float = 3.5
    width: int = 128


def rows(count: int, mixed: bool) -> list[Row]:
    """Alike, or of three samplers, four numbers of steps, three scales and two sizes."""
    if not mixed:
        return [Row()] * count
    rng = np.random.default_rng(0)

    def one_of(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    return [
        Row(one_of(*_CLASSES), one_of(8, 12, 16, 20), one_of(2.5, 3.5, 5.0), one_of(128, 160))
        for _ in range(count)
    ]


def contenders(
    model: Path, count: int, mixed: bool, precision: str, together: int
) -> tuple[dict[str, Callable[[], int]], float]:
    """Each draws all rows in a round. Beside them: how far ours and the loop's pictures are apart, as PSNR in dB."""
    import diffusers

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ours = TextToImagePipeline.from_pretrained(model, torch_dtype=dtype)
    theirs = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, safety_checker=None)
    theirs = theirs.to(ours.device)
    theirs.set_progress_bar_config(disable=True)
    config, wanted = dict(theirs.scheduler.config), rows(count, mixed)
    schedulers = {name: getattr(diffusers, kind).from_config(config) for name, kind in _CLASSES.items()}
    numbered = list(enumerate(wanted))

    def draw(some: Sequence[tuple[int, Row]]) -> Iterator[tuple[int, np.ndarray]]:
        row = some[0][1]
        theirs.scheduler = schedulers[row.sampler]
        drawn = theirs(
            [_PROMPTS[k % len(_PROMPTS)] for k, _ in some],
            num_inference_steps=row.steps,
            guidance_scale=row.scale,
            height=128,
            width=row.width,
            generator=[torch.Generator("cpu").manual_seed(k) for k, _ in some],
            output_type="np",
        ).images
        return zip((k for k, _ in some), drawn, strict=True)

    def loop() -> dict[int, np.ndarray]:
        return dict(pair for each in numbered for pair in draw([each]))

    def alike() -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for _, group in groupby(sorted(numbered, key=lambda pair: pair[1]), key=lambda pair: pair[1]):
            members = list(group)
            for start in range(0, len(members), together):
                found |= dict(draw(members[start : start + together]))
        return found

    recipes = recipes_of(wanted)

    def engine() -> dict[int, np.ndarray]:
        return {each.place: np.asarray(each.image) / 255 for each in ours.draw_each(recipes, together)}

    first, second = loop(), engine()
    error = float(np.mean([np.square(first[k] - second[k]).mean() for k in first]))
    works = {"diffusers, a loop": loop, "diffusers, equal rows together": alike, "ours": engine}
    if ours.device.type == "cpu":
        works["ours, a process a core"] = _processes(ours, model, recipes, together)
    counted = {name: _counted(work) for name, work in works.items()}
    return counted, -10 * float(np.log10(max(error, 1e-12)))


def recipes_of(wanted: Sequence[Row]) -> list[Recipe]:
    """The rows as recipes; row k has seed k."""
    return [
        Recipe(
            _PROMPTS[k % len(_PROMPTS)],
            seed=k,
            sampler=row.sampler,
            num_inference_steps=row.steps,
            guidance_scale=row.scale,
            height=128,
            width=row.width,
        )
        for k, row in enumerate(wanted)
    ]


_mine: list[TextToImagePipeline] = []  # of a process that helps


def _load(model: Path, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    _mine.append(TextToImagePipeline.from_pretrained(model, torch_dtype=dtype, device="cpu"))


def _draw(recipes: Sequence[Recipe], together: int) -> list[np.ndarray]:
    found = {each.place: np.asarray(each.image) / 255 for each in _mine[0].draw_each(recipes, together)}
    return [found[k] for k in range(len(recipes))]


def _processes(
    pipe: TextToImagePipeline, model: Path, recipes: Sequence[Recipe], together: int
) -> Callable[[], dict[int, np.ndarray]]:
    """The same groups as ldm-batch makes, drawn by processes that have loaded the model."""
    cores, dtype = len(os.sched_getaffinity(0)), pipe.dtype
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _load, (model, dtype))

    def work() -> dict[int, np.ndarray]:
        order = sorted(range(len(recipes)), key=lambda k: likeness(pipe.complete(recipes[k])))
        groups = [order[k : k + together] for k in range(0, len(order), together)]
        drawn = pool.map(_draw, [[recipes[k] for k in group] for group in groups], [together] * len(groups))
        return {
            k: each
            for group, some in zip(groups, drawn, strict=True)
            for k, each in zip(group, some, strict=True)
        }

    return work


def _counted(work: Callable[[], dict[int, np.ndarray]]) -> Callable[[], int]:
    return lambda: len(work())
