"""Draw pictures from prompts on the command line: `ldm-generate "a raccoon astronaut"`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.console import Parser, command, line, note, say
from ldm.errors import UserError

_EXAMPLES = """\
examples:
  %(prog)s "a raccoon astronaut"
  %(prog)s "a fox" "an owl" --num-images 4 --seed 0 --grid outputs/grid.png
  %(prog)s --file prompts.jsonl --batch-size 8         a row: {"prompt": "a fox", "seed": 7, "guidance_scale": 3}
  %(prog)s --model path/to/sd15.safetensors "a castle" --sampler dpmpp_2m --steps 25
  %(prog)s "a castle" --model sd15.safetensors --lora style.safetensors:0.8 --lora more.safetensors
  %(prog)s "a fox in the snow" --image fox.png --strength 0.6
  %(prog)s "a fox with a hat" --image fox.png --mask hat.png             white is drawn anew
  %(prog)s --from-image outputs/0003-a-fox.png         draws that picture again
"""
# The options that are settings of a recipe: flag, Recipe's name, type, help.
_SETTINGS: tuple[tuple[str, str, Any, str], ...] = (
    ("--negative-prompt", "negative_prompt", str, "what the picture should not show"),
    (
        "--seed",
        "seed",
        int,
        "the seed of each prompt's first picture; its next ones count up (default: random)",
    ),
    ("--steps", "num_inference_steps", int, "sampling steps (default: the model's own)"),
    ("--guidance-scale", "guidance_scale", float, "how closely to follow the prompt; 1 is unguided"),
    ("--sampler", "sampler", str, "the solver, in place of the model's own, e.g. dpmpp_2m"),
    (
        "--schedule",
        "schedule",
        str,
        "the spacing of noise levels, e.g. karras (the same range with every sampler), trailing",
    ),
    ("--height", "height", int, "pixels"),
    ("--width", "width", int, "pixels"),
    (
        "--strength",
        "strength",
        float,
        "how much of --image is drawn anew, 0 to 1 (default 0.8; with --mask 1)",
    ),
    ("--guidance-rescale", "guidance_rescale", float, "0 to 1, against over-exposure"),
    ("--eta", "eta", float, "noise of ddim, 0 to 1"),
    ("--clip-skip", "clip_skip", int, "how many more of CLIP's last layers to leave out"),
)


def parser() -> Parser:
    """Build the argument parser."""
    parser = Parser(
        prog="ldm-generate",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument(
        "--file", type=Path, help="prompts from a file: one a line, or .jsonl with settings a row"
    )
    parser.add_argument(
        "--from-image", type=Path, metavar="PNG", help="draw a picture of this program's again"
    )
    parser.add_argument("--image", type=Path, metavar="PATH", help="a picture to draw from")
    parser.add_argument(
        "--mask", type=Path, metavar="PATH", help="of its size: draw anew what is white, keep the rest"
    )
    parser.add_argument(
        "--trust",
        action="append",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="load what the picture of --from-image names where it lies in this folder (alone: anywhere on this disk)",
    )
    parser.add_argument(
        "--model", help="a diffusers folder, a single file or a hub id (default: the bundled model)"
    )
    parser.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="pictures drawn at once (default 1)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="a .png for one picture, else a folder (outputs)"
    )
    parser.add_argument("--grid", type=Path, metavar="PNG", help="also put all pictures on one sheet")
    parser.add_argument(
        "--columns", type=int, metavar="N", help="of the grid (default: --num-images, or squarest)"
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:WEIGHT]",
        help="a LoRA in diffusers' or kohya's layout (several: once each)",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        metavar="PATH",
        help="new words of textual inversion (several: once each)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: what there is)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="precision (default: float32)"
    )
    parser.add_argument("--variant", help="weights with this word in their file names, e.g. fp16")
    parser.add_argument("--prediction-type", help="epsilon or v_prediction, where a single file does not say")
    parser.add_argument(
        "--low-memory", action="store_true", default=None, help="parts rest on the CPU between uses"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--version", action="version", version=__version__)
    for flag, name, kind, text in _SETTINGS:
        parser.add_argument(flag, dest=name, type=kind, help=text)
    return parser


@command(memory="draw smaller pictures, or fewer at once (--batch-size), or --low-memory")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on standard error, or 130 where Ctrl-C stopped it."""
    _generate(parser().parse_args(argv))
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    from pipelines import jobs, trust
    from pipelines.files import check_target
    from pipelines.originals import use_of
    from pipelines.recipe import MOST, Recipe, read_recipe, shown
    from pipelines.uses import EmbeddingUse, LoRAUse

    settings = {
        name: getattr(arguments, name) for _, name, _, _ in _SETTINGS if getattr(arguments, name) is not None
    }
    for name, path in (("image", arguments.image), ("mask_image", arguments.mask)):
        if path is not None:
            settings[name] = use_of(path, name)[0]
    for name in ("num_images", "batch_size", "columns"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
    wanted = [jobs.Job(Recipe(prompt, **settings)) for prompt in arguments.prompts]
    if arguments.file:
        wanted += jobs.read_prompts(arguments.file, settings)
    expected = None
    loras = tuple(LoRAUse(*_weighed(each)) for each in arguments.lora or ())
    embeddings = tuple(EmbeddingUse(each) for each in arguments.embedding or ())
    if arguments.trust and not arguments.from_image:
        raise UserError("--trust is of what a picture names: give it with --from-image")
    if arguments.from_image:
        old = read_recipe(arguments.from_image)
        expected = old.model_hash
        mine = {"model": arguments.model, "loras": loras, "embeddings": embeddings, **settings}
        # By the user: not the picture's any more.
        named = {"model": None, "loras": (), "embeddings": (), "image": None, "mask_image": None}
        left = replace(old, **{name: none for name, none in named.items() if mine.get(name)})
        loaded = trust.check(left, arguments.from_image, arguments.trust or ())
        if loaded:
            say(f"{arguments.from_image} has loaded: {loaded}")
        loras, embeddings = loras or old.loras, embeddings or old.embeddings
        for name in ("model", "variant", "prediction_type", "dtype"):
            setattr(arguments, name, getattr(arguments, name) or getattr(old, name))
        wanted.append(jobs.Job(replace(old, **settings)))
    if not wanted:
        raise UserError("there is no prompt: give one or more, a --file, or --from-image (see --help)")
    total = len(wanted) * arguments.num_images
    if total > MOST:
        raise UserError(f"{shown(total)} pictures are more than the {MOST:,} of one run")
    out = arguments.out or Path("outputs")
    check_target(out, total)
    if arguments.grid:
        check_target(arguments.grid, 1, folder=False)
        if arguments.grid.resolve() == out.resolve():
            raise UserError(f"{out} can't be both the picture and the grid: give --grid another name")

    pipe = _load(arguments)
    if expected and expected != pipe.system.fingerprint:
        note(f"{arguments.from_image} was drawn by other weights ({expected})")
    for each in pipe.adapters.load_again(loras, embeddings):
        note(each)
    columns = arguments.columns or (arguments.num_images if arguments.num_images > 1 else None)
    notes = jobs.run(
        pipe,
        wanted,
        out,
        arguments.batch_size,
        arguments.grid,
        columns,
        not arguments.quiet,
        lambda path: line(str(path)),
        arguments.num_images,
    )
    for each in notes:
        note(each)


def _weighed(text: str) -> tuple[str, float]:
    """PATH[:WEIGHT]; what follows the last colon is part of the path where it is no number."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _load(arguments: argparse.Namespace) -> Any:
    import torch

    from pipelines import TextToImagePipeline

    return TextToImagePipeline.from_pretrained(
        arguments.model,
        torch_dtype=getattr(torch, arguments.dtype or "float32"),
        device=arguments.device,
        variant=arguments.variant,
        prediction_type=arguments.prediction_type,
        low_memory=arguments.low_memory,
    )


if __name__ == "__main__":
    sys.exit(main())
