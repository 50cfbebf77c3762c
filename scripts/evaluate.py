"""Evaluate models: by detectors of a mixture of compositions, or by any two sets of pictures compared.

evaluate.py [--model FOLDER]            draw, judge, and write a report with pictures; goes on where it was interrupted
evaluate.py --sweep [--prompts 64]      quality against seconds over samplers, steps and guidance, with a plot
evaluate.py --grid FILE                 only draw the prompts of a file, a line each, with seeds 0 to 3
evaluate.py compare REAL OTHER          FID, Inception Score, KID, precision, recall, CLIP score: see compare --help
evaluate.py statistics SIDE FILE        keep what `compare` needs of a set in a file: see statistics --help
Detectors are fitted first, once for a mixture (minutes); scripts/prepare_data.py makes the sprites that they need.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.console import Parser, command, line, note
from ldm.errors import UserError

_MOST = 100_000  # prompts
_SIDES = """A side is
  a folder of pictures, webdataset shards, or a dataset that save_to_disk wrote;
  model:FOLDER, which draws the rows of --prompts first (model: alone is the bundled model);
  a file of statistics, .npz or .safetensors, of this command or (mu, sigma) of other FID programs.
"""
_COMPARE = f"""Compare two sets of pictures: OTHER against REAL.

{_SIDES}
In Inception's features (its weights are yours to get, see docs/evaluation.md) the figures are FID, Inception Score and
KID; in EfficientNet-Lite0's, which a package brings, they have other names and can't be compared with published ones.
"""
_STATISTICS = f"""Keep the statistics of a set's features in FILE, .npz or .safetensors.

{_SIDES}"""


@command(stopped="stopped: the same command goes on")
def main() -> int:
    if sys.argv[1:2] == ["compare"]:
        return _compare(sys.argv[2:])
    if sys.argv[1:2] == ["statistics"]:
        return _statistics(sys.argv[2:])
    return _mixture()


def _mixture() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder (default: the bundled model)")
    parser.add_argument("--config", type=Path, default="configs/bundled-unet.yaml", help="of its training")
    parser.add_argument("--prompts", type=int, default=512, help="half held out (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep", action="store_true")
    instead.add_argument("--grid", type=Path, metavar="FILE")
    _add_drawing(parser)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    chosen = parser.parse_args()
    if not 16 <= chosen.prompts <= _MOST:
        raise UserError(f"--prompts must be 16 to {_MOST:,}")
    _check_workers(chosen)

    from benchmarks.quality import Bench, Settings, evaluate, grid
    from benchmarks.sweep import sweep
    from pipelines.batch.engines import engine_named

    engine = engine_named(chosen.engine, chosen.workers)
    bench = Bench.open(chosen.model, chosen.config, chosen.output, chosen.precision, chosen.workers, engine)
    settings = Settings(chosen.steps, chosen.guidance, chosen.rescale, chosen.sampler)
    if chosen.sweep:
        print(sweep(bench, chosen.prompts, settings))
    elif chosen.grid:
        line(grid(bench, chosen.grid, settings))
    else:
        print(evaluate(bench, chosen.prompts, settings))
    return 0


def _compare(arguments: list[str]) -> int:
    parser = _parser("compare", _COMPARE)
    parser.add_argument("real", metavar="REAL")
    parser.add_argument("other", metavar="OTHER")
    parser.add_argument("--measures", help="of fid,is,kid,pr,clip (default: all that can be had)")
    parser.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="a CLIP, for the CLIP score of OTHER's captions"
    )
    parser.add_argument(
        "--clip-model",
        metavar="MODEL",
        help="that a CLIP over latents was trained for (default: the bundled one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    _add_features(parser)
    chosen = parser.parse_args(arguments)

    from benchmarks.measuring import compared, load_encoder
    from ldm.evaluation.measures import measures_named
    from ldm.files import write_text
    from pipelines.files import check_target

    wanted = None if chosen.measures is None else measures_named(chosen.measures)
    if chosen.json:
        check_target(chosen.json.parent, 2)  # now, not after minutes
    clip = None if chosen.clip is None else load_encoder(chosen.clip, chosen.clip_model)
    sides, drawing = (chosen.real, chosen.other), _drawing(chosen)
    found = compared(sides, drawing, wanted, chosen.features, chosen.weights, clip, chosen.limit)
    for each in found.notes:
        note(each)
    print(found.table())
    if chosen.json:
        write_text(chosen.json, found.to_json())
    return 0


def _statistics(arguments: list[str]) -> int:
    parser = _parser("statistics", _STATISTICS)
    parser.add_argument("side", metavar="SIDE")
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--all", action="store_true", help="keep all features: for KID, precision and recall")
    _add_features(parser)
    chosen = parser.parse_args(arguments)

    from benchmarks.measuring import keep_statistics

    network = chosen.features, chosen.weights
    keep_statistics(chosen.side, chosen.file, _drawing(chosen), *network, chosen.all, chosen.limit)
    line(str(chosen.file))
    return 0


def _parser(name: str, description: str) -> Parser:
    return Parser(
        prog=f"evaluate.py {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_features(parser: Parser) -> None:
    parser.add_argument(
        "--features",
        choices=("inception", "efficientnet"),
        help="the network of the features (default: that of a side's file, else inception)",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of Inception, where it isn't found")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures of each side")
    drawn = parser.add_argument_group("models among the sides")
    drawn.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line, or rows as of ldm-batch"
    )
    drawn.add_argument(
        "--output", type=Path, default=Path("runs/measures"), help="of what they draw (default: %(default)s)"
    )
    _add_drawing(drawn)


def _add_drawing(parser: Any) -> None:
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--rescale", type=float, default=0.0)
    parser.add_argument("--sampler")
    parser.add_argument("--workers", type=int, help="processes that draw (default: what suits the machine)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="as of ldm-batch")


def _drawing(chosen: argparse.Namespace) -> Any:
    from benchmarks.measuring import Drawing
    from pipelines.batch.engines import engine_named

    _check_workers(chosen)
    if chosen.limit is not None and chosen.limit < 2:
        raise UserError("--limit must be 2 or more")
    named = {
        "num_inference_steps": chosen.steps,
        "guidance_scale": chosen.guidance,
        "guidance_rescale": chosen.rescale or None,
        "sampler": chosen.sampler,
    }
    settings = {name: value for name, value in named.items() if value is not None}
    engine = engine_named(chosen.engine, chosen.workers)
    return Drawing(chosen.prompts, chosen.output, settings, chosen.workers, engine)


def _check_workers(chosen: argparse.Namespace) -> None:
    if chosen.workers is not None and chosen.workers < 1:
        raise UserError("--workers must be 1 or more")


if __name__ == "__main__":
    sys.exit(main())
