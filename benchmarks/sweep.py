"""Quality against seconds: the same prompts under many ways of sampling, in a table and a plot."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality import Bench, Settings
from ldm.checkpoints.files import whole_file, write_text
from ldm.checkpoints.folder import read_json
from ldm.emoji import quality
from ldm.emoji.prompts import ask
from ldm.errors import UserError
from ldm.evaluation.timing import machine
from ldm.figures import figure

_AT_ONCE = 8
WAYS = {
    **{f"ddim, guidance {scale:g}": [Settings(20, scale, 0.0, "ddim")] for scale in (1.5, 2.5, 5.0)},
    "ddim, guidance 3.5": [Settings(steps, 3.5, 0.0, "ddim") for steps in (8, 12, 16, 20, 30)],
    "ddim, guidance 3.5, rescale 0.7": [Settings(20, 3.5, 0.7, "ddim")],
    "dpmpp_2m, guidance 3.5": [Settings(steps, 3.5, 0.0, "dpmpp_2m") for steps in (8, 12, 20)],
    "unipc, guidance 3.5": [Settings(steps, 3.5, 0.0, "unipc") for steps in (8, 12)],
}


def sweep(bench: Bench, prompts: int, asked_for: Settings) -> str:
    """Draw and judge `prompts` in each way, on a machine that does nothing else; returns the table.

    Writes `sweep.json`, from which an interrupted sweep goes on, `sweep.md` and `sweep.png`. Raises UserError,
    also where a way of sampling is asked for.
    """
    if asked_for != Settings():
        raise UserError("--sweep has its own samplers, steps, guidance and rescale: leave those out")
    figure(9, 4)  # now, not after an hour
    path = bench.output / "sweep.json"
    origin = [bench.pipe.system.fingerprint, str(bench.pipe.dtype), bench.identity, prompts, machine()]
    found: dict[str, Any] = read_json(path) if path.exists() else {"origin": origin, "points": {}}
    points = found.get("points")
    whole = isinstance(points, dict) and all(map(_is_point, points.values()))
    if found.get("origin") != origin or not whole:
        raise UserError(
            f"{path} is of another model, mixture, machine or number of prompts: delete it, or give another --output"
        )
    asked = ask(bench.mixture, prompts)
    bench.draw([each.prompt for each in asked[:_AT_ONCE]], list(range(_AT_ONCE)), Settings(2))  # to warm up
    for settings in (each for some in WAYS.values() for each in some):
        name = json.dumps(asdict(settings))
        if name in found["points"]:
            continue
        pictures, started = [], time.perf_counter()
        for at in range(0, len(asked), _AT_ONCE):
            some = asked[at : at + _AT_ONCE]
            pictures += bench.draw([a.prompt for a in some], [a.seed for a in some], settings)
        seconds = (time.perf_counter() - started) / len(asked)
        judged = quality.judge(bench.detectors[0], asked, {"drawn": quality.as_tensor(pictures)})
        shares = {part: judged.shares("drawn", part) for part in ("seen", "held-out")}
        figures = {part: [each.top1, each.composed] for part, each in shares.items()}
        found["points"][name] = {"seconds": seconds, **figures}
        write_text(path, json.dumps(found, indent=1))
    lines = [
        f"{prompts} prompts, half of them held out; batches of {_AT_ONCE}; {machine()}\n",
        "| way | steps | seconds a picture | seen: things right | all right | held-out: things right | all right |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, some in WAYS.items():
        for settings in some:
            point = found["points"][json.dumps(asdict(settings))]
            shown = " | ".join(f"{100 * each:.0f} %" for part in ("seen", "held-out") for each in point[part])
            lines.append(f"| {way} | {settings.num_inference_steps} | {point['seconds']:.2f} | {shown} |")
    text = "\n".join(lines) + "\n"
    write_text(bench.output / "sweep.md", text)
    plot(found["points"], bench.output / "sweep.png")
    return text


def _is_point(point: Any) -> bool:
    """Whether an entry of sweep.json has the figures that the table shows."""
    if not isinstance(point, dict):
        return False
    shares = [point.get(part) for part in ("seen", "held-out")]
    numbers = [point.get("seconds"), *(n for each in shares if isinstance(each, list) for n in each)]
    return len(numbers) == 5 and all(isinstance(each, int | float) for each in numbers)


def _are_points(found: Any) -> bool:
    """Whether what a file holds is what `sweep` wrote into it."""
    parts = ("seen", "held-out")
    return isinstance(found, dict) and all(
        isinstance(each, dict)
        and isinstance(each.get("seconds"), float)
        and all(isinstance(each.get(part), list) and len(each[part]) == 2 for part in parts)
        and all(isinstance(share, int | float) for part in parts for share in each[part])
        for each in found.values()
    )


def plot(points: dict[str, Any], path: Path) -> None:
    """All right against seconds a picture, seen and held-out. Raises UserError without matplotlib."""
    drawn = figure(9, 4)
    for axes, part in zip(drawn.subplots(1, 2, sharey=True), ("seen", "held-out"), strict=True):
        for way, some in WAYS.items():
            chosen = [points[json.dumps(asdict(each))] for each in some]
            shares = [100 * each[part][1] for each in chosen]
            axes.plot([each["seconds"] for each in chosen], shares, "o-", label=way)
            for settings, each, share in zip(some, chosen, shares, strict=True):
                steps = str(settings.num_inference_steps)
                axes.annotate(steps, (each["seconds"], share), (3, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel="seconds a picture (steps beside the points)", title=part)
    drawn.axes[0].set_ylabel("pictures with all right, %")
    drawn.axes[1].legend(fontsize=7)
    with whole_file(path) as temporary:
        drawn.savefig(temporary, dpi=110, format="png")
