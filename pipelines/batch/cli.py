"""Draw the rows of a file on the command line: `ldm-batch rows.jsonl --out pictures`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.console import Parser, command, line, note, say
from ldm.errors import UserError
from pipelines.options import LOADING, add_model, add_settings, settings_of

if TYPE_CHECKING:
    from pipelines.batch.setup import Setup

_TEXT = """\
Draw every row of a file into a folder, with a manifest of all pictures: metadata.parquet.
Killed at any moment, the same command finishes it: every row once, and the same bytes.
"""
_EXAMPLES = """\
a row: any settings of a picture, by their names in Python, and what the file's kind can hold:
  prompts.txt      a red fox
  rows.jsonl       {"prompt": "a red fox", "seed": 7, "num_inference_steps": 20, "id": "fox", "count": 4}
                   {"prompt": "snow", "image": "fox.png", "strength": 0.6, "loras": ["ink.safetensors:0.8"]}
  rows.csv         prompt,guidance_scale,sampler     (the first line)
  rows.parquet     columns of these names
Options give what a row doesn't say. A row without a seed has one that follows from its id, or its number.

examples:
  %(prog)s prompts.txt --out pictures
  %(prog)s rows.jsonl --out pictures --workers 2 --contact-sheet
  %(prog)s rows.jsonl --out pictures --join                    on another machine that has the folder too
  %(prog)s rows.csv --out pictures --format wds                shards for webdataset
  %(prog)s prompts.txt --out pictures --wildcards words        "a {red|blue} __animal__", words/animal.txt

status: 0 where all is drawn, 1 where rows failed (the manifest says why), 2 where it could not go on
"""
_MOST = 4096  # of what is counted by an option


def parser() -> Parser:
    """Build the argument parser."""
    parser = Parser(
        prog="ldm-batch",
        usage="%(prog)s FILE --out FOLDER [options]",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("rows", type=Path, metavar="FILE", help=".jsonl, .csv, .tsv, .parquet, or text with a prompt a line")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where all of it goes")
    run = parser.add_argument_group("the run")
    add = run.add_argument
    add("--strict", action="store_true", help="stop at the first row that can't be drawn")
    add("--retry", action="store_true", help="draw rows that failed before once more")
    add("--check", action="store_true", help="look at every row, and draw nothing")
    add("--join", action="store_true", help="share the work of a run that is drawing into this folder")
    add("--together", type=int, default=8, metavar="N", help="pictures drawn at once (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes (default: what suits the machine)")
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on the machines of a Ray cluster that have the folder too",
    )
    add(
        "--format",
        choices=("files", "wds"),
        default="files",
        help="a file a picture, or shards in webdataset's layout",
    )
    add(
        "--shard",
        type=int,
        default=1024,
        metavar="N",
        help="pictures of a shard, about (default: %(default)s)",
    )
    add(
        "--wildcards",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="prompts have {variants}, and __words__ of files in this folder, chosen by the seed",
    )
    add("--contact-sheet", action="store_true", help="put small pictures of the whole run on one sheet")
    add("--plot", action="store_true", help="plot how fast it was")
    add_model(parser)
    add_settings(parser)
    return parser


@command(
    stopped="stopped: the same command goes on",
    memory="draw fewer at once (--together), by fewer --workers, or smaller pictures",
)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 where rows failed, or 2 with one line on standard error, or 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    for name in ("together", "workers", "shard"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= (_MOST if name != "shard" else 1_000_000):
            raise UserError(f"--{name} is {value}: give 1 or more, and not thousands")
    if arguments.plot:
        from ldm.figures import figure

        figure(1, 1)  # now, and not after hours
    if arguments.check:
        return _check(_setup(arguments))
    from pipelines.batch.engines import engine_named
    from pipelines.batch.run import run

    made = run(
        _setup(arguments),
        arguments.workers,
        arguments.join,
        arguments.retry,
        not arguments.quiet,
        engine_named(arguments.engine, arguments.workers),
    )
    say(made.summary)
    line(str(made.manifest))
    if arguments.contact_sheet and made.drawn:
        from pipelines.batch.views import contact_sheet

        line(str(contact_sheet(arguments.out)))
    if arguments.plot and made.drawn > 1:
        from pipelines.batch.views import throughput

        line(str(throughput(arguments.out)))
    return 1 if made.failed else 0


def _setup(arguments: argparse.Namespace) -> "Setup":
    from ldm.config import to_dict
    from pipelines.batch.setup import Setup
    from pipelines.files import whole_path
    from pipelines.limits import check_unicode
    from pipelines.named_files import weighed
    from pipelines.uses import EmbeddingUse, LoRAUse

    for folder in arguments.lora_folder or []:
        if not folder.is_dir():
            raise UserError(f"--lora-folder {folder}: no such folder")
    defaults = settings_of(arguments)
    check_unicode(to_dict(defaults), "the option ")
    return Setup(
        rows=Path(os.path.abspath(arguments.rows)),
        out=Path(os.path.abspath(arguments.out)),
        defaults=defaults,
        model=None if arguments.model is None else whole_path(arguments.model),
        dtype=arguments.dtype,
        device=arguments.device,
        **{name: getattr(arguments, name) for name in LOADING},
        loras=tuple(LoRAUse(whole_path(path), weight) for path, weight in map(weighed, arguments.lora or ())),
        lora_folders=tuple(each.resolve() for each in arguments.lora_folder or ()),
        embeddings=tuple(EmbeddingUse(whole_path(each)) for each in arguments.embedding or ()),
        together=arguments.together,
        format=arguments.format,
        shard=arguments.shard,
        infotext=arguments.infotext,
        wildcards=arguments.wildcards is not None,
        wildcard_folder=Path(arguments.wildcards).resolve() if arguments.wildcards else None,
        strict=arguments.strict,
    )


def _check(setup: "Setup") -> int:
    """Say what is wrong with rows; nothing is drawn, and nothing written that stays."""
    import tempfile
    from dataclasses import replace

    from pipelines.batch.ledger import Ledger
    from pipelines.batch.work import Work

    with tempfile.TemporaryDirectory() as folder:
        pipe = setup.load()
        ledger = Ledger(Path(folder))
        ledger.begin(setup.asked(pipe, None))
        bad = 0
        for each in Work(replace(setup, out=Path(folder)), pipe, ledger).check():
            note(each)
            bad += 1
        ledger.close()
    say(f"{ledger.asked['items']:,} pictures are asked for, {bad:,} can't be drawn")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
