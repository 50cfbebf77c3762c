"""The text-to-image pipeline: text encoder, sampler, decoder.

pipe = TextToImagePipeline.from_pretrained()
pipe("a raccoon astronaut").save("raccoon.png")
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn, SupportsFloat, SupportsIndex, get_args

import torch
from torch import Tensor

from ldm.diffusion.plan import Plan
from ldm.errors import UserError, nearest
from ldm.sampling import Guidance, check_channels, prepare, sample
from ldm.system import System
from pipelines.adapters import Adapters
from pipelines.completion import batches_of, completed, plan_of
from pipelines.files import whole_path
from pipelines.output import OutputType, TextToImageOutput, pictures
from pipelines.placement import Offload, choose_device, offload_where_needed
from pipelines.preview import LatentPreview
from pipelines.progress import Progress, StepCallback, Watch
from pipelines.recipe import Recipe, recipes_for
from pipelines.turns import Turns


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

        Raises UserError for a network that wants more than text and, of inpainting, a mask and a masked picture.
        """
        check_channels(system)
        self.system = system
        self.device = torch.device(device)
        self._offload = offload
        self._identity: dict[str, Any] = identity or {}
        self._preview: LatentPreview | None = None
        self._adapters = Adapters(system, self.device)
        self._turns = Turns()

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
        if not isinstance(torch_dtype, torch.dtype):
            raise UserError(
                f"torch_dtype is {torch_dtype!r}: give one of torch's own, such as torch.bfloat16"
            )
        where = choose_device(device)
        system = System.load(name, torch_dtype=torch_dtype, variant=variant, prediction_type=prediction_type)
        offload = offload_where_needed(system, where, low_memory)
        if not offload:
            system.to(where, torch_dtype)
        model = None if name is None else whole_path(name)
        return cls(
            system, where, offload, {"model": model, "variant": variant, "prediction_type": prediction_type}
        )

    def to(
        self,
        *targets: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TextToImagePipeline":
        """Move the whole system to a device, to stay there, or into another precision, or both: as diffusers' `to`.

        Raises UserError for a device that is not there.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        with self._turn():
            if self._offload:
                self._offload.remove()
                self._offload = None
            self.device = self.device if device is None else choose_device(device)
            self.system.to(self.device, dtype or self.dtype)
            self._adapters.to(self.device)
        return self

    def _turn(self) -> AbstractContextManager[None]:
        return self._turns.turn(self.device)

    def __getstate__(self) -> NoReturn:
        """Copies and pickles come here: the lock and the adapters' hooks belong to this very object."""
        raise TypeError(
            "a pipeline can't be copied or pickled: load it where it is needed, with from_pretrained of the same name"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the U-Net; samplers keep their state in float32 all the same."""
        return self.system.network.dtype

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """Put a LoRA over the networks that it is for, beside those that are there; returns its name.

        LoHa, LoKr, DoRA, (IA)^3, norms and differences of weights count as LoRAs; words that came along are taught too.
        path: a file of diffusers', kohya's, LyCORIS', ComfyUI's or peft's, or a folder of diffusers' or peft's. weight:
        how much of it. name: for `set_loras` and `unload_loras`; None is the file's. Warns of what is passed over.
        Raises UserError.
        """
        with self._turn():
            return self._adapters.load_lora(path, weight, name)

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Use these LoRAs, with these weights; others that are loaded get weight 0. Raises UserError."""
        with self._turn():
            self._adapters.set_loras(weights)

    def unload_loras(self, names: Iterable[str] | None = None) -> None:
        """Take LoRAs out, merged or not; None takes all. The weights are then those of the model. Raises UserError."""
        with self._turn():
            self._adapters.unload_loras(names)

    def merge_loras(self) -> None:
        """Add all LoRAs, as weighed, to the networks' weights: they cost no time any more, and are saved with them."""
        with self._turn():
            self._adapters.merge_loras()

    def unmerge_loras(self) -> None:
        """Give the networks the very weights from before `merge_loras`; the LoRAs are beside them again."""
        with self._turn():
            self._adapters.unmerge_loras()

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """Teach the text encoders new words, by an embedding of diffusers' or AUTOMATIC1111's; returns the words.

        token: the word to use in prompts, in place of the file's own. Raises UserError.
        """
        with self._turn():
            return self._adapters.load_words(path, token)

    def unload_textual_inversion(self) -> None:
        """Forget all words that were loaded."""
        with self._turn():
            self._adapters.unload_words()

    def load_adapters_of(self, recipe: Recipe) -> list[str]:
        """Load the LoRAs and embeddings that a recipe names; returns notes: of changes since, of what is passed over.

        It loads from anywhere: of a stranger's recipe look at the paths first, as `pipelines.trust` does.
        Raises UserError, also where a file is gone.
        """
        with self._turn():
            return self._adapters.load_again(recipe.loras, recipe.embeddings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that diffusers loads too. Of adapters it holds what is merged; a warning says so."""
        with self._turn():
            self._adapters.warn_of_saving()
            self.system.save(folder)

    def save_single_file(self, path: str | Path) -> None:
        """Write one `.safetensors` in the LDM layout. Of adapters it holds what is merged; a warning says so."""
        with self._turn():
            self._adapters.warn_of_saving()
            self.system.save_single_file(path)

    def __call__(
        self,
        prompt: str | Iterable[str],
        *,
        height: SupportsIndex | None = None,
        width: SupportsIndex | None = None,
        num_inference_steps: SupportsIndex | None = None,
        guidance_scale: SupportsFloat | None = None,
        negative_prompt: str | Iterable[str | None] | None = None,
        num_images_per_prompt: SupportsIndex = 1,
        seed: SupportsIndex | Iterable[SupportsIndex] | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        eta: SupportsFloat = 0.0,
        guidance_rescale: SupportsFloat = 0.0,
        guidance_interval: Sequence[SupportsFloat] | None = None,
        clip_skip: SupportsIndex | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
        original_size: Sequence[SupportsIndex] | None = None,
        target_size: Sequence[SupportsIndex] | None = None,
        crops_coords_top_left: Sequence[SupportsIndex] | None = None,
        **unknown: Any,
    ) -> TextToImageOutput:
        """Draw `num_images_per_prompt` pictures of each prompt.

        prompt: a string, or several in a list, a tuple, an iterator, an array or a table's column.
        height, width: pixels, multiples of the autoencoder's factor; None is the size the model was trained on.
        num_inference_steps, guidance_scale: None takes the model's own defaults, else diffusers' (50; 7.5, SDXL 5).
            A scale of 1 or less runs no unconditional pass.
        negative_prompt: one for all prompts, or one each; None among them is none for that prompt.
        seed: an int (image k gets seed + k), or one an image; None draws them. An image depends on its own seed
            only: not on its neighbours, the batch's size or the device.
        All numbers may be numpy's, or tensors without dimensions.
        sampler, schedule: in place of the model's own solver and spacing; karras and exponential have one range with
            every sampler (docs/compatibility.md). eta: DDIM's noise, 0 to 1.
        guidance_rescale: Lin et al. 2023, in [0, 1]. guidance_interval: guided only where low < sigma <= high.
        callback_on_step_end: called with (pipe, index, timestep, {"latents", "denoised", "preview", "images"}) after
            each prediction; see `pipelines.progress`. Returning False ends the call there.
        original_size, target_size, crops_coords_top_left: what SDXL is told, each (height, width) in pixels.
        Raises UserError.
        """
        for name in unknown:
            raise TypeError(f"unexpected argument {name!r}{nearest(name, Recipe.__annotations__)}")
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
            "clip_skip": 0 if clip_skip is None else clip_skip,
            "original_size": original_size,
            "target_size": target_size,
            "crops_coords_top_left": crops_coords_top_left,
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
        their neighbours, and with SDXL those without a negative prompt, make batches of their own. Where the callback
        ends the call before all batches have begun, the output holds those that have. Raises UserError.
        """
        if output_type not in get_args(OutputType):
            raise UserError(
                f"output_type {output_type!r} is unknown{nearest(str(output_type), get_args(OutputType))}"
            )
        # All within one turn: the recipes name the adapters that draw, whatever other threads load meanwhile.
        with self._turn():
            recipes = [self._completed(recipe) for recipe in recipes]
            if len({recipe.shared() for recipe in recipes}) != 1:
                raise ValueError(
                    "the recipes of one call may differ in prompt, negative_prompt and seed only"
                )
            return self._drawn(recipes, output_type, callback_on_step_end, progress)

    def _drawn(
        self,
        recipes: Sequence[Recipe],
        output_type: OutputType,
        callback: StepCallback | None,
        progress: bool,
    ) -> TextToImageOutput:
        """Draw complete recipes that differ in prompt, negative prompt and seed only, within the turn."""
        batches, how = batches_of(self.system.text, recipes), plan_of(self.system, recipes[0])
        notes, drawn = list(self.system.notes), dict[int, Tensor]()
        with Progress(self, how, len(batches), callback, progress) as watch:
            try:
                for places in batches:
                    latents, more = self._draw([recipes[k] for k in places], how, watch.of(places))
                    notes += [note for note in more if note not in notes]
                    drawn |= zip(places, latents, strict=True)
                    if watch.stopped:
                        break
                places = sorted(drawn)
                stacked = torch.stack([drawn[k] for k in places])
                images = pictures(self.system.autoencoder, stacked, output_type)
            finally:
                if self._offload:
                    self._offload.rest()
        return TextToImageOutput(images, [recipes[k] for k in places], notes)

    def _draw(self, recipes: Sequence[Recipe], how: Plan, watch: Watch) -> tuple[Tensor, list[str]]:
        """The latents (B, C, h, w) of complete recipes, in one batch, and the notes on their prompts."""
        shared = recipes[0]
        assert shared.guidance_scale is not None
        assert shared.height and shared.width
        none = all(recipe.negative_prompt is None for recipe in recipes)
        request = prepare(
            self.system,
            how,
            [recipe.prompt for recipe in recipes],
            [recipe.seed for recipe in recipes if recipe.seed is not None],
            negatives=None if none else [recipe.negative_prompt or "" for recipe in recipes],
            guidance=Guidance(
                shared.guidance_scale, shared.guidance_rescale, shared.guidance_interval or (0.0, math.inf)
            ),
            clip_skip=shared.clip_skip,
            size=(shared.height, shared.width),
            sizes=shared.sizes(),
            device=self.device,
        )
        return sample(self.system, request, watch), list(request.notes)

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with the model's defaults in place of every None. Raises UserError for impossible values."""
        with self._turns.look(self.device):
            return self._completed(recipe)

    def _completed(self, recipe: Recipe) -> Recipe:
        return completed(self.system, recipe, {**self._identity, **self._adapters.recipe()})

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Any:
        """Small PIL pictures, one pixel a latent position, of latents (B, C, h, w) by a linear map: no decode."""
        if self._preview is None:
            self._preview = LatentPreview(self.system.autoencoder)
        return self._preview(latents)
