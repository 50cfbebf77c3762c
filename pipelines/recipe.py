"""A recipe: everything that makes one picture, as it is asked for, kept in the PNG, and drawn again."""

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ldm import __version__
from ldm.config import from_dict
from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

KEYWORD = "ldm-recipe"  # of the PNG's text chunk
_LARGEST = 16_384  # pixels along a side
PER_IMAGE = ("prompt", "negative_prompt", "seed")  # what may differ between the images of one call


@dataclass(frozen=True)
class LoRAUse:
    """A LoRA that takes part: its file or folder as it was named, how much of it, and the file's `file_hash`."""

    path: str
    weight: float = 1.0
    hash: str | None = None


@dataclass(frozen=True)
class EmbeddingUse:
    """New words that take part: their file or folder, the token where one was given, and the file's `file_hash`."""

    path: str
    token: str | None = None
    hash: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One picture; what is None is the model's own default, and is filled in when the picture is drawn.

    The names are those of `TextToImagePipeline.__call__` and `.from_pretrained`. model is what was asked for (a path
    or a hub id; None is the bundled model), model_hash the fingerprint of the weights that drew it, without adapters,
    loras and embeddings the adapters that were loaded, version that of this package.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    height: int | None = None
    width: int | None = None
    eta: float = 0.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    clip_skip: int = 0
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    model: str | None = None
    variant: str | None = None
    prediction_type: str | None = None
    model_hash: str | None = None
    loras: tuple[LoRAUse, ...] = ()
    embeddings: tuple[EmbeddingUse, ...] = ()
    version: str | None = None

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], where: str) -> "Recipe":
        """Raises UserError for an unknown name, a wrong type or a missing prompt."""
        return from_dict(cls, mapping, where)

    def shared(self) -> tuple[Any, ...]:
        """Equal for recipes that one call can draw."""
        return tuple(getattr(self, each.name) for each in fields(self) if each.name not in PER_IMAGE)

    def png_info(self) -> "PngInfo":
        """The metadata to save a PNG with: `image.save(path, pnginfo=recipe.png_info())`."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        stated = {name: value for name, value in asdict(self).items() if value is not None}
        info.add_itxt(KEYWORD, json.dumps(stated, ensure_ascii=False))
        return info


def recipes_for(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    seed: int | Iterable[int] | None,
    images_per_prompt: int,
    settings: Mapping[str, Any],
) -> list[Recipe]:
    """The recipes of a call, prompt by prompt; see `TextToImagePipeline.__call__`. Raises UserError."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise UserError("there is no prompt: give a string, or a list of at least one")
    if images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt is {images_per_prompt}: it must be 1 or more")
    count = len(prompts) * images_per_prompt
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if len(negatives) != len(prompts):
        raise UserError(
            f"there are {len(negatives)} negative prompts for {len(prompts)} prompts: one, or one each"
        )
    seeds = _seeds(seed, count)
    if len(seeds) != count:
        raise UserError(f"there are {len(seeds)} seeds for {count} images: give one int, or one an image")
    stated = {name: _plain(value) for name, value in settings.items() if value is not None}
    shared = Recipe.parse({"prompt": "", **stated}, "the call")
    places = [k for k in range(len(prompts)) for _ in range(images_per_prompt)]
    return [
        replace(shared, prompt=prompts[k], negative_prompt=negatives[k], seed=each)
        for k, each in zip(places, seeds, strict=True)
    ]


def _seeds(seed: int | Iterable[int] | None, count: int) -> Sequence[int | None]:
    if seed is None:
        return [None] * count
    try:
        return (
            [operator.index(each) for each in seed]
            if isinstance(seed, Iterable)
            else [operator.index(seed) + k for k in range(count)]
        )
    except TypeError as error:
        raise UserError(f"the seed is {seed!r}: give an int, or one an image") from error


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as Python's own, which JSON can hold."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") else value


def check(recipe: Recipe, factor: int, is_xl: bool) -> None:
    """Raise UserError for values of a complete recipe that no picture can have, or that would change nothing.

    Sizes are multiples of `factor`; those that SDXL is told, and eta, are for nothing else than SDXL and DDIM.
    """
    for name, size in (("height", recipe.height), ("width", recipe.width)):
        if not isinstance(size, int) or not factor <= size <= _LARGEST or size % factor:
            low = min(max(int(size or 0) // factor, 1) * factor, _LARGEST - factor)
            near = f"use {low} or {low + factor}"
            raise UserError(
                f"{name} {size} is not a multiple of {factor} from {factor} to {_LARGEST}: {near}"
            )
    assert (
        recipe.guidance_scale is not None
        and recipe.num_inference_steps is not None
        and recipe.seed is not None
    )
    if recipe.num_inference_steps < 1:
        raise UserError(f"num_inference_steps is {recipe.num_inference_steps}: it must be 1 or more")
    if not math.isfinite(recipe.guidance_scale):
        raise UserError(f"guidance_scale is {recipe.guidance_scale}: give a number, commonly 1 to 15")
    for name, value in (("eta", recipe.eta), ("guidance_rescale", recipe.guidance_rescale)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}: it must be between 0 and 1")
    if recipe.eta and recipe.sampler != "ddim":
        raise UserError(f"eta is ddim's alone: {recipe.sampler} takes none")
    low, high = recipe.guidance_interval or (0.0, math.inf)
    if not low < high:
        raise UserError(f"guidance_interval is ({low}, {high}): give the lower noise level first")
    told = (recipe.original_size, recipe.target_size, recipe.crops_coords_top_left != (0, 0))
    if any(told) and not is_xl:
        raise UserError("original_size, target_size and crops_coords_top_left are for SDXL alone")
    if not -(2**63) <= recipe.seed < 2**64:
        raise UserError(f"the seed {recipe.seed} does not fit in 64 bits")
    for text in (recipe.prompt, recipe.negative_prompt or ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt {text!r} is not valid Unicode: is it in another encoding?"
            ) from error


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a PNG that this package drew. Raises UserError if there is none."""
    text = open_picture(path).info.get(KEYWORD)
    if text is None:
        raise UserError(f"{path} carries no recipe: only a PNG that this program saved can be drawn again")
    try:
        mapping = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: its recipe can't be read ({error})") from error
    try:
        return Recipe.parse(mapping, str(path))
    except UserError as error:
        version = mapping.get("version") if isinstance(mapping, dict) else None
        if version in (None, __version__):
            raise
        raise UserError(f"{error} (version {version} wrote it, this is {__version__})") from error


def open_picture(path: str | Path) -> "Image":
    """A picture file, decoded. Raises UserError."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read ({error})") from error
    return picture
