"""Evaluate a model that was trained on a mixture of compositions: does it draw what it is asked for?

evaluate.py [--model FOLDER]            draw, judge, and write a report with pictures; goes on where it was interrupted
evaluate.py --sweep [--prompts 64]      quality against seconds over samplers, steps and guidance, with a plot
evaluate.py --grid FILE                 only draw the prompts of a file, a line each, with seeds 0 to 3
Detectors are fitted first, once for a mixture (minutes); scripts/prepare_data.py makes the sprites that they need.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.console import Parser, command, line
from ldm.errors import UserError

_MOST = 100_000  # prompts


@command(stopped="stopped: the same command goes on")
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder (default: the bundled model)")
    parser.add_argument("--config", type=Path, default="configs/bundled-unet.yaml", help="of its training")
    parser.add_argument("--prompts", type=int, default=512, help="half held out (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep", action="store_true")
    instead.add_argument("--grid", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--rescale", type=float, default=0.0)
    parser.add_argument("--sampler")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--workers", type=int, help="processes that draw (default: what suits the machine)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="as of ldm-batch")
    chosen = parser.parse_args()
    if not 16 <= chosen.prompts <= _MOST:
        raise UserError(f"--prompts must be 16 to {_MOST:,}")
    if chosen.workers is not None and chosen.workers < 1:
        raise UserError("--workers must be 1 or more")

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


if __name__ == "__main__":
    sys.exit(main())
