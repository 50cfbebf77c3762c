"""The second stage: a U-Net that denoises latents under text embeddings (Rombach et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component, write_folder
from ldm.conditioning.load import load_text_encoder, write_tokenizers
from ldm.data.recipe import Recipe, RecipeConfig
from ldm.data.sprites import SPRITES_FILE, load_sprites
from ldm.diffusion.driver import Noise
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.losses import Weighting, diffusion_loss
from ldm.diffusion.plan import plan
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.unet import UNet, UNetConfig
from ldm.pictures import grid, to_pil, to_unit_range
from ldm.system import System
from ldm.training.latents import LatentCache
from ldm.training.share import Draws


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule, named as in diffusers' scheduler_config.json."""

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    rescale_betas_zero_snr: bool = True


@dataclass(frozen=True)
class TextToImageObjectiveConfig:
    """What is learnt from what.

    autoencoder, text_encoder: folders that hold `vae`, and `text_encoder` with `tokenizer`; both stay frozen.
    latents: folder of the pool of encoded compositions; cached_pictures: its size, in whole shards of 2048. A longer
        run goes over it again, reshuffled.
    condition_dropout: share of captions replaced by the empty one, for classifier-free guidance (Ho & Salimans 2022).
    validation_prompts: drawn at every validation, two seeds each.
    """

    autoencoder: str
    text_encoder: str
    latents: str
    model: UNetConfig = field(default_factory=UNetConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    sprites: str = str(SPRITES_FILE)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_type: str = "v_prediction"
    weighting: Weighting = "min_snr"
    gamma: float = 5.0
    cached_pictures: int = 131_072
    condition_dropout: float = 0.1
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 20
    validation_guidance: float = 3.5


@dataclass(frozen=True)
class Batch:
    """latents: (B, C, h, w), unit variance."""

    latents: Tensor
    captions: list[str]


class TextToImageObjective:
    """Weighted mean squared error of the prediction, at uniformly drawn timesteps."""

    def __init__(self, config: TextToImageObjectiveConfig):
        self.config = config
        self.model: nn.Module = UNet(config.model)
        self.autoencoder = load_autoencoder(Path(config.autoencoder))
        self.text = load_text_encoder(Path(config.text_encoder))
        self.schedule = NoiseSchedule.build(**vars(config.schedule))
        recipe = Recipe(load_sprites(config.sprites), config.recipe)
        self.cache = LatentCache(Path(config.latents), recipe, self.autoencoder, config.cached_pictures)

    def to(self, device: torch.device) -> None:
        for module in (self.autoencoder, *self.text.modules.values()):
            module.to(device)

    def batch(self, start: int, size: int, rows: slice) -> Batch:
        return Batch(*self.cache.read(start, size, rows))

    def loss(self, model: nn.Module, batch: Batch, rng: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(model.parameters()).device
        dropped = (rng.uniform() < self.config.condition_dropout).tolist()
        condition = self.embed(
            ["" if drop else c for drop, c in zip(dropped, batch.captions, strict=True)], device
        )
        noise = rng.normal(*batch.latents.shape[1:])
        timestep = rng.integers(self.schedule.num_train_timesteps)
        losses = diffusion_loss(
            lambda x, timestep: model(x, timestep, condition),
            batch.latents.to(device, memory_format=torch.channels_last),
            noise.to(device, memory_format=torch.channels_last),
            timestep.to(device),
            self.schedule,
            self.config.prediction_type,
            self.config.weighting,
            self.config.gamma,
        )
        return losses.mean(), {}

    @torch.no_grad()
    def embed(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """(B, L, D), float32."""
        return self.text.encode(captions)[0].hidden.float().to(device)

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Draws the validation prompts with DDIM and guidance; a row a seed, a column a prompt."""
        prompts = list(self.config.validation_prompts)
        if not prompts:
            return {}
        device = next(model.parameters()).device
        conditions = self.embed([""] * len(prompts) * 2 + prompts * 2, device)
        network = lambda x, timestep: model(x, timestep, conditions[-len(x) :])  # noqa: E731
        how = plan(self.scheduler(), self.config.validation_steps)
        denoise = classifier_free(how.denoiser(network), self.config.validation_guidance)
        seeds = [seed for seed in (0, 1) for _ in prompts]
        latents = how.sample(denoise, Noise(seeds, self.latent_shape, device))
        decoded = self.autoencoder.decode(self.autoencoder.unscale(latents))
        grid(to_pil(to_unit_range(decoded)), len(prompts)).save(folder / f"drawn-{seen:08d}.png")
        return {}

    def scheduler(self) -> SchedulerConfig:
        """The sampling that the finished model is shipped with: DDIM, trailing, from pure noise."""
        values = {
            **vars(self.config.schedule),
            "prediction_type": self.config.prediction_type,
            "timestep_spacing": "trailing",
            "steps_offset": 1,  # trailing has no use for it, but diffusers' pipeline insists
            "clip_sample": False,
            "set_alpha_to_one": True,
        }
        return SchedulerConfig("DDIMScheduler", values)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.recipe.size // self.autoencoder.config.factor
        return self.config.model.in_channels, side, side

    def export(self, model: nn.Module, folder: Path) -> None:
        """A whole system as a diffusers folder, float16 on disk."""
        assert isinstance(model, UNet)
        options = {
            "num_inference_steps": self.config.validation_steps,
            "guidance_scale": self.config.validation_guidance,
        }
        system = System(model, self.autoencoder, self.text, self.scheduler(), options=options)
        write_folder(folder, half(system.checkpoint()), lambda new: write_tokenizers(self.text, new))


def half(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights in float16, for a small file; they are computed with in whatever precision they are loaded."""
    tensors = {
        part: {name: each.half() if each.is_floating_point() else each for name, each in own.items()}
        for part, own in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """The frozen first stage from a folder that holds `vae`, in float32 whatever it is stored in."""
    config, tensors = read_component(folder, "vae")
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderConfig.from_diffusers(config, f"{folder}/vae/config.json"))
    load_strict(model, tensors, folder / "vae")
    return model.float().eval().requires_grad_(False)
