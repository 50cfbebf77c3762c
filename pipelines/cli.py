"""Draw pictures from prompts on the command line: `ldm-generate "a raccoon astronaut"`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.console import command, line, note, say
from ldm.errors import UserError
from pipelines.options import LOADING, parser, settings_of

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.uses import EmbeddingUse, LoRAUse


@command(memory="draw smaller pictures, or fewer at once (--batch-size), or --low-memory")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on standard error, or 130 where Ctrl-C stopped it."""
    arguments = parser().parse_args(argv)
    if arguments.interpolate is not None:
        _interpolate(arguments)
    else:
        _generate(arguments)
    return 0


_DIGITS = 100  # of a seed: enough to be refused as too large
# What --interpolate has no use for: it makes one strip, from noise, under one prompt.
_NOT_BETWEEN = (
    *("file", "from_image", "trust", "grid", "columns", "seed", "preview", "lora_folder"),
    "infotext",
    *("image", "mask", "outpaint", "control", "ip_adapter", "clip_model", "upscaler", "hires_upscaler"),
)


def _interpolate(arguments: argparse.Namespace) -> None:
    from pipelines.interpolation import check_path, save

    for name in _NOT_BETWEEN:
        given = getattr(arguments, name)
        if given is not None and given is not False and given != []:
            raise UserError(f"--{name.replace('_', '-')} does not go with --interpolate: leave it out")
    if len(arguments.prompts) != 1 or arguments.num_images != 1:
        raise UserError("--interpolate goes between pictures of one prompt: give one, and no --num-images")
    if arguments.batch_size != 1:
        raise UserError("--batch-size does not go with --interpolate: leave it out")
    ends = [each.strip() for each in arguments.interpolate.split(",")]
    seeds = [int(each[:_DIGITS]) for each in ends if each.isdecimal()]
    if seeds and len(seeds) < len(ends):
        raise UserError(
            f"--interpolate {arguments.interpolate}: give seeds, or pictures, separated by commas"
        )
    out = arguments.out or _unused(Path("outputs"))
    check_path(out)
    settings, (loras, embeddings) = settings_of(arguments), _named(arguments)
    pipe = _load(arguments)
    for each in pipe.adapters.load_again(loras, embeddings):
        note(each)
    drawn = pipe.interpolate(
        arguments.prompts[0],
        seeds=seeds,
        images=None if seeds else ends,
        frames=8 if arguments.frames is None else arguments.frames,
        method=arguments.interpolation or "slerp",
        progress=not arguments.quiet,
        **settings,
    )
    line(str(save(drawn.images, out)))
    for each in dict.fromkeys([*pipe.notes, *drawn.notes]):
        note(each)


def _unused(folder: Path) -> Path:
    """A strip's file that is not there yet: nothing is written over but what the user named."""
    names = (f"interpolation{f'-{n}' if n > 1 else ''}.png" for n in count(1))
    return next(path for name in names if not (path := folder / name).exists())


def _named(arguments: argparse.Namespace) -> "tuple[tuple[LoRAUse, ...], tuple[EmbeddingUse, ...]]":
    """The LoRAs and the new words of the options. Raises UserError."""
    from pipelines.named_files import weighed
    from pipelines.uses import EmbeddingUse, LoRAUse

    loras = tuple(LoRAUse(*weighed(each)) for each in arguments.lora or ())
    return loras, tuple(EmbeddingUse(each) for each in arguments.embedding or ())


def _generate(arguments: argparse.Namespace) -> None:
    from pipelines import jobs
    from pipelines.files import check_target
    from pipelines.recipe import MOST, Recipe, shown

    for name in ("num_images", "batch_size", "columns"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
    for name in ("frames", "interpolation"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is of --interpolate: give that too")
    folders = arguments.lora_folder or []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--lora-folder {folder}: no such folder")
    settings = settings_of(arguments)
    wanted = [jobs.Job(Recipe(prompt, **settings)) for prompt in arguments.prompts]
    if arguments.file:
        wanted += jobs.read_prompts(arguments.file, settings)
    expected = None
    loras, embeddings = _named(arguments)
    if arguments.trust and not arguments.from_image:
        raise UserError("--trust is of what a picture names: give it with --from-image")
    if arguments.from_image:
        old = _from_image(arguments, {"loras": loras, "embeddings": embeddings, **settings})
        expected = old.model_hash
        loras, embeddings = loras or old.loras, embeddings or old.embeddings
        own = (
            "model",
            "variant",
            "prediction_type",
            "fast",
        )  # of that model, and of no other that the user names
        for name in (*(own if arguments.model is None else ()), "dtype", "quantization"):
            setattr(arguments, name, getattr(arguments, name) or getattr(old, name))
        wanted.append(jobs.Job(replace(old, **settings)))
    if not wanted:
        raise UserError("there is no prompt: give one or more, a --file, or --from-image (see --help)")
    total = len(wanted) * arguments.num_images
    if total > MOST:
        raise UserError(f"{shown(total)} pictures are more than the {MOST:,} of one run")
    out = arguments.out or Path("outputs")
    check_target(out, total)
    taken = {out.resolve(): "the picture"}
    for name in ("grid", "preview"):
        if (path := getattr(arguments, name)) is None:
            continue
        check_target(path, 1, folder=False)
        if path.resolve() in taken:
            raise UserError(
                f"{path} can't be both {taken[path.resolve()]} and the {name}: give --{name} another name"
            )
        taken[path.resolve()] = f"the {name}"

    pipe = _load(arguments)
    if expected and expected != pipe.system.fingerprint:
        note(f"{arguments.from_image} was drawn by other weights ({expected})")
    notes = pipe.adapters.load_again(loras, embeddings)
    notes += pipe.load_for([each.recipe for each in wanted], folders)
    for each in notes:
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
        arguments.infotext,
        arguments.preview,
    )
    for each in dict.fromkeys([*pipe.notes, *notes]):
        note(each)


def _from_image(arguments: argparse.Namespace, mine: Mapping[str, Any]) -> "Recipe":
    """The recipe in a picture, which may be a stranger's, without what the user named in place of its files.

    mine: what the user said. Raises UserError for what may not be loaded.
    """
    from pipelines import trust
    from pipelines.again import read_again

    path = arguments.from_image
    again = read_again(path, arguments.lora_folder or [])
    for each in again.notes:
        note(each)
    left = again.recipe if arguments.model is None else replace(again.recipe, model=None)
    # By the user: not the picture's any more.
    nothing: dict[str, Any] = {"image": None, "mask_image": None, "upscaler": None, "hires_upscaler": None}
    nothing["clip_model"] = None
    nothing |= dict.fromkeys(("loras", "embeddings", "controls", "image_prompts"), ())
    stated = [name for name, value in mine.items() if name in nothing and value != ()]  # None is a choice too
    left = replace(left, **{name: nothing[name] for name in stated})
    if again.foreign:  # its LoRAs are of the folders that the user gave
        left = replace(left, loras=())
    loaded = trust.check(left, path, arguments.trust or ())
    if loaded:
        say(f"{path} has loaded: {loaded}")
    return again.recipe


def _load(arguments: argparse.Namespace) -> Any:
    import torch

    from pipelines import TextToImagePipeline

    return TextToImagePipeline.from_pretrained(
        arguments.model,
        torch_dtype=arguments.dtype and getattr(torch, arguments.dtype),
        device=arguments.device,
        **{name: getattr(arguments, name) for name in LOADING},
    )


if __name__ == "__main__":
    sys.exit(main())
