"""A recipe: everything that makes one picture, as it is asked for, kept in the PNG, and drawn again."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, get_args

from ldm import __version__
from ldm.conditioning.prompts.weighted import Emphasis, Syntax
from ldm.config import from_dict
from ldm.errors import UserError
from ldm.foreign import parse_json, read_plain
from ldm.models.quantization import Quantization
from ldm.pictures import open_raster
from pipelines import arguments
from pipelines.canvas import MaskContent, ResizeMode
from pipelines.uses import CLIPUse, ControlUse, EmbeddingUse, ImagePromptUse, LoRAUse, PictureUse, UpscalerUse

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

KEYWORD = "ldm-recipe"  # of the PNG's text chunk
Precision = Literal["float64", "float32", "bfloat16", "float16"]
PRECISIONS = get_args(Precision)
MOST = 1_000_000  # pictures of one call or command
# What may differ between the images of one call.
PER_IMAGE = (
    "prompt",
    "negative_prompt",
    "seed",
    "image",
    "mask_image",
    "controls",
    "image_prompts",
    "loras",
    "beside",
)
# What is no setting of a call: said by other arguments, or by the pipeline.
_STATED = (
    *PER_IMAGE,
    "quantization",
    "dtype",
    "model",
    "variant",
    "prediction_type",
    "fast",
    "model_hash",
    "embeddings",
    "version",
)


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
    clip_guidance_scale: float = 0.0
    clip_model: CLIPUse | None = None
    token_merging: float = 0.0
    feature_reuse: int = 1
    clip_skip: int = 0
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_original_size: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    image: PictureUse | None = None
    mask_image: PictureUse | None = None
    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    resize_mode: ResizeMode = "resize"
    mask_blur: int = 0
    mask_content: MaskContent = "original"
    padding_mask_crop: int | None = None
    outpaint: tuple[int, int, int, int] | None = None
    outpaint_feathering: int = 0
    prompt_syntax: Syntax = "plain"
    emphasis: Emphasis = "original"
    controls: tuple[ControlUse, ...] = ()
    guess_mode: bool = False
    image_prompts: tuple[ImagePromptUse, ...] = ()
    hires_scale: float | None = None
    hires_steps: int | None = None
    hires_strength: float | None = None
    hires_upscaler: UpscalerUse | None = None
    upscale: float | None = None
    upscaler: UpscalerUse | None = None
    quantization: Quantization | None = None
    dtype: Precision | None = None
    model: str | None = None
    variant: str | None = None
    prediction_type: str | None = None
    fast: bool = False
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

    @property
    def masked(self) -> bool:
        """Whether a part of the picture that it is drawn from stays."""
        return self.mask_image is not None or any(self.outpaint or ())

    def sizes(self) -> tuple[int, ...] | None:
        """The six numbers that SDXL is told (see `Condition.time_ids`), of a complete recipe; None for other models."""
        if not (self.original_size and self.target_size):
            return None
        return (*self.original_size, *self.crops_coords_top_left, *self.target_size)

    def negative_sizes(self) -> tuple[int, ...] | None:
        """Those that it is told without the prompt, of a complete recipe; None are the same, see `prepare`."""
        own = (self.negative_original_size, self.negative_crops_coords_top_left, self.negative_target_size)
        if not any(own) or not (self.original_size and self.target_size):
            return None
        original, crop, target = own
        return (
            *(original or self.original_size),
            *(crop or self.crops_coords_top_left),
            *(target or self.target_size),
        )

    def png_info(self) -> "PngInfo":
        """The metadata to save a PNG with: `image.save(path, pnginfo=recipe.png_info())`."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        stated = {name: value for name, value in asdict(self).items() if value is not None}
        info.add_itxt(KEYWORD, json.dumps(stated, ensure_ascii=False))
        return info


# What one call, or one row of a file, sets for its pictures.
SETTINGS = tuple(each.name for each in fields(Recipe) if each.name not in _STATED)


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
