"""A U-Net that denoises latents under text (Rombach et al. 2022): from nothing, fine-tuned whole, or by a small part.

What is trained is a kind of `train`. Inpainting, and DreamBooth's prior preservation (Ruiz et al. 2023), go beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioning.control import Control
from ldm.diffusion.losses import LossConfig, prediction_loss
from ldm.diffusion.parameterization import check
from ldm.errors import UserError
from ldm.files import write_bytes
from ldm.pictures import png
from ldm.training.bounds import refuse_loss, refuse_outside
from ldm.training.data.conditions import Conditions
from ldm.training.data.inpainting import draw_masks, inpainting_channels, middle_masks
from ldm.training.data.kinds import Data
from ldm.training.data.latents import LatentBatch
from ldm.training.data.on_disk import PicturesConfig
from ldm.training.data.prior import PriorConfig
from ldm.training.distributed import BatchGenerator, processes
from ldm.training.drawing import ValidationConfig, check_steps
from ldm.training.noising import noised_batch
from ldm.training.start import NewConfig, check_channels, check_untold, starting_system
from ldm.training.trainable.controlnet import TrainControlNet
from ldm.training.trainable.lora import TrainLoRA
from ldm.training.trainable.model import TrainableModel
from ldm.training.trainable.textual_inversion import TrainTextualInversion
from ldm.training.trainable.unet import TrainUNet


@dataclass(frozen=True)
class Config:
    """The settings: what is trained, from what, on what.

    base: a model to start from (a folder, a single file, a hub id, or "bundled"), or a section: a U-Net from nothing.
        variant: of the base's files, such as fp16.
    data: of a kind: `pictures` from disk, or of one's own.
    train: of a kind: the whole `unet`, a `lora`, a `textual_inversion`, or a `controlnet`.
    inpainting: the U-Net also sees a random mask and what lies outside of it.
    prior: class pictures beside those of an instance.
    condition_dropout: share of captions left out, for classifier-free guidance (Ho & Salimans 2022).
    caption_windows: of the text encoder, 77 tokens each in CLIP, that every caption is padded to; what is longer is
        cut. More than one go with pictures that are drawn from prompts as long.
    scheduler: values in place of the base's own, e.g. {rescale_betas_zero_snr: true, prediction_type: v_prediction}.
    frozen: the precision in which what is not trained is held.
    """

    renamed: ClassVar[dict[str, str]] = {
        "compositions": "data, with kind: compositions",
        "pictures": "data, with kind: pictures",
        "new": "base",
        "lora": "train, with kind: lora",
        "word": "train, with kind: textual_inversion",
        "text_encoder": "train.text_encoder, with kind: unet",
        "windows": "caption_windows",
    }

    base: str | NewConfig
    data: Data
    variant: str | None = None
    train: TrainUNet | TrainLoRA | TrainTextualInversion | TrainControlNet = field(default_factory=TrainUNet)
    inpainting: bool = False
    prior: PriorConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    condition_dropout: float = 0.1
    caption_windows: int = 1
    scheduler: dict[str, Any] = field(default_factory=dict)
    frozen: Literal["float32", "bfloat16", "float16"] = "float32"
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        """Raises UserError for settings that do not go together."""
        from_nothing = isinstance(self.base, NewConfig)
        self.train.check(from_nothing, self.inpainting)
        self.train.check_data(self.data.conditioned, self.prior is not None)
        if from_nothing and (self.scheduler or self.prior):
            raise UserError("scheduler and prior go with a base that is there, not with a U-Net from nothing")
        if self.prior:
            self.prior.check("text_to_image.prior", self.data)
        if isinstance(self.data, PicturesConfig) and self.data.encoding == "float32" != self.frozen:
            raise UserError("text_to_image.data.encoding float32 needs text_to_image.frozen float32")
        refuse_outside("text_to_image", self, ("condition_dropout",), 0, 1)
        refuse_outside("text_to_image", self, ("caption_windows",), 1)
        refuse_outside("text_to_image.validation", self.validation, ("seeds", "steps"), 1)
        refuse_loss("text_to_image.loss", self.loss)
        if self.loss.decoder != "gaussian":
            raise UserError(
                "text_to_image.loss.decoder is of pixels, and latents have no levels: leave it gaussian"
            )
        self.data.check("text_to_image.data")


class Objective:
    """Weighted mean squared error of the prediction, at timesteps drawn uniformly, or shifted towards noise."""

    def __init__(self, config: Config):
        config.check()
        if config.frozen != "float32" and str(processes().device) == "cpu":
            raise UserError(f"text_to_image.frozen {config.frozen} is for GPUs: use float32 on the CPU")
        self.config = config
        self.system = starting_system(
            config.base,
            config.variant,
            config.scheduler,
            getattr(torch, config.frozen),
            bool(config.loss.variance),
            config.inpainting,
        )
        self.schedule = self.system.scheduler.noise_schedule()
        self.prediction_type: str = self.system.scheduler.get("prediction_type")
        check(self.prediction_type, self.schedule)
        if config.validation.prompts:
            check_steps("text_to_image.validation.steps", self.system, config.validation.steps)
        with_pictures = config.inpainting or config.train.wants_pictures
        self.source = config.data.latents("text_to_image.data", self.system, with_pictures)
        if config.prior:
            arguments = self.source, config.data, self.system, with_pictures
            self.source = config.prior.source("text_to_image.prior", *arguments)
        self.trained = config.train.model(self.system)
        self.model: nn.Module = self.trained
        self.watched = "loss"
        check_channels(self.system, bool(config.loss.variance), config.inpainting)
        check_untold("text_to_image", self.system.wants)
        if self.source.captions:
            config.train.check_captions(self.source.captions)
        cache = config.data.text_cache if self.trained.text is None else None
        self.conditions = Conditions(self.system.text, config.caption_windows, cache)

    def prepare(self, device: torch.device, batch_size: int) -> None:
        """Move everything; draw DreamBooth's class pictures and fill the caches, as far as they are not there."""
        self.batch_size = batch_size
        for module in (self.model, *self.system.modules().values()):
            module.to(device)
        self.source.prepare(batch_size)
        self.conditions.prepare(self.source.captions)

    def helpers(self) -> Mapping[str, nn.Module]:
        """Return the frozen networks beside `model`."""
        inside = {self.trained.component, *self.trained.text_encoders}
        return {name: each for name, each in self.system.modules().items() if name not in inside}

    def batch(self, start: int, size: int, rows: slice) -> LatentBatch:
        return self.source.read(start, size, rows)

    def loss(
        self, model: nn.Module, batch: LatentBatch, rng: BatchGenerator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, loss = self.config, self.config.loss
        device = next(model.parameters()).device
        if config.frozen != "float32" and not torch.is_autocast_enabled(device.type):
            raise UserError(f"text_to_image.frozen {config.frozen} needs loop.precision bf16 or fp16")
        # The order of the draws is a part of every run: noise before captions, captions before masks.
        dropped = rng.uniform() < config.condition_dropout
        noised = noised_batch(
            batch.latents,
            rng,
            self.schedule,
            device,
            timestep_shift=loss.timestep_shift,
            offset_noise=loss.offset_noise,
            input_perturbation=loss.input_perturbation,
        )
        captions = batch.draw_captions(rng)
        channels = self._masked(batch, rng) if config.inpainting else None

        def condition() -> Condition:
            text = self.conditions(captions, dropped).to(device)
            return self.system.condition(text, batch.time_ids.to(device), channels)

        picture = config.train.control_pictures(batch)
        arguments = () if picture is None else (picture.to(device),)
        output = model(noised.sample(self.prediction_type), noised.timestep.float(), condition, *arguments)
        return batch.mean(prediction_loss(output, noised, self.schedule, self.prediction_type, loss))

    def _masked(self, batch: LatentBatch, rng: BatchGenerator) -> Tensor:
        """Random masks, and the latents of what lies outside of them: (B, 1 + C, h, w)."""
        assert batch.pictures is not None
        masks = draw_masks(batch.pictures, rng)
        return inpainting_channels(self.system.autoencoder, batch.pictures, masks, self.source.dtype)

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Draws the validation prompts; with inpainting, into the first pictures without their middle.

        A ControlNet is shown what goes with the first pictures.
        """
        assert isinstance(model, TrainableModel)
        shown, channels, config = self.config.validation, None, self.config
        if not shown.count:
            return {}
        system, controls = model.within(self.system), list[Control]()
        if config.inpainting or config.train.controlled:
            batch = self.batch(0, self.batch_size, slice(None))
            if config.inpainting:
                assert batch.pictures is not None
                pictures = _repeated(batch.pictures, shown.count)
                masks, dtype = middle_masks(pictures), self.source.dtype
                channels = inpainting_channels(self.system.autoencoder, pictures, masks, dtype)
            control = config.train.control_pictures(batch)
            controls = model.controls(None if control is None else _repeated(control, shown.count))
        drawn = shown.draw(system, self.source.resolution, channels, controls)
        write_bytes(folder / f"drawn-{seen:08d}.png", png(drawn))
        return {}

    def notes(self) -> list[str]:
        """Return what was found out about the pictures and their captions."""
        return self.source.notes() + self.conditions.notes()

    def export(self, model: nn.Module, folder: Path, config: str) -> None:
        """Write what was trained: a diffusers folder in float16, a LoRA's file, a token's, or a ControlNet's folder."""
        assert isinstance(model, TrainableModel)
        self.config.train.export(model, self.system, folder, {"config": config})


def _repeated(pictures: Tensor, count: int) -> Tensor:
    """So many of the pictures (B, ...), from the first on, and again from the first."""
    return pictures.repeat(-(-count // len(pictures)), 1, 1, 1)[:count]
