"""The text-to-image pipeline: text encoder, sampler, decoder.

pipe = TextToImagePipeline.from_pretrained()
pipe("a raccoon astronaut").images[0].save("raccoon.png")
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm import __version__
from ldm.conditioning.text import TextEmbedding, concatenate, encode_pair
from ldm.diffusion.denoiser import Network
from ldm.diffusion.driver import Noise, Step
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.plan import Plan, plan
from ldm.errors import UserError, nearest
from ldm.pictures import to_numpy, to_pil, to_unit_range
from ldm.system import System
from pipelines.placement import choose_device, offload, wake
from pipelines.preview import LatentPreview
from pipelines.recipe import Recipe

OutputType = Literal["pil", "np", "pt", "latent"]
# (pipe, step index, timestep, {"latents", "denoised", "preview"}) -> False to stop there
StepCallback = Callable[["TextToImagePipeline", int, int, dict[str, Any]], object]


@dataclass(frozen=True)
class TextToImageOutput:
    """What a call drew.

    images: PIL pictures; or one array (B, H, W, 3) in [0, 1] ("np"), one tensor (B, 3, H, W) in [0, 1] ("pt"), or
        latents (B, C, h, w) as the U-Net has them ("latent"); prompt by prompt, `num_images_per_prompt` each.
    recipes: how to draw each image again, nothing left open.
    notes: what the caller should know, such as how a long prompt was read.
    """

    images: Any
    recipes: list[Recipe]
    notes: list[str] = field(default_factory=list)


class TextToImagePipeline:
    """Draws pictures from prompts with one system. Nothing of a call is kept, so it may serve several threads."""

    def __init__(self, system: System, device: torch.device | str = "cpu", name: str | None = None):
        """name: what the model is called in recipes (a path or a hub id; None is the bundled model)."""
        self.system = system
        self.device = torch.device(device)
        self.name = name
        self._preview: LatentPreview | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        variant: str | None = None,
        prediction_type: str | None = None,
        low_memory: bool | None = None,
    ) -> "TextToImagePipeline":
        """Load a model and place its parts.

        name: a diffusers folder, a single file (`.safetensors`, `.ckpt`), or a hub id; None is the bundled model.
        device: None takes the accelerator that Accelerate finds, else the CPU.
        low_memory: keep each part on the device only while it works; None decides by the device's free memory.
        Raises UserError.
        """
        where = choose_device(device)
        system = System.load(name, torch_dtype=torch_dtype, variant=variant, prediction_type=prediction_type)
        if not offload(system, where, low_memory):
            system.to(where, torch_dtype)
        return cls(system, where, None if name is None else str(name))

    def to(self, device: torch.device | str, torch_dtype: torch.dtype | None = None) -> "TextToImagePipeline":
        """Move the whole system; without `torch_dtype` it keeps its precision."""
        self.device = torch.device(device)
        self.system.to(self.device, torch_dtype or self.dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the U-Net; samplers keep their state in float32 all the same."""
        return self.system.unet.conv_in.weight.dtype

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that diffusers loads too."""
        self.system.save(folder)

    def save_single_file(self, path: str | Path) -> None:
        """Write one `.safetensors` in the LDM layout."""
        self.system.save_single_file(path)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        clip_skip: int = 0,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
        **xl: tuple[int, int],
    ) -> TextToImageOutput:
        """Draw `num_images_per_prompt` pictures of each prompt.

        height, width: pixels, multiples of the autoencoder's factor; None is the size the model was trained on.
        num_inference_steps, guidance_scale: None takes the model's own defaults, else diffusers' (50; 7.5, SDXL 5).
            A scale of 1 or less runs no unconditional pass.
        negative_prompt: one for all prompts, or one each.
        seed: an int (image k gets seed + k), or one an image; None draws them. An image depends on its own seed
            only: not on its neighbours, the batch's size or the device.
        sampler, schedule: in place of the model's own solver and spacing. eta: DDIM's noise, 0 to 1.
        guidance_rescale: Lin et al. 2023, in [0, 1]. guidance_interval: guided only where low < sigma <= high.
        callback_on_step_end: called with (pipe, index, timestep, {"latents", "denoised", "preview"}) after each
            prediction; `preview()` gives small PIL pictures of the estimate without a decode. Returning False stops
            the run there, with the estimate as the result; nothing else that it returns is read.
        xl: SDXL's `original_size`, `target_size`, `crops_coords_top_left`, each (height, width) in pixels.
        Raises UserError.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(each, str) for each in prompts):
            raise UserError("there is no prompt: give a string, or a list of at least one")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt is {num_images_per_prompt}: it must be 1 or more")
        unknown = [key for key in xl if key not in ("original_size", "target_size", "crops_coords_top_left")]
        if unknown:
            raise TypeError(
                f"unexpected argument {unknown[0]!r}{nearest(unknown[0], Recipe.__annotations__)}"
            )
        settings: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "schedule": schedule,
            "height": height,
            "width": width,
            "eta": eta,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval,
            "clip_skip": clip_skip,
            **xl,
        }
        negatives = _negatives(negative_prompt, len(prompts))
        count = len(prompts) * num_images_per_prompt
        recipes = [
            Recipe(prompts[k], negatives[k], each, **settings)
            for each, k in zip(
                _seeds(seed, count), (i // num_images_per_prompt for i in range(count)), strict=True
            )
        ]
        return self.draw(recipes, output_type, callback_on_step_end, progress)

    @torch.no_grad()
    def draw(
        self,
        recipes: Sequence[Recipe],
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = False,
    ) -> TextToImageOutput:
        """Draw recipes that differ in prompt, negative prompt and seed only, as one batch. Raises UserError."""
        if output_type not in get_args(OutputType):
            raise UserError(
                f"output_type {output_type!r} is unknown{nearest(output_type, get_args(OutputType))}"
            )
        recipes = [self.complete(recipe) for recipe in recipes]
        shared = recipes[0]
        if any(recipe.batch_key() != shared.batch_key() for recipe in recipes):
            raise ValueError("the recipes of one batch may differ in prompt, negative_prompt and seed only")
        assert shared.guidance_scale is not None
        how = self.plan(shared)
        condition, notes = self._condition(recipes, guided=shared.guidance_scale > 1)
        denoise = classifier_free(
            how.denoiser(self._network(condition, shared)),
            shared.guidance_scale,
            shared.guidance_rescale,
            shared.guidance_interval or (0.0, math.inf),
        )
        noise = Noise(
            [recipe.seed for recipe in recipes if recipe.seed is not None], self._shape(shared), self.device
        )
        with _progress_bar(progress, how) as bar:
            latents = how.sample(denoise, noise, self._after_step(callback_on_step_end, how, bar))
        return TextToImageOutput(self._pictures(latents, output_type), recipes, notes)

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with the model's defaults in place of every None. Raises UserError for impossible values."""
        system, factor = self.system, self.system.autoencoder.config.factor
        height = system.default_size if recipe.height is None else recipe.height
        width = system.default_size if recipe.width is None else recipe.width
        for name, size in (("height", height), ("width", width)):
            if size < factor or size % factor:
                low = max(size // factor, 1) * factor
                raise UserError(f"{name} {size} is not a multiple of {factor}: use {low} or {low + factor}")
        steps, scale = recipe.num_inference_steps, recipe.guidance_scale
        defaults = {
            "num_inference_steps": 50,
            "guidance_scale": 5.0 if system.is_xl else 7.5,
            **system.options,
        }
        steps = defaults["num_inference_steps"] if steps is None else steps
        if steps < 1:
            raise UserError(f"num_inference_steps is {steps}: it must be 1 or more")
        sizes = {"original_size": (height, width), "target_size": (height, width)} if system.is_xl else {}
        return replace(
            recipe,
            seed=secrets.randbelow(2**32) if recipe.seed is None else recipe.seed,
            num_inference_steps=steps,
            guidance_scale=defaults["guidance_scale"] if scale is None else scale,
            sampler=recipe.sampler or system.scheduler.sampler,
            height=height,
            width=width,
            **{key: getattr(recipe, key) or value for key, value in sizes.items()},
            dtype=str(self.dtype).removeprefix("torch."),
            model=self.name,
            model_hash=system.fingerprint,
            version=__version__,
        )

    def plan(self, recipe: Recipe) -> Plan:
        """How a complete recipe is sampled. Raises UserError for unknown samplers and schedules."""
        assert recipe.num_inference_steps
        return plan(
            self.system.scheduler, recipe.num_inference_steps, recipe.sampler, recipe.schedule, recipe.eta
        )

    def _shape(self, recipe: Recipe) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        config = self.system.autoencoder.config
        assert recipe.height and recipe.width
        return config.latent_channels, recipe.height // config.factor, recipe.width // config.factor

    def _condition(self, recipes: Sequence[Recipe], guided: bool) -> tuple[TextEmbedding, list[str]]:
        """B rows; where guided 2B, the first B under the negative prompts."""
        prompts = [recipe.prompt for recipe in recipes]
        if not guided:
            condition, notes = self.system.text.encode(prompts, clip_skip=recipes[0].clip_skip)
        else:
            stated = [recipe.negative_prompt for recipe in recipes]
            negatives = None if all(each is None for each in stated) else [each or "" for each in stated]
            cond, uncond, notes = encode_pair(self.system.text, prompts, negatives, recipes[0].clip_skip)
            condition = concatenate([uncond, cond])
        return condition.to(self.device, self.dtype), [*self.system.notes, *notes]

    def _network(self, condition: TextEmbedding, recipe: Recipe) -> Network:
        """The U-Net with its condition bound; a call of half the rows is the one without the negative prompts."""
        unet, dtype = self.system.unet, self.dtype
        added: dict[str, Tensor] = {}
        if self.system.is_xl:
            assert condition.pooled is not None and recipe.original_size and recipe.target_size
            ids = (*recipe.original_size, *recipe.crops_coords_top_left, *recipe.target_size)
            rows = torch.tensor([ids], dtype=torch.float32, device=self.device).expand(
                len(condition.hidden), -1
            )
            added = {"text_embeds": condition.pooled, "time_ids": rows}

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            last = slice(len(condition.hidden) - len(x), None)
            rows = {key: value[last] for key, value in added.items()}
            return unet(x.to(dtype), timestep, condition.hidden[last], rows or None)

        return network

    def _after_step(
        self, callback: StepCallback | None, how: Plan, bar: Any
    ) -> Callable[[Step], bool | None]:
        def after(step: Step) -> bool | None:
            bar.update()
            if callback is None:
                return None
            sigma = torch.tensor([step.sigma], dtype=torch.float64)
            state = {
                "latents": step.x / math.sqrt(1 + step.sigma**2),  # of unit variance, as diffusers shows them
                "denoised": step.x0,
                "preview": lambda: self.preview(step.x0),
            }
            stopped = callback(self, step.index, round(how.schedule.timestep(sigma).item()), state) is False
            return False if stopped else None

        return after

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Any:
        """Small PIL pictures, one pixel a latent position, of latents (B, C, h, w) by a linear map: no decode."""
        if self._preview is None:
            self._preview = LatentPreview(self.system.autoencoder)
        return self._preview(latents)

    def _pictures(self, latents: Tensor, output_type: OutputType) -> Any:
        if output_type == "latent":
            return latents
        autoencoder = self.system.autoencoder
        wake(autoencoder)
        unscaled = autoencoder.unscale(latents).to(autoencoder.decoder.conv_in.weight.dtype)
        pictures = to_unit_range(autoencoder.decode(unscaled))
        if not bool(pictures.isfinite().all()):
            raise UserError(
                "the picture came out as NaN: try torch_dtype float32 (float16 overflows in some models)"
            )
        return {"pil": to_pil, "np": to_numpy, "pt": lambda tensor: tensor}[output_type](pictures)


def _negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str | None]:
    """One for each prompt."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt] * count
    if len(negative_prompt) != count:
        raise UserError(
            f"there are {len(negative_prompt)} negative prompts for {count} prompts: give one, or one each"
        )
    return list(negative_prompt)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int | None]:
    """One for each image."""
    if seed is None:
        return [None] * count
    seeds = [seed + k for k in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise UserError(f"there are {len(seeds)} seeds for {count} images: give one int, or one an image")
    if any(not -(2**63) <= each < 2**64 for each in seeds):
        raise UserError("a seed must fit in 64 bits")
    return list(seeds)


def _progress_bar(shown: bool, how: Plan) -> Any:
    """tqdm on standard error; silent where that is no terminal."""
    from tqdm.auto import tqdm

    return tqdm(total=how.evaluations, disable=None if shown else True, unit="step", leave=False)
