"""Speed against diffusers on the same weights, as ratios within one run.

benchmark.py sampling [--model FOLDER] [--pictures 1]       whole pictures; beside it, how alike they are
benchmark.py step [--pictures 1]                            one step of Stable Diffusion 1.5's U-Net, random weights
benchmark.py rows [--model FOLDER] [--rows 48] [--mixed]     many pictures: rows of a file, alike or of unlike settings
benchmark.py arrivals [--model FOLDER] [--rows 60]           latency of unlike requests that arrive at random; a plot
benchmark.py training [--model FOLDER] --data FOLDER        training steps on a folder of pictures with metadata.jsonl
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.console import Parser, command
from ldm.errors import UserError, printable

_MOST = 10_000  # pictures at once, or rounds


@command(memory="give fewer --pictures")
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sampling", "step", "rows", "arrivals", "training"))
    parser.add_argument("--model", type=Path, help="a diffusers folder (default: the bundled model)")
    parser.add_argument("--data", type=Path, help="of training: a folder of pictures with metadata.jsonl")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument("--pictures", type=int, help="at once (default: 1, rows and arrivals 8, training 16)")
    parser.add_argument("--rows", type=int, help="how many rows (default: 48), or arrivals at each load (60)")
    parser.add_argument(
        "--mixed", action="store_true", help="of rows: of three samplers, four numbers of steps, ..."
    )
    parser.add_argument("--output", type=Path, help="plot of arrivals (default: benchmarks/arrivals.png)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", default="a raccoon astronaut", help="of sampling")
    arguments = parser.parse_args()
    for name in ("pictures", "rounds", "rows"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= _MOST:
            raise UserError(f"--{name} must be 1 to {_MOST:,}")
    if arguments.what == "training" and not arguments.data:
        raise UserError("training needs --data: a folder of pictures with metadata.jsonl")

    from ldm.evaluation.timing import compare, machine, table
    from ldm.system import bundled_model

    model = arguments.model or bundled_model()
    print(f"{arguments.what}, {printable(model.name)}, precision {arguments.precision}; {machine()}\n")
    if arguments.what == "sampling":
        from benchmarks.sampling import contenders

        prompts = [arguments.prompt] * (arguments.pictures or 1)
        works, psnr = contenders(model, prompts, arguments.precision)
        print(table(compare(works, arguments.rounds), "diffusers", "pictures"))
        print(f"\nPSNR between the two: {psnr:.1f} dB")
        return 0
    if arguments.what == "step":
        from benchmarks.steps import contenders

        works, distance = contenders(arguments.precision, arguments.pictures or 1)
        print(table(compare(works, arguments.rounds), "diffusers", "pictures"))
        print(f"\nRelative L2 distance between the two: {distance:.1e}")
        return 0
    if arguments.what == "rows":
        from benchmarks.rows import contenders

        count = arguments.rows or 48
        how = count, arguments.mixed, arguments.precision, arguments.pictures or 8
        works, psnr = contenders(model, *how)
        kind = "mixed" if arguments.mixed else "alike"
        print(f"{count} rows, {kind}, up to {arguments.pictures or 8} pictures together\n")
        print(table(compare(works, arguments.rounds), "diffusers, a loop", "pictures"))
        print(f"\nPSNR between ours and the loop: {psnr:.1f} dB")
        return 0
    if arguments.what == "arrivals":
        from benchmarks.arrivals import report

        output = arguments.output or Path("benchmarks/arrivals.png")
        print(report(model, arguments.rows or 60, arguments.precision, arguments.pictures or 8, output))
        return 0
    from benchmarks.training import contenders

    with tempfile.TemporaryDirectory() as folder:
        works = contenders(Path(folder), model, arguments.data, arguments.pictures or 16, arguments.precision)
        print(table(compare(works, arguments.rounds), "diffusers", "pictures"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
