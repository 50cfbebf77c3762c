"""The text-to-image pipeline: text encoder, sampler, decoder.

pipe = TextToImagePipeline.from_pretrained()
pipe("a raccoon astronaut").save("raccoon.png")
"""

import math
import secrets
import threading
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
from pipelines.files import check_target, save_picture
from pipelines.placement import Offload, choose_device, offload_where_needed, wake
from pipelines.preview import LatentPreview
from pipelines.recipe import Recipe, check, recipes_for

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

    def save(self, path: str | Path) -> list[Path]:
        """Save PIL pictures with their recipes, one to a `.png`, or all into a folder. Raises UserError."""
        check_target(Path(path), len(self.images))
        pairs = zip(self.images, self.recipes, strict=True)
        return [save_picture(picture, recipe, Path(path)) for picture, recipe in pairs]


class TextToImagePipeline:
    """Draws pictures from prompts with one system. Nothing of a call is kept; calls from several threads take turns."""

    def __init__(
        self,
        system: System,
        device: torch.device | str = "cpu",
        offload: Offload | None = None,
        identity: dict[str, str | None] | None = None,
    ):
        """identity: how the system was loaded, for recipes: Recipe's model, variant and prediction_type.

        Raises UserError for a U-Net that wants more than latents.
        """
        unet, channels = system.unet.config, system.autoencoder.config.latent_channels
        if unet.in_channels != channels:
            raise UserError(
                f"the U-Net takes {unet.in_channels} channels where latents have {channels}: "
                "an inpainting model or the like, which can't draw from text alone"
            )
        self.system = system
        self.device = torch.device(device)
        self._offload = offload
        self._identity: dict[str, Any] = identity or {}
        self._preview: LatentPreview | None = None
        self._lock = threading.Lock()

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
        offload = offload_where_needed(system, where, low_memory)
        if not offload:
            system.to(where, torch_dtype)
        model = None if name is None else str(name)
        return cls(
            system, where, offload, {"model": model, "variant": variant, "prediction_type": prediction_type}
        )

    def to(self, device: torch.device | str, torch_dtype: torch.dtype | None = None) -> "TextToImagePipeline":
        """Move the whole system, to stay there; without `torch_dtype` it keeps its precision."""
        if self._offload:
            self._offload.remove()
            self._offload = None
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
        recipes = recipes_for(prompt, negative_prompt, seed, num_images_per_prompt, settings)
        return self.draw(recipes, output_type, callback_on_step_end, progress)

    @torch.no_grad()
    def draw(
        self,
        recipes: Sequence[Recipe],
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = False,
    ) -> TextToImageOutput:
        """Draw recipes that differ in prompt, negative prompt and seed only.

        One batch, unless some conditions would change for standing beside others: prompts of more windows than
        their neighbours, and with SDXL those without a negative prompt, make batches of their own. Raises UserError.
        """
        if output_type not in get_args(OutputType):
            raise UserError(
                f"output_type {output_type!r} is unknown{nearest(output_type, get_args(OutputType))}"
            )
        recipes = [self.complete(recipe) for recipe in recipes]
        if len({recipe.shared() for recipe in recipes}) != 1:
            raise ValueError("the recipes of one call may differ in prompt, negative_prompt and seed only")
        batches: dict[tuple[int, bool], list[int]] = {}
        for place, recipe in enumerate(recipes):
            length = self.system.text.length([recipe.prompt, recipe.negative_prompt or ""])
            batches.setdefault((length, recipe.negative_prompt is None), []).append(place)
        notes, drawn = list(self.system.notes), dict[int, Tensor]()
        with self._lock:
            for places in batches.values():
                latents, more = self._draw([recipes[k] for k in places], callback_on_step_end, progress)
                notes += [note for note in more if note not in notes]
                drawn |= zip(places, latents, strict=True)
            images = self._pictures(torch.stack([drawn[k] for k in range(len(recipes))]), output_type)
            if self._offload:
                self._offload.rest()
        return TextToImageOutput(images, recipes, notes)

    def _draw(
        self, recipes: Sequence[Recipe], callback: StepCallback | None, progress: bool
    ) -> tuple[Tensor, list[str]]:
        """The latents (B, C, h, w) of complete recipes, in one batch, and the notes on their prompts."""
        shared = recipes[0]
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
            return how.sample(denoise, noise, self._after_step(callback, how, bar)), notes

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with the model's defaults in place of every None. Raises UserError for impossible values."""
        system = self.system
        height = system.default_size if recipe.height is None else recipe.height
        width = system.default_size if recipe.width is None else recipe.width
        defaults = {
            "num_inference_steps": 50,
            "guidance_scale": 5.0 if system.is_xl else 7.5,
            **system.options,
        }
        sizes = {"original_size": (height, width), "target_size": (height, width)} if system.is_xl else {}
        complete = replace(
            recipe,
            seed=secrets.randbelow(2**32) if recipe.seed is None else recipe.seed,
            sampler=recipe.sampler or system.scheduler.sampler,
            height=height,
            width=width,
            **{
                name: defaults[name] if getattr(recipe, name) is None else getattr(recipe, name)
                for name in ("num_inference_steps", "guidance_scale")
            },
            **{name: getattr(recipe, name) or value for name, value in sizes.items()},
            dtype=str(self.dtype).removeprefix("torch."),
            **self._identity,
            model_hash=system.fingerprint,
            version=__version__,
        )
        check(complete, system.autoencoder.config.factor)
        self.plan(complete)
        if complete.clip_skip:
            system.text.encode([""], clip_skip=complete.clip_skip)  # it alone knows how many layers there are
        return complete

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
            none = recipes[0].negative_prompt is None  # of all, or of none: see `draw`
            negatives = None if none else [recipe.negative_prompt or "" for recipe in recipes]
            cond, uncond, notes = encode_pair(self.system.text, prompts, negatives, recipes[0].clip_skip)
            condition = concatenate([uncond, cond])
        return condition.to(self.device, self.dtype), notes

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
                "latents": step.x / math.sqrt(1 + step.sigma**2),  # before the step, at unit variance
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


def _progress_bar(shown: bool, how: Plan) -> Any:
    """tqdm on standard error; silent where that is no terminal."""
    from tqdm.auto import tqdm

    return tqdm(total=how.evaluations, disable=None if shown else True, unit="step", leave=False)
