"""Draw by class on the command line: `ldm-classes --model runs/lectures/ddpm-digits/export 7 3 --guidance 2`."""

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from ldm import __version__
from ldm.console import Parser, command, line
from ldm.errors import UserError

_DIGITS = 18  # of a number; with more it is a name, or nothing
_LONGEST = 60  # characters of a class in a file's name
_EXAMPLES = """\
examples:
  %(prog)s --model FOLDER                              a sheet of every class
  %(prog)s --model FOLDER 7 cat --count 8 --guidance 3
  %(prog)s --model FOLDER 7 --separate --out digits    a file each
"""


def parser() -> Parser:
    """Build the argument parser."""
    parser = Parser(
        prog="ldm-classes",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("classes", nargs="*", metavar="CLASS", help="names or numbers (default: every class)")
    add("--model", required=True, metavar="FOLDER", help="a system without text, as training writes it")
    add("--count", type=int, default=1, metavar="N", help="pictures of each class (1)")
    add("--seed", type=int, default=0, help="of the first picture; the others have those that follow (0)")
    add("--steps", type=int, metavar="N", help="of the sampler (50)")
    add("--guidance", type=float, default=1.0, metavar="X", help="1 is none (1)")
    add("--sampler", help="default: the model's own")
    add("--scale", type=int, default=1, metavar="N", help="pixels shown for one, along each side (1)")
    add("--separate", action="store_true", help="a file each, in place of one sheet")
    add("--out", type=Path, default=Path("outputs"), metavar="PATH", help="a .png, or a folder (outputs)")
    add("--device", help="cpu, cuda, ... (default: what there is)")
    add("--version", action="version", version=__version__)
    return parser


@command(memory="draw fewer at once (--count)")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with a line on standard error."""
    arguments = parser().parse_args(argv)
    if not 1 <= arguments.scale <= 64:
        raise UserError("--scale must be 1 to 64")

    from ldm.files import write_bytes
    from ldm.pictures import grid, png
    from pipelines.class_to_image import STEPS, ClassToImagePipeline
    from pipelines.files import check_target, save_new

    check_target(arguments.out, 2 if arguments.separate else 1)
    pipe = ClassToImagePipeline.from_pretrained(arguments.model, device=arguments.device)
    named = [_named(each, pipe.classes) for each in arguments.classes]
    drawn = pipe(
        named or None,
        num_images=arguments.count,
        seed=arguments.seed,
        num_inference_steps=STEPS if arguments.steps is None else arguments.steps,
        guidance_scale=arguments.guidance,
        sampler=arguments.sampler,
    )
    by = arguments.scale
    pictures = [each.resize((each.width * by, each.height * by), 0) for each in drawn.images]
    if not arguments.separate:
        rows = [k for k, number in enumerate(drawn.classes) if number != drawn.classes[0]]
        columns = arguments.count if rows else min(len(pictures), 10)
        pictures = [grid(pictures, columns)]
    for k, picture in enumerate(pictures):
        if arguments.out.suffix.lower() == ".png":
            write_bytes(arguments.out, png(picture))
            line(str(arguments.out))
            continue
        number = drawn.classes[k] if arguments.separate else None
        name = "sheet" if number is None else _file_name(pipe.classes, number)
        stem = f"{name}-{drawn.seeds[k]}" if arguments.separate else f"{name}-{arguments.seed}"
        names = (f"{stem}.png" if n == 1 else f"{stem}-{n}.png" for n in count(1))
        line(str(save_new(png(picture), arguments.out, names)))
    return 0


def _named(given: str, classes: Sequence[str]) -> str | int:
    """A class as it was given: by its name, or by its number."""
    number = given.isascii() and given.isdecimal() and len(given) <= _DIGITS
    return int(given) if number and given not in classes else given


def _file_name(classes: Sequence[str], number: int) -> str:
    """What a class's file is called: a name in a stranger's folder may be a path to anywhere, or have any length."""
    name = re.sub(r"[^\w.]+", "-", classes[number] if classes else "")[:_LONGEST].strip("-.")
    return name or f"class-{number}"


if __name__ == "__main__":
    sys.exit(main())
