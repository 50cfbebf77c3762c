"""A recipe: everything that makes one picture, as it is asked for, kept in the PNG, and drawn again."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from ldm import __version__
from ldm.config import from_dict
from ldm.errors import UserError
from ldm.foreign import parse_json, read_plain
from ldm.pictures import open_raster
from pipelines import arguments

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

KEYWORD = "ldm-recipe"  # of the PNG's text chunk
_LARGEST = 16_384  # pixels along a side
_FARTHEST = 1_000_000  # pixels of what SDXL is told
_LONGEST = 20_000  # characters of a prompt
MOST = 1_000_000  # pictures of one call or command
PER_IMAGE = ("prompt", "negative_prompt", "seed", "beside")  # what may differ between the images of one call


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
    loras and embeddings the adapters that were loaded, version that of this package. beside: what the picture was given
    that no recipe holds (see `pipelines.given.Given`), without which it can't be drawn again.
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
    beside: tuple[str, ...] = ()

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], where: str) -> "Recipe":
        """Raises UserError for an unknown name, a wrong type or a missing prompt."""
        return from_dict(cls, mapping, where)

    def shared(self) -> tuple[Any, ...]:
        """Equal for recipes that one call can draw."""
        return tuple(getattr(self, each.name) for each in fields(self) if each.name not in PER_IMAGE)

    def sizes(self) -> tuple[int, ...] | None:
        """The six numbers that SDXL is told (see `Condition.time_ids`), of a complete recipe; None for other models."""
        if not (self.original_size and self.target_size):
            return None
        return (*self.original_size, *self.crops_coords_top_left, *self.target_size)

    def png_info(self) -> "PngInfo":
        """The metadata to save a PNG with: `image.save(path, pnginfo=recipe.png_info())`."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        stated = {name: value for name, value in asdict(self).items() if value is not None}
        info.add_itxt(KEYWORD, json.dumps(stated, ensure_ascii=False))
        return info


def recipes_for(
    prompt: str | Iterable[str] | None,
    negative_prompt: str | Iterable[str | None] | None,
    seed: SupportsIndex | Iterable[SupportsIndex] | None,
    images_per_prompt: SupportsIndex,
    settings: Mapping[str, Any],
) -> list[Recipe]:
    """Make the recipes of a call, prompt by prompt; see `TextToImagePipeline.__call__`. Raises UserError."""
    prompts = [] if prompt is None else arguments.texts(prompt, "prompt")
    if not prompts:
        raise UserError("there is no prompt: give a string, or a list of at least one")
    each_prompt = arguments.whole_number(images_per_prompt, "num_images_per_prompt")
    if each_prompt < 1:
        raise UserError(f"num_images_per_prompt is {shown(each_prompt)}: it must be 1 or more")
    count = len(prompts) * each_prompt
    if count > MOST:
        raise UserError(f"{shown(count)} pictures are more than the {MOST:,} of one call")
    negatives = _negatives(negative_prompt, len(prompts))
    seeds = _seeds(seed, count)
    stated = {name: arguments.plain(value) for name, value in settings.items() if value is not None}
    shared = Recipe.parse({"prompt": "", **stated}, "the call")
    places = [k for k in range(len(prompts)) for _ in range(each_prompt)]
    return [
        replace(shared, prompt=prompts[k], negative_prompt=negatives[k], seed=each)
        for k, each in zip(places, seeds, strict=True)
    ]


def _negatives(given: str | Iterable[str | None] | None, count: int) -> Sequence[str | None]:
    if given is None:
        return [None] * count
    negatives = arguments.texts(given, "negative_prompt", most=count, gaps=True)
    if arguments.is_single(given):
        return negatives * count
    if len(negatives) != count:
        raise UserError(
            f"there are {_said(negatives, given, count)} negative prompts for {count} prompts: one, or one each"
        )
    return negatives


def _seeds(given: SupportsIndex | Iterable[SupportsIndex] | None, count: int) -> Sequence[int | None]:
    if given is None:
        return [None] * count
    seeds = arguments.whole_numbers(given, "seed", most=count)
    if arguments.is_single(given):
        return [seeds[0] + k for k in range(count)]
    if len(seeds) != count:
        raise UserError(
            f"there are {_said(seeds, given, count)} seeds for {count} images: give one int, or one an image"
        )
    return seeds


def _said(found: Sequence[Any], given: Any, count: int) -> str:
    """How many were given; of an iterator no more was read than shows that they are too many."""
    return f"more than {count}" if len(found) > count and not hasattr(given, "__len__") else str(len(found))


def check(recipe: Recipe, factor: int, is_xl: bool) -> None:
    """Raise UserError for values of a complete recipe that no picture can have, or that would change nothing.

    Sizes are multiples of `factor`; those that SDXL is told, and eta, are for nothing else than SDXL and DDIM.
    """
    for name, size in (("height", recipe.height), ("width", recipe.width)):
        if not isinstance(size, int) or not factor <= size <= _LARGEST or size % factor:
            low = min(max(int(size or 0) // factor, 1) * factor, _LARGEST - factor)
            near = f"use {low} or {low + factor}"
            raise UserError(
                f"{name} {shown(size)} is not a multiple of {factor} from {factor} to {_LARGEST}: {near}"
            )
    assert (
        recipe.guidance_scale is not None
        and recipe.num_inference_steps is not None
        and recipe.seed is not None
    )
    if recipe.num_inference_steps < 1:
        raise UserError(f"num_inference_steps is {shown(recipe.num_inference_steps)}: it must be 1 or more")
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
    if not 0 <= recipe.clip_skip <= 1000:
        raise UserError(
            f"clip_skip is {shown(recipe.clip_skip)}: give 0, or how many more layers to leave out"
        )
    check_seed(recipe.seed)
    _check_told(recipe, is_xl)
    _check_texts(recipe)


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that no generator takes."""
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"the seed {shown(seed)} does not fit in 64 bits")


def _check_told(recipe: Recipe, is_xl: bool) -> None:
    """The sizes that SDXL is told."""
    told = (recipe.original_size, recipe.target_size, recipe.crops_coords_top_left != (0, 0))
    if any(told) and not is_xl:
        raise UserError("original_size, target_size and crops_coords_top_left are for SDXL alone")
    for name in ("original_size", "target_size", "crops_coords_top_left"):
        for pixels in getattr(recipe, name) or ():
            if not 0 <= pixels <= _FARTHEST:
                raise UserError(f"{name} has {shown(pixels)} pixels: give 0 to {_FARTHEST:,}")


def _check_texts(recipe: Recipe) -> None:
    for text in (recipe.prompt, recipe.negative_prompt or ""):
        if len(text) > _LONGEST:  # before anything else reads it
            raise UserError(
                f"the prompt {text[:24].strip()!r}... has {len(text):,} characters, where {_LONGEST:,} are the most: "
                "shorten it"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt {text[:100]!r} is not valid Unicode: is it in another encoding?"
            ) from error


def shown(number: float | None) -> str:
    """A number in a message; of one of very many digits, how many those are (Python writes no 5,000 of them)."""
    if not isinstance(number, int) or abs(number) < 10**30:
        return str(number)
    return f"of about {round(number.bit_length() * math.log10(2)):,} digits"


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a PNG that this package drew. Raises UserError if there is none."""
    text = open_picture(path).info.get(KEYWORD)
    if text is None:
        raise UserError(f"{path} carries no recipe: only a PNG that this program saved can be drawn again")
    mapping = parse_json(text, f"{path}: its recipe")
    try:
        return Recipe.parse(mapping, str(path))
    except UserError as error:
        version = mapping.get("version") if isinstance(mapping, dict) else None
        if version in (None, __version__):
            raise
        raise UserError(f"{error} (version {version} wrote it, this is {__version__})") from error


def open_picture(path: str | Path) -> "Image":
    """A PNG file, decoded. Raises UserError."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = open_raster(read_plain(path), ["PNG"])
        picture.load()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no picture that can be read (it is no PNG)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read ({error})") from error
    return picture
