"""Train consistency models of points whose exact denoiser is known, and measure how far one step is from the ODE's end.

python -m benchmarks.few_steps_toys [--batches 2000]
For a Gaussian and two moons, distillation (of the exact denoiser, by Heun) and training without a teacher, with N =
10, 20, 40, 80, 160 noise levels. Prints a table, and writes benchmarks/few-steps-toys.png: the error against N, against
the length of training, and the points of one step beside those of the ODE. The error is the root of the mean squared
distance, of 2,000 points drawn from the same noise, to where an adaptive solver with the exact denoiser ends.
"""

import argparse
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.conditioning.bound import BoundNetwork
from ldm.console import Parser, command, line
from ldm.diffusion.consistency import Fixed
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.edm_processes import ConsistencyConfig
from ldm.diffusion.ode import flow
from ldm.files import write_bytes
from ldm.models.points import PointConfig, PointNetwork
from ldm.training.distillation.consistency import ConsistencyDistillation, ConsistencyTraining
from ldm.training.distillation.lesson import Lesson, Method
from ldm.training.distributed import BatchGenerator
from ldm.training.objectives.distillation import estimated

OUTPUT = Path(__file__).with_name("few-steps-toys.png")
COUNTS, BATCH, POINTS, MOON = (10, 20, 40, 80, 160), 512, 2000, 24
NAMES = {"consistency_distillation": "distillation", "consistency_training": "training"}


@dataclass(frozen=True)
class Cloud:
    """Round Gaussians of one standard deviation around centres (K, 2), all as likely."""

    centres: Tensor
    std: float

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The mean of x0 (B, 2, 1, 1) under x at noise levels (B,): the exact denoiser."""
        points, centres = x.flatten(1).double(), self.centres.double()
        total = self.std**2 + sigma.double()[:, None] ** 2
        share = (-torch.cdist(points, centres).square() / (2 * total)).softmax(1)
        mean = share @ centres
        return (mean + self.std**2 / total * (points - mean)).to(x.dtype).view_as(x)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Points (count, 2, 1, 1)."""
        which = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return (self.centres[which] + self.std * noise)[:, :, None, None]


def moons() -> Cloud:
    """Two moons as the toys of `ldm.training.data.arrays` have them, as a mixture of Gaussians along them."""
    angle = math.pi * (torch.arange(MOON) + 0.5) / MOON
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1) * 1.3
    return Cloud(torch.cat([upper, -upper]), 0.1)


CLOUDS = {"Gaussian": Cloud(torch.tensor([[0.3, -0.2]]), 0.7), "two moons": moons()}


def methods(count: int) -> Iterator[ConsistencyDistillation | ConsistencyTraining]:
    """Distillation and training that differ in the teacher alone."""
    how: dict[str, Any] = {"levels": Fixed(count), "drawn": "lognormal", "weighting": "step"}
    yield ConsistencyDistillation(solver="heun", clip_denoised=False, **how)
    yield ConsistencyTraining(clip_denoised=False, **how)


class Student:
    """A network of points in training by a method, and its average."""

    def __init__(self, cloud: Cloud, method: Method, process: ConsistencyConfig, batches: int):
        torch.manual_seed(0)
        self.cloud, self.method, self.process, self.batches = cloud, method, process, batches
        self.network = PointNetwork(PointConfig())
        self.average = PointNetwork(PointConfig()).requires_grad_(False)
        self.average.load_state_dict(self.network.state_dict())
        self.generator = torch.Generator().manual_seed(1)

    def estimate(self, network: PointNetwork) -> Any:
        bound = BoundNetwork(network, Condition())
        return estimated(Denoiser(bound, self.process.schedule, self.process.prediction_type))

    def trained(self) -> Iterator[int]:
        """Train; yield after every batch how many there were."""
        own = self.estimate(self.network)
        lesson = Lesson(own, torch.no_grad()(own), self.cloud.denoise, self.process)
        optimizer = torch.optim.Adam(self.network.parameters(), 1e-3, betas=(0.9, 0.99))
        for number in range(self.batches):
            left = 2 * (1 - number / self.batches)  # a constant rate for half of the time, then down to 0
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, left)
            x0 = self.cloud.draw(BATCH, self.generator)
            rng = BatchGenerator(number, BATCH, slice(None))
            loss = self.method.losses(lesson, x0, rng, number * BATCH).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mine, other in zip(self.average.parameters(), self.network.parameters(), strict=True):
                    mine.lerp_(other, 1 / (2 + min(number, 200)))
            yield number + 1

    @torch.no_grad()
    def one_step(self, x: Tensor) -> Tensor:
        return self.estimate(self.average)(x, x.new_full((len(x),), self.process.sigma_max))


def distance(one: Tensor, other: Tensor) -> float:
    """The root of the mean squared distance of points."""
    return (one - other).flatten(1).square().sum(1).mean().sqrt().item()


def measured(cloud: Cloud, batches: int) -> tuple[list[tuple[str, int, int, float]], dict[str, Tensor]]:
    """Rows (method, N, batches, error); points of the ODE and of the students with the most levels."""
    noise = torch.randn(POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(2))
    x = 80 * noise
    ends = flow(cloud.denoise, x.double(), 80.0, 0.002, rtol=1e-7, atol=1e-7).x.float()
    rows, points = [], {"the ODE": ends}
    at = {max(1, round(batches * 2.0**-k)) for k in range(6)}
    for count in COUNTS:
        for method in methods(count):
            student = Student(cloud, method, ConsistencyConfig(count, clip_denoised=False), batches)
            for done in student.trained():
                if done in at:
                    rows.append((NAMES[method.kind], count, done, distance(student.one_step(x), ends)))
            line(" | ".join(str(each) for each in (*rows[-1][:3], f"{rows[-1][3]:.4f}")))
            points[f"{NAMES[method.kind]}, one step, N = {count}"] = student.one_step(x)
    return rows, points


def plotted(found: dict[str, tuple[list[tuple[str, int, int, float]], dict[str, Tensor]]]) -> bytes:
    """A row of panels for each cloud."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found), 5, figsize=(21, 4.2 * len(found)))
    for row, (name, (rows, points)) in zip(axes, found.items(), strict=True):
        full = max(done for _, _, done, _ in rows)
        for method, colour in zip(NAMES.values(), ("tab:blue", "tab:orange"), strict=True):
            ends = [(count, error) for kind, count, done, error in rows if (kind, done) == (method, full)]
            row[0].plot(*zip(*ends, strict=True), "o-", color=colour, label=method)
            for count, style in ((COUNTS[0], ":"), (COUNTS[2], "--"), (COUNTS[-1], "-")):
                way = [(done, error) for kind, n, done, error in rows if (kind, n) == (method, count)]
                row[1].plot(*zip(*way, strict=True), style, color=colour, label=f"{method}, N = {count}")
        row[0].set(title=f"{name}: error of one step", xlabel="N", xscale="log", yscale="log")
        row[1].set(title="against training", xlabel=f"batches of {BATCH}", xscale="log", yscale="log")
        row[0].set_xticks(COUNTS, [str(each) for each in COUNTS])
        for axis in row[:2]:
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3, which="both")
        shown = [points["the ODE"], *list(points.values())[-2:]]
        for axis, each, title in zip(row[2:], shown, ["the ODE", *list(points)[-2:]], strict=True):
            axis.scatter(*each.flatten(1).T, s=2, alpha=0.5, color="black")
            axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=70)
    plt.close(figure)
    return buffer.getvalue()


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=2000, help="of each training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    found = {}
    for name, cloud in CLOUDS.items():
        line(f"{name}: method | N | batches | error of one step")
        found[name] = measured(cloud, chosen.batches)
    write_bytes(chosen.output, plotted(found))
    line(str(chosen.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
