"""The one place that draws: prompts to a request, a request to latents, latents to pixels.

    request = prepare(system, plan, prompts, seeds, guidance=Guidance(7.5))
    pixels = decode(system.autoencoder, sample(system, request))

The pipelines, validation in training and evaluation draw through it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ldm.condition import AESTHETIC_SCORES, Condition, concatenate
from ldm.conditioning.control import Control, Controls
from ldm.conditioning.image_prompt import ImagePrompt, image_parts
from ldm.conditioning.prompts.weighted import Prompt, as_prompts
from ldm.conditioning.text import TextEncoder, encode_pair
from ldm.diffusion.denoiser import Asking, Denoise, answered
from ldm.diffusion.driver import Callback, Noise
from ldm.diffusion.guidance import by_step, known_pixels
from ldm.diffusion.plan import Plan
from ldm.errors import UserError
from ldm.models import large
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.feature_reuse import FeatureReuse
from ldm.pictures import to_unit_range
from ldm.sampling.feature_reuse import reusing
from ldm.sampling.guidance import Guidance
from ldm.sampling.likelihood_guidance import Guide
from ldm.system import System


@dataclass(frozen=True)
class Known:
    """The parts of B pictures that are known: `latents` (B, C, h, w) where `mask` (B, 1, h, w) is 0, not where it is 1.

    noise: (B, C, h, w), of unit variance, under which the network sees them at every noise level.
    """

    latents: Tensor
    mask: Tensor
    noise: Tensor

    def around(self, denoise: Denoise, first_sigma: float) -> Denoise:
        """Put them into what a denoiser sees after the first noise level, and into all that it says."""
        return known_pixels(denoise, self.latents, self.mask, self.noise, first_sigma)

    def onto(self, latents: Tensor) -> Tensor:
        """Put them into what was drawn: a last noise level above zero leaves something of the noise."""
        return self.latents + self.mask * (latents - self.latents)


@dataclass(frozen=True)
class Request:
    """Pictures to draw together, all under one plan.

    condition: B rows; where guided 2B, the first B without the prompt. noise: of B images. latents: (B, C, h, w), the
    first noise, of unit variance; None takes it from `noise`. x0: (B, C, h, w), clean latents that the noise is added
    to. state: (B, C, h, w), what a request whose plan ended early gave, to go on from. known: what is not to be
    drawn. controls: what steers the network beside the text. guides: what moves its estimates, each around the one
    before. changes: (step, condition) in ascending order, where
    prompts change: from step number `step` of the whole plan, counted from 0, that condition holds in place of the one
    before. notes: what the user should know of how the prompts were read. token_merging: the share of tokens that the
    network merges, see `ldm.models.token_merging`; feature_reuse: every how many steps all of it is computed, see
    `ldm.models.feature_reuse`. Both are approximations: 0 and 1 are exact.
    """

    plan: Plan
    condition: Condition
    noise: Noise
    guidance: Guidance = field(default_factory=Guidance)
    latents: Tensor | None = None
    x0: Tensor | None = None
    state: Tensor | None = None
    known: Known | None = None
    controls: tuple[Control, ...] = ()
    guides: tuple[Guide, ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[tuple[int, Condition], ...] = ()
    token_merging: float = 0.0
    feature_reuse: int = 1


def prepare(
    system: System,
    plan: Plan,
    prompts: Sequence[str | Prompt] | Condition,
    seeds: Sequence[int | torch.Generator],
    *,
    negatives: Sequence[str | Prompt] | None = None,
    guidance: Guidance | None = None,
    clip_skip: int = 0,
    size: tuple[int, int] | None = None,
    sizes: Sequence[int] | None = None,
    negative_sizes: Sequence[int] | None = None,
    aesthetic_score: float | None = None,
    negative_aesthetic_score: float | None = None,
    channels: Tensor | None = None,
    images: Sequence[ImagePrompt] = (),
    latents: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Request:
    """Encode B prompts and put together all that drawing them needs.

    prompts: strings are taken as they are; `read_prompt` in ldm.conditioning.prompts.reading makes others, for as many
    steps as the whole plan has. In their place a Condition: their text of B rows; where guided 2B, the negatives first.
    negatives: B of them, or None for no negative prompt. size: (height, width) in pixels, multiples of the
    autoencoder's factor; None is the model's own. sizes: the six numbers that SDXL is told (see `Condition.time_ids`);
    None tells it of a whole picture of `size`. negative_sizes: those without the prompt; None is the same, but without
    a crop for the refiner, as in diffusers. aesthetic_score, negative_aesthetic_score: what SDXL's refiner is told with
    and without the prompt, commonly 1 to 10; None is 6 and 2.5. channels: (B, c, h, w), for a network that takes more
    than latents. images: pictures as prompts. latents: see `Request`. device: where the network computes; None is where
    its weights are. Raises UserError.
    """
    guidance = (guidance or Guidance()).of(system.wants)
    device = torch.device(device or system.network.device)
    height, width = size or (system.default_size, system.default_size)
    shown = image_parts(images, system.network, len(seeds), guidance.guides) if images else None
    sizes = sizes or (height, width, 0, 0, height, width)
    told = _told(system, sizes, negative_sizes, aesthetic_score, negative_aesthetic_score)

    def whole(text: Condition) -> Condition:
        more = channels
        if more is None and "channels" in system.wants:
            more = nothing_seen(system, text.rows, (height, width), device)
        elif more is not None and guidance.guides:
            more = torch.cat([more, more])
        halves = told if guidance.guides else told[1:]
        rows = halves.repeat_interleave(text.rows // len(halves), dim=0)
        condition = system.condition(text, rows[:, :6], more, rows[:, 6], guidance.scale)
        if shown:
            condition = replace(condition, images=shown)
        return condition.to(device, system.network.dtype)

    if isinstance(prompts, Condition):
        texts, notes = [(0, prompts)], list[str]()
    else:
        against = negatives if guidance.guides else None
        texts, notes = _texts(system.text, prompts, against, guidance.guides, clip_skip)
    made = {id(text): whole(text) for _, text in texts}
    (_, first), *later = [(step, made[id(text)]) for step, text in texts]
    config = system.autoencoder.config
    shape = (config.latent_channels, height // config.factor, width // config.factor)
    return Request(
        plan,
        first,
        Noise(seeds, shape, device),
        guidance,
        None if latents is None else latents.to(device),
        changes=tuple(later),
        notes=(*notes, *guidance.notes(_any_words(negatives or ()))),
    )


def _any_words(prompts: Sequence[str | Prompt]) -> bool:
    """Whether any of the prompts says anything."""
    texts = [text for each in prompts for text in ([each] if isinstance(each, str) else each.texts)]
    return any(text if isinstance(text, str) else text.text for text in texts)


def _told(
    system: System,
    sizes: Sequence[int],
    negative_sizes: Sequence[int] | None,
    score: float | None,
    negative_score: float | None,
) -> Tensor:
    """What SDXL is told without the prompt and with it: (2, 7), six sizes and the aesthetic score. Raises UserError."""
    check_scores(system, score, negative_score)
    against = negative_sizes or sizes
    if system.requires_aesthetics_score and negative_sizes is None:
        against = (*sizes[:2], 0, 0, *sizes[4:])
    usual, least = AESTHETIC_SCORES
    halves = [
        (*against, least if negative_score is None else negative_score),
        (*sizes, usual if score is None else score),
    ]
    return torch.tensor(halves, dtype=torch.float32)


def check_scores(system: System, score: float | None, negative_score: float | None) -> None:
    """Raise UserError for aesthetic scores that are told to a model that knows none, or that are no numbers."""
    for name, given in (("aesthetic_score", score), ("negative_aesthetic_score", negative_score)):
        if given is not None and not system.requires_aesthetics_score:
            raise UserError(f"{name} is for SDXL's refiner, and this model is told none: leave it out")
        if given is not None and not math.isfinite(given):
            raise UserError(f"{name} is {given}: give a number, commonly 1 to 10")


def _texts(
    encoder: TextEncoder,
    prompts: Sequence[str | Prompt],
    negatives: Sequence[str | Prompt] | None,
    guided: bool,
    clip_skip: int,
) -> tuple[list[tuple[int, Condition]], list[str]]:
    """From which step on which embedding of all prompts holds, and the notes. Equal texts are encoded once.

    Each of B rows; where guided 2B, the negatives first. Steps with the same texts share one embedding.
    """
    own = as_prompts(prompts)
    against = None if negatives is None else as_prompts(negatives)
    if against is not None and len(against) != len(own):
        raise UserError(f"{len(against)} negative prompts for {len(own)} prompts: give one for each")
    everything = [*own, *(against or [])]
    steps = sorted({segment.step for each in everything for segment in each.segments})
    at = {step: (tuple(p.at(step) for p in own), tuple(p.at(step) for p in against or ())) for step in steps}
    kinds = list(dict.fromkeys(at.values()))
    positives = [text for kind, _ in kinds for text in kind]
    notes = [note for each in everything for note in each.notes]
    if guided:
        others = None if against is None else [text for _, kind in kinds for text in kind]
        positive, negative, more = encode_pair(encoder, positives, others, clip_skip)
        halves = [negative, positive]
    else:
        positive, more = encoder.encode(positives, clip_skip=clip_skip)
        halves = [positive]
    rows = len(own)
    made = {
        kind: concatenate([half.map(lambda part, k=k: part[k * rows : (k + 1) * rows]) for half in halves])
        for k, kind in enumerate(kinds)
    }
    return [(step, made[at[step]]) for step in steps], list(dict.fromkeys(notes + more))


def controlled(system: System, request: Request, controls: Sequence[Control]) -> Request:
    """Steer a request by ControlNets with their pictures, which are on the same device. Raises UserError."""
    config = system.autoencoder.config
    height, width = (side * config.factor for side in request.noise.shape[1:])
    images = len(request.noise.generators)
    for k, each in enumerate(controls):
        where = "the ControlNet" if len(controls) == 1 else f"ControlNet {k + 1} of {len(controls)}"
        each.check(system.network, config.latent_channels, config.factor, images, (height, width), where)
    return replace(request, controls=tuple(controls))


def guided(request: Request, guides: Sequence[Guide]) -> Request:
    """Let a request be guided by more than its prompt, such as a classifier. Raises UserError."""
    for each in guides:
        each.check(request.plan, request.noise.shape, len(request.noise.generators))
    return replace(request, guides=tuple(guides))


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
    latents = encode(system.autoencoder, torch.full((1, 3, *size), 0.5, device=device))
    return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1).expand(rows, -1, -1, -1)


def run(system: System, request: Request, callback: Callback | None = None) -> Asking:
    """Draw the latents (B, C, h, w), float32, of about unit variance, as a coroutine that asks the network.

    callback: see `ldm.diffusion.driver.run`.
    """
    plan, guidance = request.plan, request.guidance
    controls = None
    if request.controls:
        for each in request.controls:
            wake(each.network)
        windows = [plan.window(each.start, each.end) for each in request.controls]
        controls = Controls(
            request.controls, windows, request.condition.rows // (2 if guidance.guides else 1)
        )

    def under(condition: Condition) -> Denoise:
        reuse = FeatureReuse() if request.feature_reuse > 1 else None
        denoiser = plan.denoiser(system.bind(condition, controls, reuse, request.token_merging))
        denoise = guidance.around(denoiser)
        return denoise if reuse is None else reusing(denoise, reuse, plan, request.feature_reuse)

    denoise = under(request.condition)
    if request.changes:
        parts = [(0, denoise), *((step, under(condition)) for step, condition in request.changes)]
        denoise = by_step(parts, plan.sigmas)
    if request.guides:  # around the config's limits on x0, as in the paper's code
        denoise = plan.wrap(denoise)
        for each in request.guides:
            denoise = each.around(denoise, plan)
        plan = replace(plan, wrappers=())
    if request.known is not None:
        denoise = request.known.around(denoise, plan.first_sigma)
    latents = yield from plan.run(
        denoise, request.noise, callback, request.latents, request.x0, request.state
    )
    whole = plan.span is None or plan.span.stop == len(plan.sigmas) - 1
    return latents if request.known is None or not whole else request.known.onto(latents)


def sample(system: System, request: Request, callback: Callback | None = None) -> Tensor:
    """Draw one request by itself: see `run`; `ldm.sampling.engine` draws many together."""
    return answered(run(system, request, callback))


def decode(autoencoder: AutoencoderKL, latents: Tensor, tile: int | None = None) -> Tensor:
    """Decode latents (B, C, h, w) to pictures (B, 3, H, W) in [0, 1], in the autoencoder's own precision.

    tile: None is all at once where it fits into the free memory, and in strips where not; see `ldm.models.large`.
    """
    wake(autoencoder)
    unscaled = autoencoder.unscale(latents).to(next(autoencoder.decoder.parameters()).dtype)
    return to_unit_range(large.decode(autoencoder, unscaled, tile))


def encode(
    autoencoder: AutoencoderKL, pictures: Tensor, noise: Tensor | None = None, tile: int | None = None
) -> Tensor:
    """Encode pictures (B, 3, H, W) in [0, 1] to latents (B, C, h, w), float32, of about unit variance.

    H, W: multiples of the autoencoder's factor. noise: (B, C, h, w), of unit variance, by which the posterior is
    sampled; None takes its mean. tile: as for `decode`. Raises UserError.
    """
    wake(autoencoder)
    signed = (pictures * 2 - 1).to(next(autoencoder.encoder.parameters()).dtype)
    posterior = large.encode(autoencoder, signed, tile)
    posterior = DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())
    return autoencoder.scale(posterior.mean if noise is None else posterior.sample(noise))


def wake(module: nn.Module) -> None:
    """Bring a part that accelerate keeps elsewhere to its device, before a method other than `forward` is called."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
