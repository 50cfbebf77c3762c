"""The text-to-image pipeline: text encoder, sampler, decoder.

pipe = TextToImagePipeline.from_pretrained()
pipe("a raccoon astronaut").save("raccoon.png")
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, SupportsFloat, SupportsIndex, get_args

import torch
from torch import Tensor

from ldm.errors import UserError, nearest
from ldm.sampling import check_channels, sample
from ldm.system import System
from pipelines.adapters import Adapters
from pipelines.canvas import MaskContent, ResizeMode
from pipelines.completion import Drawing, batches_of, canvas_for, completed, picture_notes
from pipelines.files import whole_path
from pipelines.given import Given, asked
from pipelines.originals import Originals, latents_of
from pipelines.output import OutputType, TextToImageOutput, pictures
from pipelines.placement import Offload, choose_device, offload_where_needed
from pipelines.preview import LatentPreview
from pipelines.progress import Progress, StepCallback, Watch
from pipelines.recipe import PER_IMAGE, Recipe
from pipelines.requests import request_for
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
        self._turns = Turns()
        self.adapters = Adapters(system, self.device, self._turns)

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
            self.adapters.to(self.device)
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

    def load_lora_weights(
        self, path: str | Path, weight_name: str | None = None, adapter_name: str | None = None
    ) -> str:
        """As diffusers': load a LoRA with weight 1 (see `Adapters.load_lora`); returns its name.

        weight_name: of the file, where `path` is a folder of several. adapter_name: None is the file's name.
        """
        return self.adapters.load_lora(Path(path, weight_name) if weight_name else path, name=adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """As diffusers': use these LoRAs, with these weights (None is 1), and no others. Raises UserError."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        each = [float(weights)] * len(names) if isinstance(weights, int | float) else list(weights)
        if len(each) != len(names):
            raise UserError(
                f"there are {len(each)} adapter_weights for {len(names)} adapter_names: one, or one each"
            )
        self.adapters.set_weights(dict(zip(names, each, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """As diffusers': the names of the LoRAs whose weight is not 0."""
        return [name for name, weight in self.adapters.weights().items() if weight]

    def delete_adapters(self, adapter_names: str | Iterable[str]) -> None:
        """As diffusers': take these LoRAs out. Raises UserError."""
        self.adapters.unload_loras([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def unload_lora_weights(self) -> None:
        """As diffusers': take all LoRAs out, merged or not; the weights are then the model's own."""
        self.adapters.unload_loras()

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """As diffusers': add LoRAs to the weights (see `Adapters.merge`). Raises UserError."""
        self.adapters.merge(adapter_names, lora_scale)

    def unfuse_lora(self) -> None:
        """As diffusers': give the networks the very weights from before; the LoRAs are beside them again."""
        self.adapters.unmerge()

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """As diffusers': teach the text encoders new words (see `Adapters.load_words`); returns the words."""
        return self.adapters.load_words(path, token)

    def unload_textual_inversion(self) -> None:
        """As diffusers': forget all words that were loaded."""
        self.adapters.unload_words()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that diffusers loads too. Of adapters it holds what is merged; a warning says so."""
        with self._turn():
            self.adapters.warn_of_saving()
            self.system.save(folder)

    def save_single_file(self, path: str | Path) -> None:
        """Write one `.safetensors` in the LDM layout. Of adapters it holds what is merged; a warning says so."""
        with self._turn():
            self.adapters.warn_of_saving()
            self.system.save_single_file(path)

    def __call__(
        self,
        prompt: str | Iterable[str] | None = None,
        *,
        height: SupportsIndex | None = None,
        width: SupportsIndex | None = None,
        num_inference_steps: SupportsIndex | None = None,
        guidance_scale: SupportsFloat | None = None,
        negative_prompt: str | Iterable[str | None] | None = None,
        num_images_per_prompt: SupportsIndex = 1,
        seed: SupportsIndex | Iterable[SupportsIndex] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
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
        image: "Originals | None" = None,
        mask_image: "Originals | None" = None,
        strength: SupportsFloat | None = None,
        denoising_start: SupportsFloat | None = None,
        denoising_end: SupportsFloat | None = None,
        resize_mode: ResizeMode | None = None,
        mask_blur: SupportsIndex | None = None,
        mask_content: MaskContent | None = None,
        padding_mask_crop: SupportsIndex | None = None,
        outpaint: Sequence[SupportsIndex] | None = None,
        outpaint_feathering: SupportsIndex | None = None,
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
        generator: in place of a seed, one for all images, of which each draws on, or a list of one an image. latents:
            (B, C, h, w), the first noise, of unit variance. prompt_embeds and negative_prompt_embeds (P, L, D), SDXL's
            pooled ones (P, D'): in place of prompts, a row a prompt. What no recipe holds of these, its `beside` names.
        sampler, schedule: in place of the model's own solver and spacing; karras and exponential have one range with
            every sampler (docs/compatibility.md). eta: DDIM's noise, 0 to 1.
        guidance_rescale: Lin et al. 2023, in [0, 1]. guidance_interval: guided only where low < sigma <= high.
        callback_on_step_end: called with (pipe, index, timestep, {"latents", "denoised", "preview", "images"}) after
            each prediction; see `pipelines.progress`. Returning False ends the call there.
        original_size, target_size, crops_coords_top_left: what SDXL is told, each (height, width) in pixels.
        image: what to draw from, one for all, one a prompt or one an image: a PIL picture, a file's path, an array
        (H, W,
            3), a tensor (3, H, W) in [0, 1], or latents (C, h, w). Its size is the default of height and width.
        strength: how much of it is drawn anew: the last int(strength * steps) steps. None is 0.8, SDXL 0.3; with a mask
            all of it. resize_mode: how it comes to another shape: resize (stretched), crop, fill (edges spread).
        mask_image: white is drawn anew; the rest comes back to the bit. mask_blur, mask_content, padding_mask_crop,
            outpaint (left, top, right, bottom in pixels), outpaint_feathering: see `pipelines.canvas.canvas_of`.
        denoising_end, denoising_start: shares of the noise at which one model ends (with output_type "latent") and
            another goes on from its latents as `image`: SDXL's base and refiner.
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
            "strength": strength,
            "denoising_start": denoising_start,
            "denoising_end": denoising_end,
            "resize_mode": resize_mode,
            "mask_blur": mask_blur,
            "mask_content": mask_content,
            "padding_mask_crop": padding_mask_crop,
            "outpaint": outpaint,
            "outpaint_feathering": outpaint_feathering,
        }
        handed: dict[str, Any] = {
            "generator": generator,
            "latents": latents,
            "image": image,
            "mask_image": mask_image,
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        recipes, given = asked(prompt, negative_prompt, seed, num_images_per_prompt, settings, handed)
        return self.draw(recipes, output_type, callback_on_step_end, progress, given)

    @torch.no_grad()
    def draw(
        self,
        recipes: Sequence[Recipe | Drawing],
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = False,
        given: Sequence[Given] | None = None,
    ) -> TextToImageOutput:
        """Draw recipes, or what `complete` made of them, that differ in what is of one image only.

        That is prompt, negative prompt and seed, and what is given beside a recipe. One batch, unless some conditions
        would change for standing beside others: prompts of more windows than their neighbours, and with SDXL those
        without a negative prompt, make batches of their own. Where the callback ends the call before all batches have
        begun, the output holds those that have. Raises UserError.
        """
        if output_type not in get_args(OutputType):
            raise UserError(
                f"output_type {output_type!r} is unknown{nearest(str(output_type), get_args(OutputType))}"
            )
        # All within one turn: the recipes name the adapters that draw, whatever other threads load meanwhile.
        with self._turn():
            drawings: list[Drawing] = []
            for recipe, each in zip(recipes, given or [Given()] * len(recipes), strict=True):
                drawings.append(self._completed(recipe, each, drawings[-1] if drawings else None))
            if len({drawing.recipe.shared() for drawing in drawings}) != 1:
                raise ValueError(f"the recipes of one call may differ in {', '.join(PER_IMAGE)} only")
            return self._drawn(drawings, output_type, callback_on_step_end, progress)

    def _drawn(
        self,
        drawings: Sequence[Drawing],
        output_type: OutputType,
        callback: StepCallback | None,
        progress: bool,
    ) -> TextToImageOutput:
        """Draw what one call may draw together, within the turn."""
        batches, how = batches_of(drawings), drawings[0].plan
        notes, drawn = [*self.system.notes, *picture_notes(drawings)], dict[int, Tensor]()
        with Progress(self, how, len(batches), callback, progress) as watch:
            try:
                for places in batches:
                    latents, more = self._draw([drawings[k] for k in places], watch.of(places))
                    notes += [note for note in more if note not in notes]
                    drawn |= zip(places, latents, strict=True)
                    if watch.stopped:
                        break
                places = sorted(drawn)
                stacked = torch.stack([drawn[k] for k in places])
                canvases = [drawings[k].canvas for k in places]
                images = pictures(self.system.autoencoder, stacked, output_type, canvases)
            finally:
                if self._offload:
                    self._offload.rest()
        return TextToImageOutput(images, [drawings[k].recipe for k in places], notes)

    def _draw(self, drawings: Sequence[Drawing], watch: Watch) -> tuple[Tensor, list[str]]:
        """The latents (B, C, h, w) of drawings, in one batch, and the notes on their prompts."""
        request = request_for(self.system, drawings, self.device)
        return sample(self.system, request, watch), list(request.notes)

    def complete(self, recipe: Recipe, given: Given | None = None, like: Drawing | None = None) -> Drawing:
        """Return the recipe with the model's defaults in place of every None, and how it is sampled.

        like: a drawing of before, to save time where it is sampled the same. Raises UserError for impossible values.
        """
        with self._turns.look(self.device):
            return self._completed(recipe, given or Given(), like)

    def _completed(self, recipe: Recipe | Drawing, given: Given, like: Drawing | None) -> Drawing:
        now = {
            **self._identity,
            **self.adapters.recipe(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "model_hash": self.system.fingerprint,
        }
        if isinstance(recipe, Drawing):
            canvas = recipe.canvas
            if canvas is None and recipe.recipe.image is not None and latents_of(recipe.given.image) is None:
                canvas = canvas_for(recipe.recipe, recipe.given)
            return replace(recipe, recipe=replace(recipe.recipe, **now), canvas=canvas)
        return completed(self.system, recipe, given, now, like)

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Any:
        """Small PIL pictures, one pixel a latent position, of latents (B, C, h, w) by a linear map: no decode."""
        if self._preview is None:
            self._preview = LatentPreview(self.system.autoencoder)
        return self._preview(latents)
