"""The system that text-to-image training starts from: one that is there, or frozen parts and a new U-Net."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component
from ldm.conditioning.load import load_text_encoder
from ldm.diffusion.scheduler_config import CLASSES, SchedulerConfig
from ldm.errors import UserError, nearest
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.unet import UNet, UNetConfig
from ldm.system import System

BUNDLED = "bundled"
_TRAIN_FIRST = (
    "train a first stage with scripts/train.py, such as configs/autoencoder-kl.yaml, and give its export"
)
_PREPARE_FIRST = "run scripts/prepare_data.py first, or give a model's folder"


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule, named as in diffusers' scheduler_config.json."""

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    rescale_betas_zero_snr: bool = True


@dataclass(frozen=True)
class NewConfig:
    """A U-Net from nothing.

    autoencoder, text_encoder: folders that hold `vae`, and `text_encoder` with `tokenizer`; both stay frozen.
    steps, guidance: what the finished model is drawn with by default.
    """

    autoencoder: str
    text_encoder: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_type: str = "v_prediction"
    steps: int = 20
    guidance: float = 3.5


def starting_system(
    base: str | NewConfig,
    variant: str | None,
    scheduler: dict[str, Any],
    torch_dtype: torch.dtype,
    variance: bool,
    inpainting: bool,
) -> System:
    """Return the system that training starts from: see `new_system` and `base_system`.

    variance: the U-Net learns it, too. inpainting: see `for_inpainting`. Raises UserError.
    """
    if isinstance(base, NewConfig):
        system = new_system(base)
    else:
        system = base_system(base, variant, scheduler, torch_dtype)
    if variance:  # so that ddpm draws with it
        system = replace(system, scheduler=system.scheduler.with_values(variance_type="learned_range"))
    return for_inpainting(system) if inpainting else system


def check_channels(system: System, variance: bool, inpainting: bool) -> None:
    """Raise UserError for a U-Net that takes or gives other channels than training does."""
    network, channels = system.network.config, system.autoencoder.config.latent_channels
    out = channels * (2 if variance else 1)
    if network.out_channels != out:
        raise UserError(
            f"the U-Net gives {network.out_channels} channels: {'with' if variance else 'without'} a learned variance "
            f"(loss.variance) set out_channels to {out}"
        )
    taken = 2 * channels + 1 if inpainting else channels
    if network.in_channels != taken:
        advice = "" if inpainting else ": set in_channels, or inpainting: true for an inpainting model"
        raise UserError(
            f"the U-Net takes {network.in_channels} channels where training gives it {taken}{advice}"
        )


def check_untold(where: str, wants: Collection[str]) -> None:
    """Raise UserError for a network that is told the guidance scale, of which pictures and captions say nothing.

    where: the objective. wants: the parts of a condition that the network wants.
    """
    if "guidance" in wants:
        raise UserError(
            f"{where}: the U-Net is told the guidance scale (time_cond_proj_dim), which only distillation of a guided "
            "teacher teaches: train the model that it was distilled from, and distil that again"
        )


def new_system(config: NewConfig) -> System:
    """Build the parts in float32, frozen but for the new U-Net; DDIM, trailing, from pure noise. Raises UserError."""
    values = {
        **vars(config.schedule),
        "prediction_type": config.prediction_type,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # trailing has no use for it, but diffusers' pipeline insists
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    system = System(
        UNet(config.unet),
        load_autoencoder(_there("autoencoder", config.autoencoder, _TRAIN_FIRST)),
        load_text_encoder(_there("text_encoder", config.text_encoder, _PREPARE_FIRST)),
        SchedulerConfig("DDIMScheduler", values),
        options={"num_inference_steps": config.steps, "guidance_scale": config.guidance},
    )
    system.check("text_to_image.base")
    return system


def _there(key: str, folder: str, otherwise: str) -> Path:
    if not Path(folder).is_dir():
        raise UserError(f"text_to_image.base.{key}: there is no folder {folder}: {otherwise}")
    return Path(folder)


def base_system(
    name: str, variant: str | None, scheduler: dict[str, Any], torch_dtype: torch.dtype
) -> System:
    """Load a folder, a single file, a hub id or "bundled", frozen.

    scheduler: values in place of its own, e.g. a zero terminal SNR to be learned; `_class_name` names another of
    diffusers' classes. Raises UserError.
    """
    system = System.load(None if name == BUNDLED else name, torch_dtype=torch_dtype, variant=variant)
    values = {**system.scheduler.to_dict(), **scheduler}
    changed = SchedulerConfig.from_dict(values, "text_to_image.scheduler")
    known = CLASSES[changed.class_name].defaults if changed.class_name in CLASSES else {}
    for key in scheduler.keys() - {"_class_name"}:
        if key not in known:
            raise UserError(
                f"text_to_image.scheduler: {changed.class_name} has no {key!r}{nearest(key, known)}; another class "
                "may, such as _class_name: DDIMScheduler"
            )
    return replace(system, scheduler=changed)


def for_inpainting(system: System) -> System:
    """Return the system with a U-Net that also takes a mask and the latents of what is to be seen: 2C + 1 channels.

    The new channels start without a say, as in SD's inpainting models. Raises UserError for other channels.
    """
    network, channels = system.network, system.autoencoder.config.latent_channels
    if network.config.in_channels not in (channels, 2 * channels + 1):
        raise UserError(
            f"the U-Net takes {network.config.in_channels} channels: inpainting starts from {channels} or "
            f"{2 * channels + 1}"
        )
    if network.config.in_channels == channels:
        network.take_channels(2 * channels + 1)
    kind = "StableDiffusionXLInpaintPipeline" if system.is_xl else "StableDiffusionInpaintPipeline"
    return replace(system, pipeline=kind)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Return the frozen first stage from a folder that holds `vae`, in float32 whatever it is stored in."""
    config, tensors = read_component(folder, "vae")
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderConfig.from_diffusers(config, f"{folder}/vae/config.json"))
    load_strict(model, tensors, folder / "vae")
    return model.float().eval().requires_grad_(False)


def half(checkpoint: Checkpoint) -> Checkpoint:
    """Return the weights in float16, for a small file; they are computed with in the precision of loading."""
    tensors = {
        part: {name: each.half() if each.is_floating_point() else each for name, each in own.items()}
        for part, own in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)
