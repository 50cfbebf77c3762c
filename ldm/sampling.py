"""The one place that draws: prompts to a request, a request to latents, latents to pixels.

    request = prepare(system, plan, prompts, seeds, guidance=Guidance(7.5))
    pixels = decode(system.autoencoder, sample(system, request))

The pipelines, validation in training and evaluation draw through it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.condition import Condition, concatenate
from ldm.conditioning.text import encode_pair
from ldm.diffusion.driver import Noise, Step
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.plan import Plan
from ldm.errors import UserError
from ldm.models import large
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.pictures import to_unit_range
from ldm.system import System


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; see `ldm.diffusion.guidance.classifier_free`, whose arguments these are."""

    scale: float | Tensor = 7.5
    rescale: float | Tensor = 0.0
    interval: tuple[float | Tensor, float | Tensor] = (0.0, math.inf)

    @property
    def guides(self) -> bool:
        """Whether any image is guided, so that the condition without the prompt is needed."""
        return bool((torch.as_tensor(self.scale) > 1).any())


@dataclass(frozen=True)
class Request:
    """Pictures to draw together, all under one plan.

    condition: B rows; where guided 2B, the first B without the prompt. noise: of B images.
    notes: what the user should know of how the prompts were read.
    """

    plan: Plan
    condition: Condition
    noise: Noise
    guidance: Guidance = field(default_factory=Guidance)
    notes: tuple[str, ...] = ()


def prepare(
    system: System,
    plan: Plan,
    prompts: Sequence[str],
    seeds: Sequence[int | torch.Generator],
    *,
    negatives: Sequence[str] | None = None,
    guidance: Guidance | None = None,
    clip_skip: int = 0,
    size: tuple[int, int] | None = None,
    sizes: Sequence[int] | None = None,
    channels: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Request:
    """Encode B prompts and put together all that drawing them needs.

    negatives: B of them, or None for no negative prompt. size: (height, width) in pixels, multiples of the
    autoencoder's factor; None is the model's own. sizes: the six numbers that SDXL is told (see `Condition.time_ids`);
    None tells it of a whole picture of `size`. channels: (B, c, h, w), for a network that takes more than latents.
    device: where the network computes; None is where its weights are. Raises UserError.
    """
    guidance = guidance or Guidance()
    device = torch.device(device or system.network.device)
    height, width = size or (system.default_size, system.default_size)
    if guidance.guides:
        positive, negative, notes = encode_pair(system.text, prompts, negatives, clip_skip)
        text = concatenate([negative, positive])
        channels = None if channels is None else torch.cat([channels, channels])
    else:
        text, notes = system.text.encode(prompts, clip_skip=clip_skip)
    if channels is None and "channels" in system.wants:
        channels = nothing_seen(system, text.rows, (height, width), device)
    told = torch.tensor([sizes or (height, width, 0, 0, height, width)], dtype=torch.float32)
    condition = system.condition(text, told.expand(text.rows, -1), channels)
    config = system.autoencoder.config
    shape = (config.latent_channels, height // config.factor, width // config.factor)
    return Request(
        plan,
        condition.to(device, system.network.dtype),
        Noise(seeds, shape, device),
        guidance,
        tuple(notes),
    )


def check_channels(system: System) -> None:
    """Raise UserError for a network that takes channels of which nobody here knows what belongs there."""
    wanted, latent = system.wants.get("channels"), system.autoencoder.config.latent_channels
    if wanted not in (None, 1 + latent):
        raise UserError(
            f"the {system.network.component} takes {latent + (wanted or 0)} channels where latents have {latent}, and "
            "what is more is no mask and masked picture: such a model can't draw from text"
        )


def nothing_seen(system: System, rows: int, size: tuple[int, int], device: torch.device | str) -> Tensor:
    """Return the channels (rows, 1 + C, h, w) by which an inpainting network draws all of a picture.

    Its mask is 1 everywhere, and what it sees are the latents of grey, as of a picture that is masked whole.
    Raises UserError for a network whose additional channels are others.
    """
    check_channels(system)
    autoencoder = system.autoencoder
    wake(autoencoder)
    grey = torch.zeros(1, 3, *size, device=device, dtype=autoencoder.encoder.conv_in.weight.dtype)
    latents = autoencoder.scale(autoencoder.encode(grey).mean)
    return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1).expand(rows, -1, -1, -1)


def sample(system: System, request: Request, callback: Callable[[Step], bool | None] | None = None) -> Tensor:
    """Draw the latents (B, C, h, w), float32, of about unit variance. callback: see `ldm.diffusion.driver.sample`."""
    denoiser = request.plan.denoiser(system.bind(request.condition))
    guidance = request.guidance
    denoise = classifier_free(denoiser, guidance.scale, guidance.rescale, guidance.interval)
    return request.plan.sample(denoise, request.noise, callback)


def decode(autoencoder: AutoencoderKL, latents: Tensor, tile: int | None = None) -> Tensor:
    """Decode latents (B, C, h, w) to pictures (B, 3, H, W) in [0, 1], in the autoencoder's own precision.

    tile: None is all at once where it fits into the free memory, and in strips where not; see `ldm.models.large`.
    """
    wake(autoencoder)
    unscaled = autoencoder.unscale(latents).to(autoencoder.decoder.conv_in.weight.dtype)
    return to_unit_range(large.decode(autoencoder, unscaled, tile))


def encode(
    autoencoder: AutoencoderKL, pictures: Tensor, noise: Tensor | None = None, tile: int | None = None
) -> Tensor:
    """Encode pictures (B, 3, H, W) in [0, 1] to latents (B, C, h, w), float32, of about unit variance.

    H, W: multiples of the autoencoder's factor. noise: (B, C, h, w), of unit variance, by which the posterior is
    sampled; None takes its mean. tile: as for `decode`. Raises UserError.
    """
    wake(autoencoder)
    signed = (pictures * 2 - 1).to(autoencoder.encoder.conv_in.weight.dtype)
    posterior = large.encode(autoencoder, signed, tile)
    posterior = DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())
    return autoencoder.scale(posterior.mean if noise is None else posterior.sample(noise))


def wake(module: nn.Module) -> None:
    """Bring a part that accelerate keeps elsewhere to its device, before a method other than `forward` is called."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
