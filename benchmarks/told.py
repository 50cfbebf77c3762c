"""Pictures drawn by what a network without text was told: maps, low resolutions, blurred pictures.

python -m benchmarks.told    after training configs/lectures/{semantic-map,semantic-tokens,low-resolution,blurred}.yaml

Writes benchmarks/told.png: of each model what it was told, what it drew, and the compositions themselves, which it
never saw; and prints how far a drawing keeps to what was told, beside a ceiling (the compositions) and chance.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ldm.emoji.pools  # noqa: F401 (the kind of data)
from ldm.pictures import grid, png, to_pil, to_unit_range
from ldm.sampling import Guidance
from ldm.sampling.plain import draw, prepare
from ldm.system.plain import PlainSystem
from ldm.training.data.told import SemanticMap
from ldm.training.objectives.diffusion import Config
from ldm.training.run import read_run

NAMES = ("semantic-map", "semantic-tokens", "low-resolution", "blurred")
SHOWN, COUNT, STEPS, GUIDANCE = 16, 48, 50, 1.5
# A colour for each region of a map.
_COLOURS = torch.tensor(np.random.default_rng(3).uniform(-1, 1, (32, 3)), dtype=torch.float32)


def main() -> int:
    rows: list[Tensor] = []
    print("model | told against drawn | the compositions | another's")
    for name in NAMES:
        run = read_run(f"configs/lectures/{name}.yaml")
        settings: Config = run.settings
        system = PlainSystem.load(run.output / "export")
        examples = settings.data.examples("data", None, COUNT)
        batch, none = examples.whole(0, COUNT), torch.zeros(COUNT, dtype=torch.bool)
        side = system.shape[-1]
        told = settings.condition.condition(batch, none, examples, side)
        drawing = system.process.plan(STEPS)
        drawn = draw(system, prepare(system, drawing, told, range(COUNT), Guidance(GUIDANCE)))
        by_map = isinstance(settings.condition, SemanticMap)
        assert batch.maps is not None
        if by_map:
            shown = _COLOURS[batch.maps].permute(0, 3, 1, 2) * (batch.maps > 0)[:, None]
            figures = [agreement(each, batch.maps > 0) for each in (drawn, batch.pictures, drawn.roll(1, 0))]
            unit = "IoU"
        else:
            assert told.channels is not None
            shown = told.channels
            others = (drawn, batch.pictures, drawn.roll(1, 0))
            again = [
                settings.condition.condition(replace(batch, pictures=each), none, examples, side).channels
                for each in others
            ]
            figures = [psnr(each, shown) for each in again if each is not None]
            unit = "dB"
        print(name, *(f"{each:.2f} {unit}" for each in figures), sep=" | ")
        rows += [shown[:SHOWN], drawn[:SHOWN], batch.pictures[:SHOWN]]
    pictures = F.interpolate(to_unit_range(torch.cat(rows)), scale_factor=2, mode="nearest")
    Path("benchmarks/told.png").write_bytes(png(grid(to_pil(pictures), SHOWN)))
    return 0


def psnr(one: Tensor, other: Tensor) -> float:
    """Return the PSNR of pictures in [-1, 1], a mean, in dB."""
    error = ((one.clamp(-1, 1) - other) / 2).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def agreement(pictures: Tensor, things: Tensor) -> float:
    """Return the mean IoU of where things are, (B, H, W), with what is unlike the corners of pictures (B, 3, H, W)."""
    corners = pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(-1).values[:, :, None, None]
    found = (pictures - corners).square().sum(1).sqrt() > 0.5
    both, either = (found & things).flatten(1).sum(1), (found | things).flatten(1).sum(1)
    return float((both / either.clamp_min(1)).mean())


if __name__ == "__main__":
    sys.exit(main())
