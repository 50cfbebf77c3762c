"""Larger pictures: a second pass over the whole at more pixels (AUTOMATIC1111's hires fix), and upscaling networks."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import file_hash
from ldm.diffusion.plan import Plan, plan
from ldm.sampling import decode, encode
from ldm.sampling.editing import first_step
from ldm.system import System
from pipelines.canvas import fitting
from pipelines.drawing import Drawing
from pipelines.files import whole_path
from pipelines.prompts import read_prompts
from pipelines.recipe import Recipe
from pipelines.registry import changed
from pipelines.upscaler import Upscaler, upscaler_file
from pipelines.uses import BUNDLED, PictureUse, UpscalerUse


class Upscalers:
    """The upscaling networks of one pipeline, each loaded when it is first used, with the hash of its file."""

    def __init__(self, device: torch.device):
        self._device = device
        self._loaded: dict[str, tuple[Upscaler, str]] = {}

    def to(self, device: torch.device) -> None:
        """Follow the system to a device."""
        self._device = device
        for upscaler, _ in self._loaded.values():
            upscaler.network.to(device)

    def get(self, use: UpscalerUse | None) -> Upscaler:
        """Return the network; None is the one that ships with the package. Raises UserError."""
        return self._known(_path(use))[0]

    def stated(self, use: UpscalerUse | None) -> UpscalerUse:
        """Return what a recipe says of the network, which is loaded, so that it fails now or never."""
        path = _path(use)
        return UpscalerUse(path, self._known(path)[1])

    def changed(self, uses: Iterable[UpscalerUse]) -> list[str]:
        """Load networks that recipes name; returns notes on what has changed since. Raises UserError."""
        return changed((use, self.stated(use)) for use in uses)

    def _known(self, path: str) -> tuple[Upscaler, str]:
        if path not in self._loaded:
            hashed = file_hash(upscaler_file(path))
            self._loaded[path] = Upscaler.from_pretrained(path, device=self._device), hashed
        return self._loaded[path]


def _path(use: UpscalerUse | None) -> str:
    return BUNDLED if use is None or use.path == BUNDLED else whole_path(use.path)


def stack_latents(latents: Sequence[Tensor]) -> Tensor:
    """(B, C, h, w) of latents (C, h, w); those of pictures that ended in the first pass come to the others' size."""
    shape = max(each.shape[1:] for each in latents)
    return torch.stack([_stretched(each, shape) for each in latents])


def _stretched(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents (C, h, w) of another (height, width) `shape`."""
    if latents.shape[1:] == shape:
        return latents
    return F.interpolate(latents[None].float(), shape, mode="bilinear")[0]


def second_size(recipe: Recipe, factor: int) -> tuple[int, int]:
    """Return (height, width) of the second pass of a complete recipe, in pixels."""
    assert recipe.hires_scale and recipe.height and recipe.width
    return fitting(
        round(recipe.height * recipe.hires_scale), round(recipe.width * recipe.hires_scale), factor
    )


def second_plan(system: System, recipe: Recipe) -> Plan | None:
    """Plan the second pass of a complete recipe; None where it has none. Raises UserError."""
    if recipe.hires_scale is None:
        return None
    assert recipe.hires_steps and recipe.hires_strength is not None
    whole = plan(
        system.scheduler,
        recipe.hires_steps,
        recipe.sampler,
        recipe.schedule,
        recipe.eta,
        is_xl=system.is_xl,
    )
    return whole.part(first_step(whole, recipe.hires_strength))


def second(system: System, drawing: Drawing, latents: Tensor, upscalers: Upscalers) -> Drawing:
    """Return what the second pass draws: the same, larger, from the latents (C, h, w) of the first pass."""
    recipe = drawing.recipe
    assert drawing.second is not None
    factor = system.autoencoder.config.factor
    height, width = size = second_size(recipe, factor)
    if recipe.hires_upscaler is None:
        begin = _stretched(latents.float(), (height // factor, width // factor))
    else:
        drawn = decode(system.autoencoder, latents[None]).float().clamp(0, 1)
        pixels = upscalers.get(recipe.hires_upscaler)(drawn)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        begin = encode(system.autoencoder, pixels)[0]
    first = (recipe.height, recipe.width)
    sizes = {
        name: size for name in ("original_size", "target_size") if getattr(recipe, name) == first
    }  # what SDXL is told by default
    larger = replace(
        recipe,
        height=height,
        width=width,
        image=PictureUse(None),
        strength=recipe.hires_strength,
        denoising_start=None,
        num_inference_steps=recipe.hires_steps,
        **sizes,
    )
    given = replace(drawing.given, image=begin, latents=None)
    if given.seed is not None:  # a generator has drawn on, and the recipe, which tells its seed, begins again
        given = replace(given, generator=None)
    return replace(
        drawing,
        recipe=larger,
        plan=drawing.second,
        prompts=read_prompts(larger),
        given=given,
        canvas=None,
        second=None,
    )
