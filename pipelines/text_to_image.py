"""The text-to-image pipeline: text encoder, sampler, decoder.

pipe = TextToImagePipeline.from_pretrained()
pipe("a raccoon astronaut").save("raccoon.png")
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, SupportsFloat, SupportsIndex, get_args

import torch
from torch import Tensor

from ldm.backends import Backend
from ldm.conditioning.prompts.weighted import Emphasis, Lora, Syntax
from ldm.diffusion.driver import Step
from ldm.errors import UserError, nearest
from ldm.models.compiled import compile_blocks
from ldm.models.quantization import Quantization
from ldm.sampling import check_channels
from ldm.system import System
from pipelines.asking import asked
from pipelines.canvas import MaskContent, ResizeMode
from pipelines.completion import batches_of, canvas_for, completed, picture_notes, with_loaded
from pipelines.crowd import Crowd, Drawn, asking, drawn_alone
from pipelines.diffusers_names import DiffusersNames
from pipelines.drawing import Drawing
from pipelines.enlarging import stack_latents
from pipelines.files import whole_path
from pipelines.given import Given
from pipelines.interpolation import Method, asked_between, interpolated, noises_of
from pipelines.loaded import Loaded
from pipelines.loading import Placed, load
from pipelines.originals import Original, Originals, latents_of
from pipelines.output import OutputType, TextToImageOutput, pictures
from pipelines.placement import LowMemory, choose_device
from pipelines.progress import Progress, StepCallback, counted
from pipelines.recipe import PER_IMAGE, Recipe, recipes_for
from pipelines.turns import Turns
from pipelines.uses import Preprocessor


class TextToImagePipeline(DiffusersNames):
    """Draws pictures from prompts with one system. Nothing of a call is kept; calls from several threads take turns."""

    def __init__(
        self,
        system: System,
        device: torch.device | str = "cpu",
        identity: dict[str, Any] | None = None,
        placed: Placed | None = None,
    ):
        """identity: how the system was loaded, for recipes: Recipe's model, variant, prediction_type and fast.

        placed: where and how it was placed, if that is not simply on the device.

        Raises UserError for a network that wants more than text and, of inpainting, a mask and a masked picture.
        """
        check_channels(system)
        self.system = system
        self.device = torch.device(device)
        self._placed = placed or Placed(system, self.device)
        self.notes = self._placed.notes
        self._offload = self._placed.offload
        self._identity: dict[str, Any] = identity or {}
        self._turns = Turns()
        self._loaded = Loaded(system, self.device, self._turns)
        self.adapters = self._loaded.adapters
        self.controlnets = self._loaded.controlnets
        self.image_adapters = self._loaded.image_adapters

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        prediction_type: str | None = None,
        fast: bool = False,
        low_memory: LowMemory | None = None,
        backend: Backend = "torch",
        quantization: Quantization | None = None,
    ) -> "TextToImagePipeline":
        """Load a model and place its parts.

        name: a diffusers folder, a single file (`.safetensors`, `.ckpt`), or a hub id; None is the bundled model.
        torch_dtype: None is bfloat16 on a CPU that multiplies it, else float32, or what LDM_DTYPE says. What was
            rounded so is not saved, nor brought into another precision: that takes the precision given here.
        fast: the model's few-step form, where it has one, as the bundled model does: see docs/lectures/few-steps.md.
        device: None takes the accelerator that Accelerate finds, else the CPU.
        low_memory: keep each part on the device only while it works; None decides by the device's free memory.
            "sequential" does so with each layer of the network: the least memory, and the slowest way.
        backend: what computes the network in torch's place: "openvino" on a CPU, "cuda_graphs" on a GPU, see
            docs/speed.md.
        quantization: holds the network's weights in a byte each, which is approximate, see docs/speed.md: "int8" those
            of linear layers (the extra torchao), "fp8" those of convolutions too.
        Raises UserError.
        """
        placed = load(
            name, torch_dtype, device, variant, prediction_type, fast, low_memory, backend, quantization
        )
        model = None if name is None else whole_path(name)
        how: dict[str, Any] = {"variant": variant, "prediction_type": prediction_type, "fast": fast}
        identity = {"model": model, **how}
        return cls(placed.system, placed.device, identity, placed)

    def to(
        self,
        *targets: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TextToImagePipeline":
        """Move the whole system to a device, to stay there, or into another precision, or both: as diffusers' `to`.

        Raises UserError for a device that is not there, or not for the backend, and for another precision than the one
        that was chosen as the weights were loaded.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        with self._turn():
            where = self.device if device is None else choose_device(device)
            self._placed.check_move(where, dtype)
            if self._offload:
                self._offload.remove()
                self._offload = None
            self.device = where
            self.system.to(self.device, dtype or self.dtype)
            self._loaded.to(self.device)
        return self

    def compile(self, **options: Any) -> "TextToImagePipeline":
        """Compile the blocks of the network and of the decoder by torch.compile, each at its first call.

        That takes a minute or so for the first picture of a size; the next process takes what was compiled from the
        disk. options: of torch.compile.
        """
        with self._turn():
            compile_blocks(self.system.network, **options)
            compile_blocks(
                self.system.autoencoder.decoder, kinds=self.system.autoencoder.block_types, **options
            )
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that diffusers loads too. Of adapters it holds what is merged; a warning says so."""
        self._placed.check_unrounded("to save them")
        with self._turn():
            self.adapters.warn_of_saving()
            self.system.save(folder)

    def save_single_file(self, path: str | Path) -> None:
        """Write one `.safetensors` in the LDM layout. Of adapters it holds what is merged; a warning says so."""
        self._placed.check_unrounded("to save them")
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
        clip_guidance_scale: SupportsFloat = 0.0,
        clip_model: str | Path | None = None,
        token_merging: SupportsFloat = 0.0,
        feature_reuse: SupportsIndex = 1,
        clip_skip: SupportsIndex | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
        original_size: Sequence[SupportsIndex] | None = None,
        target_size: Sequence[SupportsIndex] | None = None,
        crops_coords_top_left: Sequence[SupportsIndex] | None = None,
        negative_original_size: Sequence[SupportsIndex] | None = None,
        negative_target_size: Sequence[SupportsIndex] | None = None,
        negative_crops_coords_top_left: Sequence[SupportsIndex] | None = None,
        aesthetic_score: SupportsFloat | None = None,
        negative_aesthetic_score: SupportsFloat | None = None,
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
        prompt_syntax: Syntax | None = None,
        emphasis: Emphasis | None = None,
        control_image: "Originals | Mapping[str, Originals] | None" = None,
        controlnet_conditioning_scale: SupportsFloat | Sequence[SupportsFloat] | None = None,
        control_guidance_start: SupportsFloat | Sequence[SupportsFloat] | None = None,
        control_guidance_end: SupportsFloat | Sequence[SupportsFloat] | None = None,
        control_preprocessor: Preprocessor | None = None,
        guess_mode: bool | None = None,
        ip_adapter_image: "Originals | Mapping[str, Originals] | None" = None,
        ip_adapter_scale: SupportsFloat | Sequence[SupportsFloat] | None = None,
        hires_scale: SupportsFloat | None = None,
        hires_steps: SupportsIndex | None = None,
        hires_strength: SupportsFloat | None = None,
        hires_upscaler: str | Path | None = None,
        upscale: SupportsFloat | None = None,
        upscaler: str | Path | None = None,
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
        clip_guidance_scale: how strongly a CLIP pulls towards the prompt, 0 for none; clip_model: its folder, None is
            the bundled one (docs/lectures/clip.md).
        token_merging: the share of tokens, 0 to 0.75, that self-attention sees merged. feature_reuse: every how many
            steps all of the U-Net is computed. Both are faster and approximate (docs/speed.md); 0 and 1 are exact.
        callback_on_step_end: called with (pipe, index, timestep, {"latents", "denoised", "preview", "images"}) after
            each prediction; see `pipelines.progress`. Returning False ends the call there.
        original_size, target_size, crops_coords_top_left: what SDXL is told, each (height, width) in pixels; those that
            begin with negative_ without the prompt. aesthetic_score, negative_aesthetic_score: what its refiner is
            told in place of the target's size; None is 6 and 2.5.
        image: what to draw from, one for all, one a prompt or one an image: a PIL picture, a file's path, an array
            (H, W, 3), a tensor (3, H, W) in [0, 1], or latents (C, h, w). Its size is the default of height and width.
        strength: how much of it is drawn anew: the last int(strength * steps) steps. None is 0.8, SDXL 0.3; with a mask
            all of it. resize_mode: how it comes to another shape: resize (stretched), crop, fill (edges spread).
        mask_image: white is drawn anew; the rest comes back to the bit. mask_blur, mask_content, padding_mask_crop,
            outpaint (left, top, right, bottom in pixels), outpaint_feathering: see `pipelines.canvas.canvas_of`.
        denoising_end, denoising_start: shares of the noise at which one model ends (with output_type "latent") and
            another goes on from its latents as `image`: SDXL's base and refiner.
        prompt_syntax: plain, a1111, comfyui or compel: how weights and changes are written, see docs/prompts.md.
            emphasis: original or no_norm, of a1111. `<lora:name:0.8>` weighs a LoRA that is loaded, for this prompt.
        control_image: for the ControlNet that was loaded (load_controlnet), brought to size and cut as `image` is; for
            several a list of one each, or a dict by their names. control_preprocessor: "canny" finds the edges in it.
            controlnet_conditioning_scale, control_guidance_start, control_guidance_end, guess_mode: see
            `ldm.conditioning.control.Control`; numbers are for all ControlNets, or one each.
        ip_adapter_image: a picture as a prompt, or several, for the IP-Adapter that was loaded (load_ip_adapter); for
            several adapters a list of these. ip_adapter_scale: how much of it; None is what set_ip_adapter_scale said.
        hires_scale: draw the picture, then all of it again at so many times its sides (AUTOMATIC1111's hires fix), with
            hires_steps (None: as many), hires_strength (0.7, with a network 0.4) and hires_upscaler: None or "latent"
            stretches latents; a file, or "bundled", is a network that enlarges the picture.
        upscale: enlarge what was drawn by so many times; upscaler: the network's file, None is the bundled one.
        Raises UserError.
        """
        call = dict(locals())  # first of all: the arguments, and nothing else
        for name in unknown:
            raise TypeError(f"unexpected argument {name!r}{nearest(name, call)}")
        recipes, given = asked(call, self._loaded)
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

        That is prompts, seeds, pictures, LoRAs, and what is given beside a recipe. One batch, unless some conditions
        would change for standing beside others: prompts of more windows than their neighbours, with SDXL those without
        a negative prompt, and other LoRAs or ControlNets, make batches of their own. Where the callback ends the call
        before all batches have begun, the output holds those that have, of one size. Raises UserError.
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
            if output_type == "latent" and any(each.recipe.upscale is not None for each in drawings):
                raise UserError(
                    'upscale enlarges a picture, and output_type "latent" gives none: leave one out'
                )
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
        batches, recipe = batches_of(drawings), drawings[0].recipe
        notes, drawn = [*self.notes, *self.system.notes, *picture_notes(drawings)], dict[int, Tensor]()
        plans = [plan for plan in (drawings[0].plan, drawings[0].second) if plan is not None]
        with Progress(self, plans, len(batches), callback, progress) as watch:
            try:
                for places in batches:
                    some, eyes = [drawings[k] for k in places], watch.of(places)
                    how = (self._loaded, self.device, notes, eyes.first, eyes.second)
                    coroutine = asking(self.system, some, *how)
                    latents = drawn_alone(self.system, some, self._loaded, coroutine)
                    drawn |= zip(places, latents, strict=True)
                    if watch.stopped:
                        break
                places = sorted(drawn)
                stacked = stack_latents([drawn[k] for k in places])
                canvases = [drawings[k].canvas for k in places]
                images = pictures(
                    self.system.autoencoder, stacked, output_type, canvases, self._larger(recipe)
                )
            finally:
                if self._offload:
                    self._offload.rest()
        return TextToImageOutput(images, [drawings[k].recipe for k in places], notes + self._told())

    def _told(self) -> list[str]:
        """What the backend has to say of what was drawn since the last time."""
        return self._placed.compiled.notes() if self._placed.compiled else []

    def _larger(self, recipe: Recipe) -> Callable[[Tensor], Tensor] | None:
        """What enlarges the decoded pictures (B, 3, H, W) of a recipe; None where they stay as large."""
        if recipe.upscale is None:
            return None
        upscaler = self._loaded.upscalers.get(recipe.upscaler)
        return partial(upscaler, outscale=recipe.upscale)

    @torch.no_grad()
    def interpolate(
        self,
        prompt: str,
        *,
        seeds: Sequence[int] = (0, 1),
        images: "Sequence[Original] | None" = None,
        frames: int = 8,
        method: Method = "slerp",
        negative_prompt: str | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> TextToImageOutput:
        """Draw `frames` pictures from each seed's picture to the next, or from each of `images`, both included.

        images: pictures, unguided, each led up to the noise that it comes from. method: the way between two noises,
        slerp or, which loses contrast, lerp. settings: as of a call. See `pipelines.interpolation`. Raises UserError.
        """
        (recipe,) = recipes_for(prompt, negative_prompt, [*seeds, 0][0], 1, settings)
        with self._turn():
            drawing = self._completed(asked_between(recipe, images), Given(), None)
            noises = noises_of(self.system, drawing, seeds, images, self._loaded, self.device)
        return interpolated(self.draw, drawing.recipe, noises, frames, method, progress)

    @torch.no_grad()
    def draw_each(
        self,
        recipes: Iterable[Recipe | Drawing],
        together: int = 8,
        progress: bool = False,
        waves: bool = False,
        callback: Callable[[int, Tensor], object] | None = None,
    ) -> Iterator[Drawn]:
        """Draw any recipes, or what `complete` made of them; yield each picture as soon as it is done, in no order.

        Unlike ones share the network's calls step by step (see `ldm.sampling.engine`), `together` of them at a time;
        each comes out as alone. waves: each `together` of them are drawn to their end before the next begin; then not
        even their last bits depend on how long others took. callback: called after each prediction, with a picture's
        place among the recipes and the estimate of its latents (1, C, h, w), for `preview`. What can't be drawn is
        yielded with its error. The pipeline is busy until the last one came, or the iterator was closed. Raises
        UserError.
        """
        if together < 1:
            raise UserError(f"together is {together}: give 1 or more")
        with self._turn(), counted(recipes, progress) as count:

            def stepped(place: int, step: Step) -> None:
                count()
                if callback is not None:
                    callback(place, step.x0)

            crowd = Crowd(self.system, self._loaded, self.device, together, waves)
            try:
                complete = partial(self._completed, given=Given(), like=None)
                for each in crowd.drawn(recipes, complete, stepped):
                    yield replace(each, notes=(*self.system.notes, *each.notes, *self._told()))
            finally:
                if self._offload:
                    self._offload.rest()

    def load_for(self, recipes: Sequence[Recipe], lora_folders: Sequence[Path] = ()) -> list[str]:
        """Load the ControlNets, IP-Adapters and LoRAs that recipes name; see `pipelines.loaded.Loaded.load_for`."""
        return self._loaded.load_for(recipes, lora_folders)

    def complete(
        self,
        recipe: Recipe,
        given: Given | None = None,
        like: Drawing | None = None,
        loras: Sequence[Lora] = (),
    ) -> Drawing:
        """Return the recipe with the model's defaults in place of every None, and how it is sampled.

        like: a drawing of before, to save time where it is sampled the same. loras: to take part beside those that the
        prompt asks for (see `Adapters.named`). Raises UserError for impossible values.
        """
        with self._turns.look(self.device):
            return self._completed(recipe, given or Given(), like, loras)

    def _completed(
        self, recipe: Recipe | Drawing, given: Given, like: Drawing | None, loras: Sequence[Lora] = ()
    ) -> Drawing:
        now = {
            **self._identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.system.quantization,
            "model_hash": self.system.fingerprint,
        }
        if isinstance(recipe, Drawing):
            canvas = recipe.canvas
            if canvas is None and recipe.recipe.image is not None and latents_of(recipe.given.image) is None:
                canvas = canvas_for(recipe.recipe, recipe.given)
            drawing = replace(recipe, recipe=replace(recipe.recipe, **now), canvas=canvas)
            return with_loaded(drawing, self._loaded)
        return completed(self.system, recipe, given, now, self._loaded, like, loras)

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Any:
        """PIL pictures of latents (B, C, h, w), nearly as decoded, by the tiny autoencoder that the model's folder has.

        Where it has none, and `load_preview` brought none, they are of one pixel a latent position, by a linear map.
        """
        return self._loaded.previews(latents)

    def load_preview(self, name: str | Path) -> None:
        """Preview by a tiny autoencoder from now on, such as TAESD for Stable Diffusion 1.x: see `Previews.load`."""
        self._loaded.previews.load(name)
