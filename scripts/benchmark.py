"""Speed against diffusers on the same weights, as ratios within one run.

benchmark.py parts [--model sd15] [--part step decode]      each part of drawing, start, import, memory; a plot
benchmark.py plot RESULTS.json ... [--plot FILE]            the tables and the plot again, of what `parts` has written
benchmark.py rows [--model FOLDER] [--rows 48] [--mixed]    many pictures: rows of a file, alike or of unlike settings
benchmark.py arrivals [--model FOLDER] [--rows 60]          latency of unlike requests that arrive at random; a plot
benchmark.py training [--model FOLDER] --data FOLDER        training steps on a folder of pictures with metadata.jsonl

sd15 (2.1 GB) and sdxl (7 GB) have random weights of the published sizes; they are made in runs/benchmark at first use.
`parts` writes each measurement once it is done: after a kill the same command goes on.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.console import Parser, command
from ldm.errors import UserError, printable

_MOST = 10_000  # pictures at once, or rounds
_MADE = Path("runs/benchmark")
_PARTS = ("step", "decode", "encode", "text", "picture", "start", "import")


@command(memory="give fewer --pictures, or --apart")
def main() -> int:
    arguments = _parser().parse_args()
    for name in ("pictures", "rounds", "rows", "steps"):
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 1 <= value <= _MOST:
                raise UserError(f"--{name} must be 1 to {_MOST:,}")
    if arguments.results and arguments.what != "plot":
        raise UserError(f"files of results are for plot, not for {arguments.what}")
    if arguments.what == "training" and not arguments.data:
        raise UserError("training needs --data: a folder of pictures with metadata.jsonl")
    if arguments.what == "plot":
        return _plot(arguments.results, arguments.plot)
    if arguments.what == "parts":
        return _parts(arguments)
    return _more(arguments)


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parts", "plot", "rows", "arrivals", "training"))
    parser.add_argument("results", nargs="*", type=Path, help="of plot: what parts has written")
    parser.add_argument(
        "--model", help="a diffusers folder, or of parts sd15, sdxl (default: the bundled model)"
    )
    parser.add_argument("--precision", nargs="+", choices=("no", "bf16", "fp16"), default=["bf16"])
    parser.add_argument(
        "--pictures", nargs="+", type=int, help="at once (default: 1, rows and arrivals 8, training 16)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="that count, after one to warm up (default: 7)")
    parser.add_argument(
        "--output", type=Path, help="results of parts (runs/benchmark/MODEL.json), plot of arrivals"
    )
    parts = parser.add_argument_group("of parts")
    parts.add_argument("--part", nargs="+", choices=_PARTS, default=_PARTS)
    parts.add_argument("--steps", type=int, help="of a picture (default: the model's own, else 20)")
    parts.add_argument(
        "--contenders", nargs="+", default=(), metavar="WORD", help="only those with such a word"
    )
    parts.add_argument("--compile", action="store_true", help="torch.compile on a CPU too: minutes for sd15")
    parts.add_argument("--apart", action="store_true", help="load one contender at a time: less memory")
    parts.add_argument("--profile", action="store_true", help="where the time goes, by kind of operator")
    parts.add_argument("--plot", type=Path, help="a picture of the results; needs matplotlib")
    more = parser.add_argument_group("of rows, arrivals and training")
    more.add_argument("--data", type=Path, help="of training: a folder of pictures with metadata.jsonl")
    more.add_argument("--rows", type=int, help="how many rows (default: 48), or arrivals at each load (60)")
    more.add_argument(
        "--mixed", action="store_true", help="of rows: of three samplers, four numbers of steps, ..."
    )
    return parser


def _parts(arguments: Any) -> int:
    from benchmarks.comparison import Wanted, read, run
    from benchmarks.speed_report import plot, table
    from ldm.evaluation.timing import machine

    label, model = _model(arguments.model)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    wanted = Wanted(
        label,
        model,
        arguments.part,
        arguments.pictures or [1],
        arguments.precision,
        arguments.rounds,
        arguments.steps or index.get("num_inference_steps", 20),
        compiled=arguments.compile,
        apart=arguments.apart,
        profile=arguments.profile,
        only=arguments.contenders,
    )
    output = arguments.output or _MADE / f"{label}.json"
    print(f"{machine()}\n", flush=True)
    for found in run(wanted, output):
        print(f"{table(found)}\n", flush=True)
    print(f"Results: {printable(str(output))}")
    if arguments.plot:
        plot([read(output)], arguments.plot)
    return 0


def _plot(results: list[Path], path: Path | None) -> int:
    from benchmarks.comparison import read
    from benchmarks.speed_report import plot, table

    if not results:
        raise UserError("plot needs files of results, such as runs/benchmark/bundled.json")
    kept = [read(each) for each in results]
    for each in kept:
        print(f"{each['machine']}\n")
        for found in each["measurements"]:
            print(f"{table(found)}\n")
    if path:
        plot(kept, path)
    return 0


def _model(name: str | None) -> tuple[str, Path]:
    """What to call the model, and its folder; a system of random weights is made where it isn't there."""
    from benchmarks.true_sizes import FAMILY_OF, true_size
    from ldm.system import System, bundled_model
    from ldm.system.few_steps import read_few_steps

    if name is None or name == "bundled":
        return "bundled", bundled_model()
    if name in FAMILY_OF and not Path(name).exists():
        return name, true_size(name, _MADE)
    if read_few_steps(Path(name)):  # diffusers draws with a whole folder
        whole = _MADE / f"{Path(name).resolve().parent.name}-fast"
        System.load(name).save(whole)
        return whole.name, whole
    if not (Path(name) / "model_index.json").is_file():
        raise UserError(f"--model {name} is no diffusers folder: it has no model_index.json")
    return Path(name).resolve().name, Path(name).resolve()


def _more(arguments: Any) -> int:
    from ldm.evaluation.timing import compare, machine, table

    label, model = _model(arguments.model)
    if len(arguments.precision) > 1 or len(arguments.pictures or [1]) > 1:
        raise UserError(f"{arguments.what} takes one --precision and one number of --pictures at a time")
    precision, pictures = arguments.precision[0], (arguments.pictures or [None])[0]
    print(f"{arguments.what}, {printable(label)}, precision {precision}; {machine()}\n")
    if arguments.what == "rows":
        from benchmarks.rows import contenders

        count = arguments.rows or 48
        works, psnr = contenders(model, count, arguments.mixed, precision, pictures or 8)
        kind = "mixed" if arguments.mixed else "alike"
        print(f"{count} rows, {kind}, up to {pictures or 8} pictures together\n")
        print(table(compare(works, arguments.rounds), "diffusers, a loop", "pictures"))
        print(f"\nPSNR between ours and the loop: {psnr:.1f} dB")
        return 0
    if arguments.what == "arrivals":
        from benchmarks.arrivals import report

        output = arguments.output or Path("benchmarks/arrivals.png")
        print(report(model, arguments.rows or 60, precision, pictures or 8, output))
        return 0
    from benchmarks.training import contenders

    with tempfile.TemporaryDirectory() as folder:
        works = contenders(Path(folder), model, arguments.data, pictures or 16, precision)
        print(table(compare(works, arguments.rounds), "diffusers", "pictures"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
