"""Draw digits with every kind of score model, in one sheet, and let an independent classifier judge them.

python -m benchmarks.scores_digits [--models runs/lectures] [--count 300]
Trained by: python scripts/train.py --config configs/lectures/NAME.yaml for ncsn-digits, ve-digits, subvp-digits,
vp-digits, and ddpm-digits. Writes benchmarks/scores-digits.png and prints a table. The classifier is scikit-learn's
SVC, fitted on the real digits that the models learned from; its own accuracy is that on the 256 which were held out.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.condition import Condition
from ldm.console import Parser, command, line
from ldm.errors import UserError
from ldm.files import write_bytes
from ldm.pictures import grid, png, to_pil, to_unit_range
from ldm.sampling.plain import draw, prepare
from ldm.system.plain import PlainSystem
from ldm.training.data.arrays import digits

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT = Path(__file__).with_name("scores-digits.png")
HELD_OUT, SHOWN, SCALE, CONFIDENT = 256, 20, 4, 0.8


@dataclass(frozen=True)
class Entry:
    """A row of the sheet: the model's folder, steps, the sampler (None is its own), what is said of it."""

    folder: str
    steps: int
    sampler: str | None
    title: str


ENTRIES = (
    Entry("ncsn-digits", 22, None, "NCSN, annealed Langevin"),
    Entry("ve-digits", 150, None, "VE SDE, predictor and corrector"),
    Entry("ve-digits", 30, "heun", "VE SDE, Heun (ODE)"),
    Entry("subvp-digits", 200, None, "sub-VP SDE, Euler-Maruyama"),
    Entry("vp-digits", 200, None, "VP SDE, Euler-Maruyama"),
    Entry("vp-digits", 200, "ddpm", "VP SDE, ancestral (DDPM)"),
    Entry("ddpm-digits", 50, None, "DDPM in steps, of classes"),
)


def classifier() -> tuple[Any, Tensor]:
    """The classifier, and the held-out digits, which it has not seen. Raises UserError without scikit-learn."""
    pictures, labels = digits()
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    flat = pictures.flatten(1).numpy()
    judge = CalibratedClassifierCV(SVC(gamma=0.02, C=10.0), ensemble=False)
    judge.fit(flat[:-HELD_OUT], labels[:-HELD_OUT].numpy())
    accuracy = judge.score(flat[-HELD_OUT:], labels[-HELD_OUT:].numpy())
    line(f"classifier: SVC, accuracy {accuracy:.3f} on {HELD_OUT} held-out digits")
    return judge, pictures[-HELD_OUT:]


def judged(judge: Any, pictures: Tensor) -> tuple[float, float, float]:
    """Share with a confident class, entropy of the classes (of 1), mean of the strongest ink.

    Of real digits the classes are even: entropy 1.
    """
    found = judge.predict_proba(pictures.flatten(1).numpy())
    best = found.max(1)
    shares = np.bincount(found.argmax(1), minlength=10) / len(found)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum() / np.log(10)
    ink = pictures.flatten(1).amax(1).mean().item()
    return float((best > CONFIDENT).mean()), float(entropy), ink


def told_apart(pictures: Tensor, learned: Tensor) -> float:
    """How well an SVC, in five folds, tells as many drawn digits from real ones: 0.5 is not at all.

    A two-sample test (Lopez-Paz & Oquab 2017). A classifier of classes is sure of much that is no digit; this is not.
    """
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    count = min(len(pictures), len(learned))
    both = torch.cat([pictures[:count], learned[:count]]).flatten(1).numpy()
    return float(cross_val_score(SVC(gamma=0.02, C=10.0), both, np.repeat([0, 1], count), cv=5).mean())


def unlike_digits(real: Tensor, count: int) -> Tensor:
    """What the classifier should not be sure of: every pixel is one of a real digit, but each of another."""
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(len(real), (count, *real.shape[1:]), generator=generator)
    return real.gather(0, which)


def drawn(entry: Entry, folder: Path, count: int) -> Tensor:
    """Draw `count` digits (count, 1, 8, 8); of a model of classes, of each in turn."""
    system = PlainSystem.load(folder / entry.folder / "export")
    condition = Condition(labels=torch.arange(count) % 10) if system.wants.get("labels") else Condition()
    drawing = system.process.plan(entry.steps, entry.sampler)
    return draw(system, prepare(system, drawing, condition, range(count)))


def sheet(rows: list[tuple[str, Tensor]]) -> "Image":
    """A row of pictures a model, with its title above."""
    from PIL import Image, ImageDraw

    strips = []
    for title, pictures in rows:
        edged = pad(to_unit_range(pictures[:SHOWN]), (1, 1, 1, 1), value=0.4)
        small = grid(to_pil(edged), SHOWN)
        strip = Image.new("RGB", (small.width * SCALE, small.height * SCALE + 14), "white")
        strip.paste(small.resize((small.width * SCALE, small.height * SCALE), 0), (0, 14))
        ImageDraw.Draw(strip).text((2, 1), title, fill="black")
        strips.append(strip)
    return grid(strips, 1)


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/lectures"))
    parser.add_argument("--count", type=int, default=300, help="drawn by each model (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    if chosen.count < SHOWN:
        raise UserError(f"--count must be at least {SHOWN}, which are shown")
    judge, real = classifier()
    rows = [
        ("real digits, held out", real),
        ("each pixel of another digit", unlike_digits(real, chosen.count)),
    ]
    for entry in ENTRIES:
        if (chosen.models / entry.folder / "export").is_dir():
            rows.append((entry.title, drawn(entry, chosen.models, chosen.count)))
    if len(rows) == 2:
        raise UserError(f"{chosen.models} has no model that was trained: see --help")
    titles = []
    learned = digits()[0][:-HELD_OUT]
    line("model | told from real ones | share with a class above 0.8 | evenness of classes | strongest ink")
    for title, pictures in rows:
        sure, even, ink = judged(judge, pictures)
        told = told_apart(pictures, learned)
        line(f"{title} | {told:.3f} | {sure:.3f} | {even:.3f} | {ink:.2f}")
        titles.append(f"{title}: told from real digits in {told:.0%}, {sure:.0%} with a confident class")
    pictures = sheet([(title, each) for title, (_, each) in zip(titles, rows, strict=True)])
    write_bytes(chosen.output, png(pictures))
    line(str(chosen.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
