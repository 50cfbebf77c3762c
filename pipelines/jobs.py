"""Batch generation: recipes from prompts, files and rows; every picture into its file as soon as it is drawn."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm.checkpoints.files import write_bytes
from ldm.config import to_dict
from ldm.errors import UserError
from ldm.pictures import grid, grid_size, png
from pipelines.crowd import Drawn
from pipelines.drawing import Drawing
from pipelines.files import save_picture
from pipelines.limits import check_seed
from pipelines.named_files import row_loras, row_settings
from pipelines.recipe import MOST, Recipe
from pipelines.rows import place, read_rows
from pipelines.text_to_image import TextToImagePipeline
from pipelines.uses import LoRAUse

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Job:
    """A recipe to draw.

    where: it stands, for messages: a file and its line. loras: that it asks for beside its prompt.
    """

    recipe: Recipe
    where: str = ""
    loras: tuple[LoRAUse, ...] = ()


def read_prompts(path: str | Path, settings: Mapping[str, Any]) -> list[Job]:
    """The jobs of a file of rows (see `read_rows`), as many of each as its `count` says, whose seeds count up.

    settings: what holds for every row that does not say otherwise. Raises UserError that names the first line, or row,
    with a mistake.
    """
    shared, folder, jobs = to_dict(settings), Path(path).parent, list[Job]()
    for row in read_rows(path):
        where = place(path, row)
        if row.error:
            raise UserError(_complaint(where, row.error))
        try:
            own = row_settings(row.settings, folder)
            loras = tuple(row_loras(own.pop("loras", None) or (), folder))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        recipe = Recipe.parse({**shared, **own}, where)
        seeds = [None if recipe.seed is None else recipe.seed + k for k in range(row.count)]
        jobs += [Job(replace(recipe, seed=seed), where, loras) for seed in seeds]
        if len(jobs) > MOST:
            raise UserError(f"{path} asks for more than the {MOST:,} pictures of one run: split it")
    return jobs


def _complaint(where: str, error: str) -> str:
    """What is wrong with a row, of which a message that begins with "it is" speaks."""
    return f"{where}{error.removeprefix('it')}" if error.startswith("it is ") else f"{where}: {error}"


def several(drawings: Iterable[Drawing], count: int) -> Iterator[Drawing]:
    """`count` of each, one by one, with seeds that follow its own, or drawn at random where it has none."""
    for drawing in drawings:
        seed = drawing.recipe.seed
        for k in range(count):
            own = secrets.randbelow(2**32) if seed is None else seed + k
            yield replace(drawing, recipe=replace(drawing.recipe, seed=own))


def run(
    pipe: TextToImagePipeline,
    jobs: Sequence[Job],
    out: Path,
    batch_size: int = 1,
    grid_path: Path | None = None,
    columns: int | None = None,
    progress: bool = True,
    saved: Callable[[Path], None] = lambda path: None,
    count: int = 1,
    infotext: bool = False,
    preview: Path | None = None,
) -> list[str]:
    """Draw `count` pictures of each job into `out`, each batch as soon as it is done, then a grid of all of them.

    Returns the notes.

    Every recipe is checked before the first is drawn, so that a mistake in the last row costs nothing. `saved` is
    called with every file that is written. infotext: see `save_picture`. preview: a `.png` that is written
    over after each prediction, as the picture comes to be. Raises UserError.
    """
    ready: list[Drawing] = []
    for job in jobs:
        ready.append(_complete(pipe, job, count, ready[-1] if ready else None))
    recipes = [each.recipe for each in ready]
    total = len(recipes) * count
    columns = columns or max(1, round(total**0.5))
    if grid_path:
        if len({(recipe.width, recipe.height) for recipe in recipes}) > 1:
            raise UserError(
                "a grid needs pictures of one size: leave --grid out, or give all rows one height and width"
            )
        grid_size(total, columns, recipes[0].width or 1, recipes[0].height or 1)
    notes: dict[str, None] = {}
    pictures: list[Image] = []
    written = 0

    def save(done: Drawn) -> None:
        assert done.image is not None
        saved(save_picture(done.image, done.recipe, out, infotext))
        if grid_path:
            pictures.append(done.image)

    def show(place: int, latents: Tensor) -> None:
        if preview is not None:
            write_bytes(preview, png(pipe.preview(latents)[0]))

    drawings = list(several(ready, count))
    early: dict[int, Drawn] = {}  # done before one in front of them: files are numbered as rows are
    try:
        for each in pipe.draw_each(drawings, batch_size, progress, callback=show):
            if each.error is not None:
                raise each.error
            notes |= dict.fromkeys(each.notes)
            early[each.place] = each
            while written in early:
                save(early.pop(written))
                written += 1
    finally:  # also where one fails, or Ctrl-C comes: what is drawn is not lost
        for place in sorted(early):
            save(early[place])
    if grid_path:
        write_bytes(grid_path, png(grid(pictures, columns)))
        saved(grid_path)
    return list(notes)


def _complete(pipe: TextToImagePipeline, job: Job, count: int, like: Drawing | None) -> Drawing:
    """The job's drawing, complete but for a seed that is to be drawn at random for each picture."""
    seed = job.recipe.seed
    try:
        if seed is not None:
            check_seed(seed + count - 1)  # of the last picture
        drawing = pipe.complete(job.recipe, like=like, loras=pipe.adapters.named(job.loras))
    except UserError as error:
        if not job.where:
            raise
        raise UserError(f"{job.where}: {error}") from error
    # Of a long run not all pictures to draw on are held: each is read again when its turn comes.
    return replace(drawing, recipe=replace(drawing.recipe, seed=seed), canvas=None)
