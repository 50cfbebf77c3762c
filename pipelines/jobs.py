"""Batch generation: recipes from prompts, files and rows; pictures into files, each written whole or not at all."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.files import write_bytes
from ldm.errors import UserError
from ldm.pictures import grid
from pipelines.recipe import Recipe
from pipelines.text_to_image import TextToImagePipeline

if TYPE_CHECKING:
    from PIL.Image import Image


def read_prompts(path: str | Path, settings: Mapping[str, Any]) -> list[Recipe]:
    """One recipe a line: a prompt, or in a `.jsonl` file an object with `prompt` and any settings of its own.

    settings: what holds for every row that does not say otherwise. Empty lines are passed over. Raises UserError
    that names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    rows = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no prompt")
    if Path(path).suffix != ".jsonl":
        return [Recipe(prompt, **settings) for _, prompt in rows]
    return [Recipe.parse({**settings, **_object(where, line)}, where) for where, line in rows]


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"prompt": "a fox", "seed": 1}}')
    return row


def several(recipes: Iterable[Recipe], count: int) -> list[Recipe]:
    """`count` pictures of each recipe, with seeds that follow its own (drawn at random where it has none)."""
    return [
        recipe if recipe.seed is None else replace(recipe, seed=recipe.seed + k)
        for recipe in recipes
        for k in range(count)
    ]


def batches(recipes: Sequence[Recipe], size: int) -> Iterator[list[tuple[int, Recipe]]]:
    """The recipes with their places, in runs that can be drawn together, of at most `size`; order is kept."""
    for _, run in groupby(enumerate(recipes), key=lambda place: place[1].batch_key()):
        members = list(run)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def run(
    pipe: TextToImagePipeline,
    recipes: Sequence[Recipe],
    paths: Sequence[Path],
    batch_size: int = 1,
    grid_path: Path | None = None,
    columns: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Draw every recipe into its path, as soon as its batch is done; then a grid of all of them.

    Every recipe is checked before the first is drawn, so that a mistake in the last row costs nothing. Returns the
    notes. Raises UserError.
    """
    recipes = [pipe.complete(recipe) for recipe in recipes]
    for recipe in recipes:
        pipe.plan(recipe)
    notes: list[str] = []
    pictures: list[Image] = []
    for batch in batches(recipes, batch_size):
        output = pipe.draw([recipe for _, recipe in batch], progress=progress)
        notes += [note for note in output.notes if note not in notes]
        for (place, _), picture, recipe in zip(batch, output.images, output.recipes, strict=True):
            write_bytes(paths[place], png(picture, recipe))
        if grid_path:
            pictures += output.images
    if grid_path:
        if len({picture.size for picture in pictures}) > 1:
            raise UserError("a grid needs pictures of one size; the single pictures are written")
        write_bytes(grid_path, png(grid(pictures, columns or _columns(len(pictures)))))
    return notes


def png(picture: "Image", recipe: Recipe | None = None) -> bytes:
    """The bytes of a PNG, with the recipe in its metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=recipe.png_info() if recipe else None)
    return buffer.getvalue()


def name_files(folder: Path, recipes: Sequence[Recipe]) -> list[Path]:
    """A file for each recipe, told apart by number: `0007-a-raccoon-astronaut.png`; no present file is taken."""
    taken = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(r"(\d+)-", path.name))]
    first = max(taken, default=-1) + 1
    return [folder / f"{first + k:04d}-{_slug(recipe.prompt)}.png" for k, recipe in enumerate(recipes)]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"


def _columns(count: int) -> int:
    """The width of the squarest grid."""
    return max(1, round(count**0.5))
