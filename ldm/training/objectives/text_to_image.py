"""A U-Net that denoises latents under text (Rombach et al. 2022): from nothing, fine-tuned whole, or by a small part.

The small parts are a LoRA (Hu et al. 2021) and the embedding of a new word (Gal et al. 2022). Inpainting, and
DreamBooth's prior preservation (Ruiz et al. 2023), go with any of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.data.masks import random_mask
from ldm.diffusion.losses import LossConfig, diffusion_loss, shifted
from ldm.diffusion.parameterization import check
from ldm.diffusion.plan import plan
from ldm.errors import UserError
from ldm.files import write_bytes
from ldm.pictures import grid, png
from ldm.training.bounds import refuse_outside
from ldm.training.data import on_disk
from ldm.training.data.conditions import Conditions
from ldm.training.data.kinds import Data
from ldm.training.data.latents import LatentBatch, LatentSource, encode
from ldm.training.data.on_disk import PicturesConfig
from ldm.training.data.prior import PriorConfig, WithPrior, check_class, draw_class
from ldm.training.distributed import BatchGenerator, processes
from ldm.training.drawing import draw
from ldm.training.start import NewConfig, base_system, for_inpainting, new_system
from ldm.training.trained import LoRAConfig, Trained, WordConfig


@dataclass(frozen=True)
class ValidationConfig:
    """What is drawn at every validation: a column a prompt, a row a seed."""

    prompts: tuple[str, ...] = ()
    seeds: int = 2
    steps: int = 20
    guidance: float = 3.5


@dataclass(frozen=True)
class Config:
    """What is trained, from what, on what.

    base: a model to start from (a folder, a single file, a hub id, or "bundled"); new: a U-Net from nothing. One of
        them. variant: of the base's files, such as fp16.
    data: of a kind of one's own; pictures: from disk. One of them.
    lora, word: train one of these in place of the whole U-Net. text_encoder: with the whole U-Net train the text
        encoders too.
    inpainting: the U-Net also sees a random mask and what lies outside of it.
    prior: class pictures beside those of an instance.
    condition_dropout: share of captions left out, for classifier-free guidance (Ho & Salimans 2022).
    windows: of the text encoder, 77 tokens each in CLIP, that every caption is padded to; what is longer is cut. More
        than one go with pictures that are drawn from prompts as long.
    scheduler: values in place of the base's own, e.g. {rescale_betas_zero_snr: true, prediction_type: v_prediction}.
    frozen: the precision in which what is not trained is held.
    """

    renamed: ClassVar[dict[str, str]] = {"compositions": "data, with kind: compositions"}

    base: str | None = None
    variant: str | None = None
    new: NewConfig | None = None
    data: Data | None = None
    pictures: PicturesConfig | None = None
    lora: LoRAConfig | None = None
    word: WordConfig | None = None
    text_encoder: bool = False
    inpainting: bool = False
    prior: PriorConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    condition_dropout: float = 0.1
    windows: int = 1
    scheduler: dict[str, Any] = field(default_factory=dict)
    frozen: Literal["float32", "bfloat16", "float16"] = "float32"
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        """Raises UserError for settings that do not go together."""
        for one, other in (("base", "new"), ("data", "pictures")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise UserError(f"text_to_image needs exactly one of {one} and {other}")
        if sum(map(bool, (self.lora, self.word, self.text_encoder))) > 1:
            raise UserError(
                "text_to_image trains one of lora, word and text_encoder (which is with the whole U-Net)"
            )
        if self.new and (self.lora or self.word or self.scheduler or self.text_encoder or self.prior):
            raise UserError(
                "lora, word, scheduler, text_encoder and prior go with a base; new is a U-Net from nothing"
            )
        if self.inpainting and (self.lora or self.word):
            raise UserError("inpainting trains the whole U-Net: leave out lora and word")
        if self.prior and not self.pictures:
            raise UserError("prior goes with pictures of an instance")
        if self.prior and self.pictures and self.pictures.max_ratio != 1:
            raise UserError("prior preservation takes pictures of one size: set max_ratio to 1")
        if self.pictures and self.pictures.cache and self.pictures.crop == "random":
            raise UserError(
                "text_to_image.pictures.crop: random crops are new in each turn and can't be cached: set crop to "
                "center, or cache to null"
            )
        if self.pictures and self.pictures.encoding == "float32" != self.frozen:
            raise UserError("text_to_image.pictures.encoding float32 needs text_to_image.frozen float32")
        self._check_numbers()

    def _check_numbers(self) -> None:
        loss = ("p2_gamma", "p2_k", "offset_noise", "input_perturbation", "variance")
        refuse_outside("text_to_image", self, ("condition_dropout",), 0, 1)
        refuse_outside("text_to_image", self, ("windows",), 1)
        refuse_outside("text_to_image.validation", self.validation, ("seeds", "steps"), 1)
        refuse_outside("text_to_image.loss", self.loss, loss, 0)
        refuse_outside("text_to_image.loss", self.loss, ("gamma", "timestep_shift"), 0.001)
        if self.prior:
            refuse_outside("text_to_image.prior", self.prior, ("pictures", "steps"), 1)
            refuse_outside("text_to_image.prior", self.prior, ("weight",), 0)
        if self.pictures:
            self.pictures.check("text_to_image.pictures")


class Objective:
    """Weighted mean squared error of the prediction, at timesteps drawn uniformly, or shifted towards noise."""

    def __init__(self, config: Config):
        config.check()
        if config.frozen != "float32" and str(processes().device) == "cpu":
            raise UserError(f"text_to_image.frozen {config.frozen} is for GPUs: use float32 on the CPU")
        self.config = config
        system = (
            new_system(config.new)
            if config.new
            else base_system(
                config.base or "", config.variant, config.scheduler, getattr(torch, config.frozen)
            )
        )
        if config.loss.variance:  # so that ddpm draws with it
            system = replace(system, scheduler=system.scheduler.with_values(variance_type="learned_range"))
        self.system = for_inpainting(system) if config.inpainting else system
        self.schedule = system.scheduler.noise_schedule()
        self.prediction_type: str = system.scheduler.get("prediction_type")
        check(self.prediction_type, self.schedule)
        self._check_drawing()
        if config.pictures:
            on_disk.check_size(config.pictures, self.system)
        self.found = on_disk.listed(config.pictures, "text_to_image.pictures") if config.pictures else None
        self.source: LatentSource
        self.trained = Trained(self.system, config.lora, config.word, config.text_encoder)
        self.model: nn.Module = self.trained
        self.watched = "loss"
        self._check_channels()
        self._check_word()
        cache = Path(config.pictures.cache) / "text" if config.pictures and config.pictures.cache else None
        cache = cache if self.trained.text is None else None
        self.conditions = Conditions(self.system.text, config.windows, cache)

    def prepare(self, device: torch.device, batch_size: int) -> None:
        """Move everything; draw DreamBooth's class pictures and fill the caches, as far as they are not there."""
        config, autoencoder = self.config, self.system.autoencoder
        self.batch_size = batch_size
        if config.prior and batch_size % 2:
            raise UserError("prior preservation takes pictures in pairs: make loop.batch_size even")
        for module in (self.model, *self.system.modules().values()):
            module.to(device)
        if config.data:
            self.source = config.data.latents(autoencoder, config.inpainting)
            return
        assert config.pictures and self.found
        own = [each for item in self.found.items for each in item.captions]
        captions = list(config.pictures.captions or own)
        share, inpainting = batch_size // (2 if config.prior else 1), config.inpainting
        self.source = on_disk.on_disk(config.pictures, self.found, self.system, share, inpainting)
        if config.prior:
            drawn = draw_class(config.prior, self.system)
            prior = on_disk.on_disk(config.pictures, drawn, self.system, share, inpainting)
            self.source = WithPrior(self.source, prior, config.prior.prompt)
            captions.append(config.prior.prompt)
        self.conditions.prepare(captions)
        self.source.prepare()

    def helpers(self) -> Mapping[str, nn.Module]:
        """The frozen networks beside `model`."""
        return {
            name: each
            for name, each in self.system.modules().items()
            if name != "unet" and name not in self.trained.text_encoders
        }

    def batch(self, start: int, size: int, rows: slice) -> LatentBatch:
        return self.source.read(start, size, rows)

    def loss(
        self, model: nn.Module, batch: LatentBatch, rng: BatchGenerator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, settings = self.config, self.config.loss
        device = next(model.parameters()).device
        if config.frozen != "float32" and not torch.is_autocast_enabled(device.type):
            raise UserError(f"text_to_image.frozen {config.frozen} needs loop.precision bf16 or fp16")
        dropped = rng.uniform() < config.condition_dropout
        shape = batch.latents.shape[1:]
        noise = rng.normal(*shape)
        steps = self.schedule.num_train_timesteps
        timestep = shifted(rng.integers(steps), settings.timestep_shift, steps).to(device)
        if settings.offset_noise:
            noise = noise + settings.offset_noise * rng.normal(shape[0], 1, 1)
        seen = (
            noise + settings.input_perturbation * rng.normal(*shape) if settings.input_perturbation else None
        )
        captions = self._captions(batch, rng)
        known = self._known(batch, rng, device)

        def condition() -> Condition:
            text = self.conditions(captions, dropped).to(device)
            return self.system.condition(text, batch.time_ids.to(device), known)

        losses = diffusion_loss(
            lambda x, timestep: model(x, timestep, condition),
            _placed(batch.latents, device),
            _placed(noise, device),
            timestep,
            self.schedule,
            self.prediction_type,
            settings,
            None if seen is None else _placed(seen, device),
        )
        if not config.prior:
            return losses.mean(), {}
        instance, prior = losses[::2].mean(), losses[1::2].mean()
        return instance + config.prior.weight * prior, {"instance": instance, "prior": prior}

    def _captions(self, batch: LatentBatch, rng: BatchGenerator) -> list[str]:
        """The pictures' own, or the config's; those of class pictures stay."""
        given = self.config.pictures.captions if self.config.pictures else ()
        if not given:
            return batch.captions
        chosen = [given[int(u * len(given))] for u in rng.uniform().tolist()]
        if self.config.prior:
            chosen[1::2] = batch.captions[1::2]
        return chosen

    @torch.no_grad()
    def _known(self, batch: LatentBatch, rng: BatchGenerator, device: torch.device) -> Tensor | None:
        """For inpainting (B, 1 + C, h, w): masks, 1 where something is to be drawn, and the latents of the rest."""
        if not self.config.inpainting:
            return None
        assert batch.pictures is not None
        seeds = (rng.uniform() * 2**24).long().tolist()
        height, width = batch.pictures.shape[-2:]
        masks = np.stack([random_mask(height, width, np.random.default_rng(seed)) for seed in seeds])
        return self._masked(batch.pictures.to(device), torch.from_numpy(masks)[:, None].float().to(device))

    def _masked(self, pictures: Tensor, masks: Tensor) -> Tensor:
        """As in diffusers' inpainting pipeline: what is to be drawn is grey, masks shrink to the nearest pixels."""
        encoding = self.config.pictures.encoding if self.config.pictures else "bfloat16"
        seen = pictures * (masks < 0.5)
        latents = encode(self.system.autoencoder, seen, getattr(torch, encoding)).mean
        return torch.cat([F.interpolate(masks, size=latents.shape[-2:]), latents], dim=1)

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Draws the validation prompts; with inpainting, into the first pictures without their middle."""
        assert isinstance(model, Trained)
        shown = self.config.validation
        count = len(shown.prompts) * shown.seeds
        if not count:
            return {}
        system, known = model.within(self.system), None
        if self.config.inpainting:
            known = self._emptied(count)
        prompts = list(shown.prompts) * shown.seeds
        seeds = [seed for seed in range(shown.seeds) for _ in shown.prompts]
        side = self.config.pictures.resolution if self.config.pictures else self.system.default_size
        size = (side, side)
        if known is not None:
            factor = self.system.autoencoder.config.factor
            size = (known.shape[2] * factor, known.shape[3] * factor)
        drawn = draw(system, prompts, seeds, shown.steps, shown.guidance, size, known)
        write_bytes(folder / f"drawn-{seen:08d}.png", png(grid(drawn, len(shown.prompts))))
        return {}

    def _emptied(self, count: int) -> Tensor:
        """Masks and latents (count, 1 + C, h, w) of the first pictures without their middle."""
        device = self.system.network.device
        pictures = self.batch(0, self.batch_size, slice(None)).pictures
        assert pictures is not None
        pictures = pictures.repeat(-(-count // len(pictures)), 1, 1, 1)[:count]
        masks = torch.zeros_like(pictures[:, :1])
        height, width = masks.shape[-2:]
        masks[:, :, height // 4 : -(height // 4), width // 4 : -(width // 4)] = 1
        return self._masked(pictures.to(device), masks.to(device))

    def notes(self) -> list[str]:
        """What was found out about the pictures and their captions."""
        pictures = on_disk.lines_about(self.found.notes, self.source.broken) if self.found else []
        return pictures + self.conditions.notes()

    def export(self, model: nn.Module, folder: Path, config: str) -> None:
        """What was trained: a diffusers folder in float16, a LoRA's file, or a word's."""
        assert isinstance(model, Trained)
        model.write(self.system, folder, {"config": config})

    def _check_drawing(self) -> None:
        """What is to be drawn later can be drawn."""
        shown, prior = self.config.validation, self.config.prior
        counts = {"validation": shown.steps} if shown.prompts else {}
        if prior:
            counts["prior"] = prior.steps
        for section, steps in counts.items():
            try:
                plan(self.system.scheduler, steps)
            except UserError as error:
                raise UserError(f"text_to_image.{section}.steps: {error}") from None
        if prior:
            check_class(prior, self.system)

    def _check_channels(self) -> None:
        network, channels = self.system.network.config, self.system.autoencoder.config.latent_channels
        out = channels * (2 if self.config.loss.variance else 1)
        if network.out_channels != out:
            why = "with" if self.config.loss.variance else "without"
            raise UserError(
                f"the U-Net gives {network.out_channels} channels: {why} a learned variance (loss.variance) set "
                f"out_channels to {out}"
            )
        taken = 2 * channels + 1 if self.config.inpainting else channels
        if network.in_channels != taken:
            raise UserError(
                f"the U-Net takes {network.in_channels} channels where training gives it {taken}"
                + (
                    ""
                    if self.config.inpainting
                    else ": set in_channels, or inpainting: true for an inpainting model"
                )
            )

    def _check_word(self) -> None:
        """A word that no caption has would never be trained."""
        word, cut = self.config.word, self.config.pictures
        if not word or not cut or not self.found:
            return
        captions = cut.captions or [item.caption for item in self.found.items]
        if not any(word.word in caption for caption in captions):
            raise UserError(
                f"no caption has the word {word.word}: put it into text_to_image.pictures.captions"
            )


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, memory_format=torch.channels_last)
