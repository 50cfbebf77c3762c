"""Make pictures larger on the command line: `ldm-upscale outputs/*.png --scale 4`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.console import Parser, command, line, out_of_memory, say
from ldm.errors import UserError

if TYPE_CHECKING:
    from pipelines.upscaler import Upscaler

_EXAMPLES = """\
examples:
  %(prog)s outputs/0000-a-fox.png
  %(prog)s outputs --scale 2 --out large              all pictures of a folder
  %(prog)s photo.jpg --model RealESRGAN_x4plus.pth --tile 128
"""


def parser() -> Parser:
    """Build the argument parser."""
    parser = Parser(
        prog="ldm-upscale",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "pictures", nargs="+", type=Path, metavar="PICTURE", help="a picture, or a folder of some"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs"),
        metavar="PATH",
        help="a .png for one picture, else a folder (outputs)",
    )
    parser.add_argument(
        "--scale", type=float, metavar="X", help="how many times larger (default: the network's own)"
    )
    parser.add_argument(
        "--model",
        metavar="FILE",
        help="a .pth or .safetensors of ESRGAN or Real-ESRGAN (default: the bundled one)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="pixels along the side of a tile (default 256); 0: whole pictures",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: what there is)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision (default: float32)",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


@command(memory="take smaller tiles (--tile), or a smaller --scale")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with a line on standard error for each picture that failed, 130 after Ctrl-C.

    The pictures that can be enlarged are, whatever the others are.
    """
    arguments = parser().parse_args(argv)
    import torch

    from pipelines.files import check_target
    from pipelines.upscaler import TILE, Upscaler

    places = [each for given in arguments.pictures for each in _pictures(given)]
    check_target(arguments.out, len(places))
    upscaler = Upscaler.from_pretrained(
        arguments.model,
        torch_dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        tile=TILE if arguments.tile is None else arguments.tile,
    )
    failed = 0
    for place in places:
        try:
            line(str(_upscale(upscaler, place, arguments.scale, arguments.out)))
        except UserError as error:
            if out_of_memory(error):
                raise
            failed += 1
            say(f"error: {error}")
    if failed and len(places) > 1:
        say(f"{len(places) - failed} of {len(places)} pictures were enlarged")
    return 2 if failed else 0


def _pictures(place: Path) -> Iterator[Path]:
    """A file, or the picture files of a folder, sorted. Raises UserError for a folder without."""
    from ldm.checkpoints.paths import readable
    from ldm.data.listing import SUFFIXES

    with readable(place):
        if not place.is_dir():
            yield place
            return
        inside = sorted(each for each in place.iterdir() if each.suffix.lower() in SUFFIXES)
    if not inside:
        raise UserError(f"{place} holds no pictures ({', '.join(SUFFIXES)})")
    yield from inside


def _upscale(upscaler: "Upscaler", place: Path, scale: float | None, out: Path) -> Path:
    """Enlarge one picture into the file `out`, or into a new one of that folder, with its texts, such as a recipe."""
    from PIL.PngImagePlugin import PngInfo

    from ldm.checkpoints.paths import must_be_file
    from ldm.data.pictures import decode_whole
    from ldm.files import write_bytes
    from ldm.foreign import read_plain
    from ldm.pictures import png
    from pipelines.files import save_new

    must_be_file(place)
    try:
        source = decode_whole(read_plain(place))
    except (ValueError, OSError) as error:
        raise UserError(f"{place} can't be read: {error}") from error
    try:
        larger = upscaler(source.picture, scale)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    info = PngInfo()
    for name, text in source.texts.items():
        info.add_itxt(name, text)
    data = png(larger, info, source.profile)
    if out.suffix.lower() == ".png":
        write_bytes(out, data)
        return out
    stem = f"{place.stem}-x{upscaler.scale if scale is None else scale:g}"
    names = (f"{stem}.png" if n == 1 else f"{stem}-{n}.png" for n in count(1))
    return save_new(data, out, names)


if __name__ == "__main__":
    sys.exit(main())
