"""Draw pictures from prompts on the command line: `ldm-generate "a raccoon astronaut"`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.console import command, line, note, say
from ldm.errors import UserError
from pipelines.options import LOADING, parser, settings_of

if TYPE_CHECKING:
    from pipelines.recipe import Recipe


@command(memory="draw smaller pictures, or fewer at once (--batch-size), or --low-memory")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on standard error, or 130 where Ctrl-C stopped it."""
    _generate(parser().parse_args(argv))
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    from pipelines import jobs
    from pipelines.files import check_target
    from pipelines.named_files import weighed
    from pipelines.recipe import MOST, Recipe, shown
    from pipelines.uses import EmbeddingUse, LoRAUse

    for name in ("num_images", "batch_size", "columns"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
    folders = arguments.lora_folder or []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--lora-folder {folder}: no such folder")
    settings = settings_of(arguments)
    wanted = [jobs.Job(Recipe(prompt, **settings)) for prompt in arguments.prompts]
    if arguments.file:
        wanted += jobs.read_prompts(arguments.file, settings)
    expected = None
    loras = tuple(LoRAUse(*weighed(each)) for each in arguments.lora or ())
    embeddings = tuple(EmbeddingUse(each) for each in arguments.embedding or ())
    if arguments.trust and not arguments.from_image:
        raise UserError("--trust is of what a picture names: give it with --from-image")
    if arguments.from_image:
        old = _from_image(arguments, {"loras": loras, "embeddings": embeddings, **settings})
        expected = old.model_hash
        loras, embeddings = loras or old.loras, embeddings or old.embeddings
        for name in ("model", "variant", "prediction_type", "dtype", "quantization"):
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
