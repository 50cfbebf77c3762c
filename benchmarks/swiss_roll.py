"""Draw what a model of the swiss roll knows: its points, its score field and its likelihood, beside the true ones.

python -m benchmarks.swiss_roll [--model runs/lectures/swiss-roll/export]
Trained by: python scripts/train.py --config configs/lectures/swiss-roll.yaml. Writes benchmarks/swiss-roll.png and
prints the held-out likelihood, in nats a point, by the probability-flow ODE with exact traces.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.console import Parser, command, line
from ldm.diffusion.denoiser import Denoise, Denoiser, answered, awaited
from ldm.diffusion.driver import sample
from ldm.diffusion.likelihood import decode, log_likelihood
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.sde import SDE, VP
from ldm.diffusion.sde_samplers import predictor_corrector
from ldm.files import write_bytes
from ldm.system.plain import PlainSystem
from ldm.training.data.arrays import Toys

OUTPUT = Path(__file__).with_name("swiss-roll.png")
POINTS, HELD_OUT, SIDE, REACH = 2000, 512, 60, 2.6
WIDTH = 0.5 / 7  # of the noise around the roll, as `arrays._swiss_roll` has it


def true_log_p(points: Tensor, sigma: float = 0.0) -> Tensor:
    """The log density, nats, of points (B, 2, 1, 1) of the roll under noise sigma: an integral over the angle."""
    angle = 1.5 * math.pi * (1 + 2 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    centres = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 7
    variance = WIDTH**2 + sigma**2
    squared = torch.cdist(points.flatten(1).double(), centres).square()
    return (-squared / (2 * variance)).logsumexp(1) - math.log(4000) - math.log(math.tau * variance)


def grid_points(side: int) -> Tensor:
    """Points (side^2, 2, 1, 1) of a square grid, row by row from below."""
    ticks = torch.linspace(-REACH, REACH, side)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2, 1, 1)


def score(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """The score of x under noise sigma, (B, 2)."""
    with torch.no_grad():
        x0 = answered(awaited(denoise(x, x.new_full((len(x),), sigma))))
    return ((x0 - x) / sigma**2).flatten(1)


def draw(axes: Any, denoise: Denoise, sde: SDE, held_out: Tensor) -> None:
    """Fill the six panels."""
    noise = torch.Generator().manual_seed(0)
    begin = sde.first_std * torch.randn(POINTS, 2, 1, 1, generator=noise)
    by_ode = decode(denoise, begin, sde, rtol=1e-4, atol=1e-4)
    steps = predictor_corrector(
        begin, sde.sigmas(200), lambda: torch.randn(begin.shape, generator=noise), sde=sde, snr=0.1
    )
    with torch.no_grad():
        by_sde = sample(denoise, steps)
    for axis, points, title in (
        (axes[0], held_out, "data"),
        (axes[1], by_ode, "drawn by the probability-flow ODE"),
        (axes[2], by_sde, "drawn by predictor and corrector"),
    ):
        axis.scatter(*points.flatten(1).T, s=1, alpha=0.5, color="black")
        axis.set_title(title)
    arrows = grid_points(22)
    x, y = arrows.flatten(1).T
    for axis, sigma in ((axes[3], 0.15), (axes[4], 0.6)):
        field = score(denoise, arrows, sigma)
        field = field / field.norm(dim=1, keepdim=True) * field.norm(dim=1, keepdim=True).sqrt()
        axis.scatter(*held_out.flatten(1).T, s=1, alpha=0.15, color="tab:orange")
        axis.quiver(x, y, *field.T, width=0.003)
        axis.set_title(f"score at sigma {sigma} (arrows by the root of its size)")
    found = log_likelihood(denoise, grid_points(SIDE), sde, exact=True, rtol=1e-3, atol=1e-3)
    shown = found.log_p.view(SIDE, SIDE).clamp(min=-6).numpy()
    picture = axes[5].imshow(shown, origin="lower", extent=[-REACH, REACH] * 2, cmap="magma")
    axes[5].set_title("log likelihood, nats, by the ODE")
    axes[5].figure.colorbar(picture, ax=axes[5], shrink=0.8)
    for axis in axes:
        axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/lectures/swiss-roll/export"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()

    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    system = PlainSystem.load(chosen.model)
    schedule = system.process.schedule
    sde = VP.of(schedule) if isinstance(schedule, NoiseSchedule) else schedule
    assert isinstance(sde, SDE)
    denoise = Denoiser(system.bind(Condition()), schedule, system.process.prediction_type)
    held_out = Toys("swiss_roll", HELD_OUT, 0).cuts(10**9, HELD_OUT).pictures  # beyond all training
    # As the model sees data: under its least noise, which both densities are of.
    noisy = held_out + sde.sigma_min * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
    found = log_likelihood(denoise, noisy, sde, exact=True)
    own, true = -found.log_p, -true_log_p(noisy, sde.sigma_min)
    for name, values in (("model", own), ("truth", true), ("difference", own - true)):
        line(f"{name}: {values.mean():.3f} +- {values.std() / math.sqrt(HELD_OUT):.3f} nats a point")
    line(
        f"{found.evaluations} evaluations of {HELD_OUT} points; the ODE's likelihood is exact but for its tolerance"
    )
    figure, axes = plt.subplots(2, 3, figsize=(13, 8.5))
    draw(np.ravel(axes), denoise, sde, held_out)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    write_bytes(chosen.output, buffer.getvalue())
    line(str(chosen.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
