"""Draw digits by class in 1, 2, 4 and 8 steps with models of few steps and their teacher, and measure them.

python -m benchmarks.few_steps_digits [--models NAME=FOLDER[@SAMPLER[:STEPS,...]] ...] [--count 1541]
By default the models of configs/lectures/edm-digits.yaml, consistency-*-digits.yaml and progressive-*.yaml that were
trained. Prints a table; writes benchmarks/few-steps-digits.png (the measures against steps) and, beside it,
few-steps-digits-sheet.png.
Fréchet distance: to the 1,541 digits that were learned from, in 64 features of a small network that is trained here, in
seconds and the same each time, to know them. Accuracy: how often an SVC that was fitted on these too (see
`benchmarks.scores_digits`) finds the class that was asked for.
"""

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.scores_digits import HELD_OUT, classifier, sheet
from ldm.condition import Condition
from ldm.console import Parser, command, line
from ldm.diffusion.plan import plan
from ldm.diffusion.process import Discrete
from ldm.errors import UserError
from ldm.evaluation.frechet import frechet_distance
from ldm.files import write_bytes
from ldm.pictures import png
from ldm.sampling.plain import draw, prepare
from ldm.system.plain import PlainSystem
from ldm.training.data.arrays import digits

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE, RUNS = Path(__file__).parent, "runs/lectures"
STEPS = (1, 2, 4, 8)
DEFAULT = (
    f"EDM teacher, Euler={RUNS}/edm-digits/export",
    f"EDM teacher, Heun={RUNS}/edm-digits/export@heun:18",
    f"consistency distillation={RUNS}/consistency-distillation-digits/export",
    f"consistency training={RUNS}/consistency-training-digits/export",
    f"v teacher, DDIM={RUNS}/progressive-teacher-digits/export@ddim:1,2,4,8,32",
    *(
        f"progressive distillation={RUNS}/progressive-digits/round-{steps}/export@:{steps}"
        for steps in reversed(STEPS)
    ),
)


@dataclass(frozen=True)
class Entry:
    """A model: its name, its folder, a sampler (None is its own), numbers of steps."""

    name: str
    folder: Path
    sampler: str | None
    steps: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> "Entry":
        """Read NAME=FOLDER[@SAMPLER[:STEPS,...]]. Raises UserError."""
        name, _, rest = text.partition("=")
        folder, _, how = rest.partition("@")
        sampler, _, steps = how.partition(":")
        if not (name and folder) or not all(each.isdecimal() for each in steps.split(",") if steps):
            raise UserError(
                f"--models: {text!r:.80} is not NAME=FOLDER, NAME=FOLDER@SAMPLER or NAME=FOLDER@SAMPLER:STEPS"
            )
        counts = tuple(int(each) for each in steps.split(",")) if steps else STEPS
        return cls(name, Path(folder), sampler or None, counts)


class Features(nn.Module):
    """A small network that knows digits: (B, 1, 8, 8) to 64 features, and on to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, 64),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.body(pictures)


def trained(pictures: Tensor, labels: Tensor) -> Features:
    """Train it: 20 passes, at one seed."""
    torch.manual_seed(0)
    network = Features()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(20):
        for rows in torch.randperm(len(pictures)).split(64):
            seen = pictures[rows] + 0.1 * torch.randn_like(pictures[rows])
            loss = F.cross_entropy(network.head(network(seen)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def drawn(entry: Entry, steps: int, count: int) -> Tensor:
    """Draw `count` digits (count, 1, 8, 8), of each class in turn."""
    system = PlainSystem.load(entry.folder)
    process, sampler = system.process, entry.sampler
    if isinstance(process, Discrete) and sampler is not None:
        # From the last timestep down: other spacings leave out the noisiest ones where there are few steps.
        drawing = plan(process.scheduler, steps, sampler, "trailing")
    else:
        drawing = process.plan(steps, sampler)
    told = Condition(labels=torch.arange(count) % 10)
    return draw(system, prepare(system, drawing, told, range(count)))


@dataclass(frozen=True)
class Measured:
    """A row of the table, and what it was measured on."""

    name: str
    steps: int
    distance: float
    accuracy: float
    pictures: Tensor


def measured(entries: list[Entry], count: int) -> "Iterator[Measured]":
    """Measure each model in each of its numbers of steps, after the held-out digits."""
    pictures, labels = digits()
    judge, real = classifier()
    learned = pictures[:-HELD_OUT]
    network = trained(learned, labels[:-HELD_OUT])
    known = network.head(network(real)).argmax(1) == labels[-HELD_OUT:]
    line(f"features: of a network with accuracy {known.float().mean():.3f} on {HELD_OUT} held-out digits")

    def row(name: str, steps: int, found: Tensor, asked: Tensor) -> Measured:
        distance = frechet_distance(network(found), network(learned))
        said = judge.predict(found.flatten(1).numpy())
        return Measured(name, steps, distance, float(np.mean(said == asked.numpy())), found)

    yield row(f"real digits, {HELD_OUT} held out", 0, real, labels[-HELD_OUT:])
    for entry in entries:
        for steps in entry.steps:
            yield row(entry.name, steps, drawn(entry, steps, count), torch.arange(count) % 10)


def plotted(rows: list[Measured]) -> bytes:
    """Both measures against the steps; a model of one number of steps is a line across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for k, name in enumerate(dict.fromkeys(each.name for each in rows)):
        own = [each for each in rows if each.name == name]
        values: tuple[list[float], ...] = [each.distance for each in own], [each.accuracy for each in own]
        for axis, heights in zip(axes, values, strict=True):
            style: dict[str, Any] = {"color": f"C{k}", "label": name}
            if len(own) > 1:
                axis.plot([each.steps for each in own], heights, "o-", **style)
            else:
                label = f"{name}, {own[0].steps} steps" if own[0].steps else name
                axis.axhline(heights[0], **{**style, "linestyle": "--", "label": label})
    axes[0].set(title="Fréchet distance", xlabel="steps", xscale="log", yscale="log")
    axes[1].set(title="accuracy, of the class asked for", xlabel="steps", xscale="log")
    for axis in axes:
        axis.set_xticks(STEPS, [str(each) for each in STEPS])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return buffer.getvalue()


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME=FOLDER", help="what is measured")
    parser.add_argument("--count", type=int, default=1541, help="drawn of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "few-steps-digits.png")
    chosen = parser.parse_args()
    if chosen.count < 100:
        raise UserError("--count must be at least 100: there are 64 features")
    entries = [Entry.read(text) for text in chosen.models or DEFAULT]
    if not chosen.models:
        entries = [each for each in entries if each.folder.is_dir()]
    if not entries:
        raise UserError(f"{RUNS} has no model that was trained: see --help")
    rows = []
    line("model | steps | Fréchet distance | accuracy")
    for each in measured(entries, chosen.count):
        rows.append(each)
        line(f"{each.name} | {each.steps or '-'} | {each.distance:.3f} | {each.accuracy:.3f}")
    write_bytes(chosen.output, plotted(rows))
    shown = [
        (f"{each.name}, {each.steps} steps" if each.steps else each.name, each.pictures) for each in rows
    ]
    pictures = chosen.output.with_name(f"{chosen.output.stem}-sheet.png")
    write_bytes(pictures, png(sheet(shown)))
    line(f"{chosen.output}, {pictures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
