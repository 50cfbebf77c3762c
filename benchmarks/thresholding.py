"""Limits on x0 under high guidance (Saharia et al. 2022, sec. 2.3): digits of pixels, with none, static, dynamic.

thresholding.py [--model runs/lectures/ddpm-digits/export]
First: python scripts/train.py --config configs/lectures/ddpm-digits.yaml
Prints a table and writes benchmarks/thresholding.png. The judge is a support vector machine that saw real digits alone.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.condition import Condition
from ldm.console import Parser, command, line
from ldm.diffusion.process import Discrete
from ldm.errors import UserError
from ldm.figures import figure
from ldm.files import whole_file
from ldm.sampling import Guidance
from ldm.sampling.plain import draw, prepare
from ldm.system.plain import PlainSystem
from ldm.training.data.arrays import digits

SCALES = (1.0, 2.0, 4.0, 7.0, 10.0)
# Keys of diffusers' scheduler_config.json. A sample_max_value of 1, diffusers' default, would be the static limit.
LIMITS: dict[str, dict[str, Any]] = {
    "none": {"clip_sample": False, "thresholding": False},
    "static": {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False},
    "dynamic, 0.995": {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 100.0},
    # Of 64 pixels 0.995 is the very largest: this one leaves a fifth of them to be cut off.
    "dynamic, 0.8": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 100.0},
}
SATURATED = 1 - 1 / 16  # nearer to black or white than half a level of the data's 17


@dataclass(frozen=True)
class Point:
    """Figures of pictures at one scale: shares of pixels at black or white and beyond, deviation, share recognised."""

    saturated: float
    beyond: float
    deviation: float
    accuracy: float


def point(pictures: Tensor, labels: Tensor, judge: Any) -> Point:
    """Judge pictures (N, 1, 8, 8) of classes (N,): as they are shown, cut off at -1 and 1."""
    shown = pictures.clamp(-1, 1)
    found = judge.predict(shown.flatten(1).numpy())
    return Point(
        float((shown.abs() >= SATURATED).float().mean()),
        float((pictures.abs() > 1.001).float().mean()),
        float(shown.flatten(1).std(1).mean()),
        float((found == labels.numpy()).mean()),
    )


def drawn(system: PlainSystem, limit: str, scale: float, labels: Tensor, steps: int, sampler: str) -> Tensor:
    """Draw pictures of classes (N,), each seed the same at every scale and limit."""
    assert isinstance(system.process, Discrete)
    process = Discrete(system.process.scheduler.with_values(**LIMITS[limit]))
    request = prepare(
        system,
        process.plan(steps, sampler),
        Condition(labels=labels),
        list(range(len(labels))),
        Guidance(scale),
    )
    return draw(system, request)


def plot(points: dict[str, list[Point]], real: Point, sheets: dict[str, Tensor], target: Path) -> None:
    """Draw the curves, and below them each limit's pictures at the highest scale."""
    whole = figure(14, 5.6)
    grid = whole.add_gridspec(2, 4, height_ratios=[3, 1])
    names = {
        "saturated": "share of pixels at black or white",
        "beyond": "share of pixels beyond them, cut off",
        "deviation": "deviation of pixels",
        "accuracy": "share recognised",
    }
    for column, (name, title) in enumerate(names.items()):
        axes = whole.add_subplot(grid[0, column])
        for limit, found in points.items():
            axes.plot(SCALES, [getattr(each, name) for each in found], marker="o", markersize=4, label=limit)
        axes.axhline(getattr(real, name), color="grey", linestyle="--", linewidth=1, label="real digits")
        axes.set(title=title, xlabel="guidance scale")
        axes.set_ylim(
            0, 1.1 * max(getattr(each, name) for found in (*points.values(), [real]) for each in found)
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right" if name == "accuracy" else "best")
    for column, (limit, pictures) in enumerate(sheets.items()):
        axes = whole.add_subplot(grid[1, column])
        rows = pictures.clamp(-1, 1).view(2, 10, 8, 8).permute(0, 2, 1, 3).reshape(16, 80)
        axes.imshow(rows, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set(title=f"{limit}, scale {SCALES[-1]:g}", xticks=[], yticks=[])
    with whole_file(target) as temporary:
        whole.savefig(temporary, dpi=100, format="png")


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/lectures/ddpm-digits/export"))
    parser.add_argument("--pictures", type=int, default=100, help="at each scale (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/thresholding.png"))
    chosen = parser.parse_args()
    if chosen.pictures < 20:
        raise UserError("--pictures must be 20 or more: two of each digit")
    from sklearn.svm import SVC

    system = PlainSystem.load(chosen.model)
    pictures, classes = digits()
    judge = SVC(gamma="scale", C=10).fit(pictures[:1500].flatten(1).numpy(), classes[:1500].numpy())
    real = point(pictures[1500:], classes[1500:], judge)
    labels = torch.arange(chosen.pictures) % 10
    points: dict[str, list[Point]] = {}
    sheets: dict[str, Tensor] = {}
    line("| limit | scale | at black or white | beyond | deviation | recognised |")
    line("|---|---|---|---|---|---|")
    for limit in LIMITS:
        points[limit] = []
        for scale in SCALES:
            found = drawn(system, limit, scale, labels, chosen.steps, chosen.sampler)
            points[limit].append(point(found, labels, judge))
            line(f"| {limit} | {scale:g} | {_cells(points[limit][-1])} |")
        sheets[limit] = found[:20]
    line(f"| real digits | | {_cells(real)} |")
    plot(points, real, sheets, chosen.output)
    return 0


def _cells(found: Point) -> str:
    shares = f"{100 * found.saturated:.1f} % | {100 * found.beyond:.1f} % | {found.deviation:.3f}"
    return f"{shares} | {100 * found.accuracy:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
