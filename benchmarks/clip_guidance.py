"""CLIP guidance on the bundled model, without classifier-free guidance: what it gains and costs, by its scale.

Of the U-Net told the prompt, and told nothing, where the CLIP alone says what to draw.

python -m benchmarks.clip_guidance

Draws the same prompts with the same noise at every scale, and with classifier-free guidance for comparison. What is
right is judged by detectors that were fitted on compositions (ldm/emoji/detectors.py), not by the CLIP that guides.
Needs scripts/prepare_data.py. Writes a table, a plot and a sheet of pictures.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from benchmarks.quality import Bench
from ldm.checkpoints.files import read_text, write_bytes, write_text
from ldm.conditioning.clip import LatentCLIP
from ldm.conditioning.clip_models import PictureCLIP, load_clip
from ldm.diffusion.plan import plan
from ldm.emoji import quality
from ldm.emoji.prompts import Asked, ask
from ldm.pictures import grid, open_raster, png, to_pil
from ldm.sampling import Guidance, decode, guided, prepare, sample
from ldm.sampling.clip_guidance import CLIPGuidance
from ldm.system import bundled

if TYPE_CHECKING:
    from PIL.Image import Image

PLOT, SHEET = Path("benchmarks/clip-guidance.png"), Path("benchmarks/clip-guidance.jpg")
_TOGETHER = 16  # pictures of a call
_SHOWN = 10  # prompts of the sheet


@dataclass(frozen=True)
class Row:
    """One setting's figures: shares in [0, 1]; distances and cosines of unit vectors.

    told: whether the U-Net is told the prompt.
    things: that were asked for and are the nearest class to what is seen. composed: pictures of which all is right.
    diversity: the mean distance, in EfficientNet-Lite0's features, between pictures of one prompt. cosine: of the
    picture and its prompt, by the CLIP that guides.
    """

    guidance_scale: float
    clip_guidance_scale: float
    pictures: int
    things: float
    composed: float
    diversity: float
    cosine: float
    told: bool = True

    @property
    def name(self) -> str:
        """Of its files."""
        return name_of(self.clip_guidance_scale, self.guidance_scale, self.told)


def name_of(scale: float, free: float, told: bool) -> str:
    """Of a setting's files."""
    return f"clip-{scale:g}-free-{free:g}" + ("" if told else "-untold")


def drawn_by(
    bench: Bench,
    clip: LatentCLIP | PictureCLIP,
    asked: Sequence[Asked],
    scale: float,
    free: float,
    told: bool,
) -> "list[Image]":
    """Draw one picture a prompt, a few at a time."""
    system, drawn = bench.pipe.system, list[Any]()
    steps = plan(system.scheduler, system.options["num_inference_steps"])
    for start in range(0, len(asked), _TOGETHER):
        some = asked[start : start + _TOGETHER]
        prompts = [each.prompt for each in some]
        shown = prompts if told else [""] * len(some)
        request = prepare(system, steps, shown, [each.seed for each in some], guidance=Guidance(free))
        if scale:
            request = guided(request, [CLIPGuidance.towards(clip, prompts, scale)])
        with torch.no_grad():
            drawn += to_pil(decode(system.autoencoder, sample(system, request)))
    return drawn


def measured(
    bench: Bench, clip: str, asked: Sequence[Asked], seeds: int, scale: float, free: float, told: bool
) -> Row:
    """Draw every prompt with `seeds` seeds and judge it. scale: of the CLIP. free: of classifier-free guidance."""
    every = [replace(each, seed=1000 * k + seed) for k, each in enumerate(asked) for seed in range(seeds)]
    system = bench.pipe.system
    folder = bundled("*-clip/config.json") if clip == "bundled" else Path(clip) / "config.json"
    assert folder is not None
    own = load_clip(folder.parent, system.autoencoder, system.text)
    drawn = drawn_by(bench, own, every, scale, free, told)
    pictures = quality.as_tensor(drawn)
    detectors, _ = bench.detectors
    judged = quality.judge(detectors, every, {"drawn": pictures})
    parts = [judged.shares("drawn", part) for part in ("seen", "held-out")]
    weights = [each.count / len(every) for each in parts]
    seen = F.normalize(bench.features.pooled(pictures)).view(len(asked), seeds, -1)
    apart = torch.cdist(seen, seen).sum((1, 2)) / (seeds * (seeds - 1))
    with torch.no_grad():
        image = torch.cat([own.image_features(each / 2 + 0.5) for each in pictures.split(_TOGETHER)])
        cosine = F.cosine_similarity(image, own.text_features([each.prompt for each in every]))
    strip = grid(drawn[::seeds], len(asked))  # the first picture of each prompt, for the sheet
    write_bytes(bench.output / f"{name_of(scale, free, told)}.png", png(strip))
    return Row(
        free,
        scale,
        len(every),
        sum(w * each.top1 for w, each in zip(weights, parts, strict=True)),
        sum(w * each.composed for w, each in zip(weights, parts, strict=True)),
        float(apart.mean()),
        float(cosine.mean()),
        told,
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw what is right and how pictures differ against the scale; classifier-free guidance as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    free = [row for row in rows if row.guidance_scale > 1]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    shown = (
        ("things", "things right"),
        ("composed", "all right"),
        ("diversity", "distance within a prompt"),
        ("cosine", "cosine, by the CLIP that guides"),
    )
    for axis, (name, label) in zip(axes, shown, strict=True):
        for told, words in ((True, "told the prompt"), (False, "told nothing")):
            some = [row for row in rows if row.told == told and row.guidance_scale <= 1]
            scales = [row.clip_guidance_scale for row in some]
            axis.plot(scales, [getattr(row, name) for row in some], "o-", label=words)
        for row in free:
            axis.axhline(getattr(row, name), linestyle="--", color="grey")
            words = f"classifier-free guidance {row.guidance_scale:g}"
            axis.annotate(words, (0, getattr(row, name)), fontsize=8, va="bottom")
        axis.set_xlabel("CLIP guidance scale")
        axis.set_title(label)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=-0.02)
    axes[0].legend()
    figure.savefig(path, dpi=100)


def sheet(output: Path, rows: Sequence[Row], path: Path) -> None:
    """Put the first pictures of every setting below each other."""
    from PIL import Image

    strips = [open_raster((output / f"{row.name}.png").read_bytes()) for row in rows]
    width = min(_SHOWN * strips[0].height, strips[0].width)
    made = Image.new("RGB", (width, sum(each.height for each in strips)), "white")
    for k, strip in enumerate(strips):
        made.paste(strip.crop((0, 0, width, strip.height)), (0, k * strip.height))
    made.save(path, quality=88)


def table(rows: Sequence[Row]) -> str:
    """The figures in Markdown."""
    heads = (
        "prompt",
        "classifier-free",
        "CLIP",
        "things right",
        "all right",
        "distance",
        "cosine by the CLIP",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        scales = (
            f"| {'told' if row.told else 'not told'} | {row.guidance_scale:g} | {row.clip_guidance_scale:g} "
        )
        shares = f"| {100 * row.things:.0f} % | {100 * row.composed:.0f} % "
        lines.append(f"{scales}{shares}| {row.diversity:.3f} | {row.cosine:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 4, 8, 16, 32])
    parser.add_argument(
        "--free", type=float, nargs="*", default=[3.5], help="classifier-free, to compare with"
    )
    parser.add_argument(
        "--untold", type=float, nargs="*", default=[0, 4, 8, 16], help="scales, told no prompt"
    )
    parser.add_argument("--prompts", type=int, default=24, help="half of them held out from training")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument(
        "--fitted", type=int, default=2048, help="compositions that the detectors are fitted on"
    )
    parser.add_argument("--clip", default="bundled", help="the folder of the CLIP that guides")
    parser.add_argument("--output", type=Path, default=Path("runs/clip/guidance"))
    given = parser.parse_args()
    bench = Bench.open(None, Path("configs/bundled-unet.yaml"), given.output)
    bench.fitted, bench.tested = given.fitted, given.fitted // 4
    asked = ask(bench.mixture, given.prompts)
    rows: list[Row] = []
    settings = [(scale, 1.0, True) for scale in given.scales] + [(0.0, free, True) for free in given.free]
    for scale, free, told in [*settings, *((scale, 1.0, False) for scale in given.untold)]:
        kept = given.output / f"{name_of(scale, free, told)}.json"
        if not kept.exists():
            found = measured(bench, given.clip, asked, given.seeds, scale, free, told)
            write_text(kept, json.dumps(vars(found)))
        rows.append(Row(**json.loads(read_text(kept))))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    plot(rows, PLOT)
    sheet(given.output, rows, SHEET)
    write_text(given.output / "table.md", table(rows))


if __name__ == "__main__":
    main()
