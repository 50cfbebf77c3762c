"""Batch generation: recipes from prompts, files and rows; every picture into its file as soon as it is drawn."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.files import write_bytes
from ldm.errors import UserError
from ldm.foreign import parse_json, read_plain
from ldm.pictures import grid, grid_size, png
from pipelines.crowd import Drawn
from pipelines.drawing import Drawing
from pipelines.files import save_picture
from pipelines.limits import check_seed
from pipelines.named_files import row_settings
from pipelines.recipe import Recipe
from pipelines.text_to_image import TextToImagePipeline

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Job:
    """A recipe to draw, and where it stands, for messages: a file and its line."""

    recipe: Recipe
    where: str = ""


_NOT_IN_A_ROW = (
    "model",
    "variant",
    "prediction_type",
    "dtype",
    "model_hash",
    "loras",
    "embeddings",
    "version",
    "beside",
)  # of a run, not of a row


def read_prompts(path: str | Path, settings: Mapping[str, Any]) -> list[Job]:
    """One job a line: a prompt, or in a `.jsonl` file an object with `prompt` and any settings of its own.

    settings: what holds for every row that does not say otherwise. Empty lines are passed over. Raises UserError
    that names the line.
    """
    kind = Path(path).suffix.lower()
    if kind == ".json":
        raise UserError(
            f"{path}: prompts come one a line, or as .jsonl with an object a line, not as one .json"
        )
    try:
        lines = read_plain(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    rows = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no prompt")
    if kind != ".jsonl":
        return [Job(Recipe(prompt, **settings), where) for where, prompt in rows]
    return [
        Job(Recipe.parse({**settings, **_object(where, line, Path(path).parent)}, where), where)
        for where, line in rows
    ]


def _object(where: str, line: str, folder: Path) -> dict[str, Any]:
    """A row's settings; pictures that it names by a path are looked for from `folder`."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"prompt": "a fox", "seed": 1}}')
    if "steps" in row:
        raise UserError(f"{where}: 'steps' is called num_inference_steps in a row, as in Python")
    if named := [key for key in _NOT_IN_A_ROW if key in row]:
        raise UserError(f"{where}: {named[0]!r} holds for the whole run, not for a row")
    try:
        return row_settings(row, folder)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


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
) -> list[str]:
    """Draw `count` pictures of each job into `out`, each batch as soon as it is done, then a grid of all of them.

    Returns the notes.

    Every recipe is checked before the first is drawn, so that a mistake in the last row costs nothing. `saved` is
    called with every file that is written. infotext: see `save_picture`. Raises UserError.
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

    drawings = list(several(ready, count))
    early: dict[int, Drawn] = {}  # done before one in front of them: files are numbered as rows are
    try:
        for each in pipe.draw_each(drawings, batch_size, progress):
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
        drawing = pipe.complete(job.recipe, like=like)
    except UserError as error:
        if not job.where:
            raise
        raise UserError(f"{job.where}: {error}") from error
    # Of a long run not all pictures to draw on are held: each is read again when its turn comes.
    return replace(drawing, recipe=replace(drawing.recipe, seed=seed), canvas=None)
