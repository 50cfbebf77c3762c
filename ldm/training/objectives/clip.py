"""A small CLIP over a model's latents, clean and noised (Radford et al. 2021; GLIDE, Nichol et al. 2022, sec. 2.4).

The model lends its autoencoder, its text encoder and its noise schedule, all of them frozen.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.folder import write_component
from ldm.conditioning.clip import autoencoder_probe, text_probe
from ldm.diffusion.parameterization import per_image
from ldm.errors import UserError
from ldm.files import write_text
from ldm.models.clip import CLIP, CLIPConfig
from ldm.training.bounds import refuse_outside
from ldm.training.contrastive import contrastive_loss, equal_captions, retrieved
from ldm.training.data.conditions import Conditions
from ldm.training.data.kinds import Data
from ldm.training.data.latents import LatentBatch
from ldm.training.distributed import BatchGenerator
from ldm.training.noising import noised_batch
from ldm.training.start import base_system

_AMONG = 64  # captions that a picture of validation finds its own among
_BANDS = 4  # of the noise schedule, in which validation counts apart


@dataclass(frozen=True)
class ModelConfig:
    """The network's sizes, see `ldm.models.clip.CLIPConfig`; those of latents and text are the base's."""

    block_out_channels: tuple[int, ...] = (64, 128, 192)
    layers_per_block: int = 2
    norm_num_groups: int = 16
    text_width: int = 256
    heads: int = 4
    projection_dim: int = 256
    dropout: float = 0.0


@dataclass(frozen=True)
class HeldOut:
    """What validation is of: the first `pictures` of data that training does not see, in groups of 64."""

    data: Data
    pictures: int = 512


@dataclass(frozen=True)
class Config:
    """The settings.

    base: the model that lends its frozen parts: a folder, a single file, a hub id, or "bundled". data: pictures with
        captions, of a kind: `pictures` from disk, or of one's own.
    clean: the share of pictures that are seen without noise; the others' timesteps are uniform over the schedule.
    validation: without it there is none.
    """

    base: str
    data: Data
    variant: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    clean: float = 0.25
    validation: HeldOut | None = None

    def check(self) -> None:
        """Raises UserError for values that can't be."""
        refuse_outside("clip", self, ("clean",), 0, 1)
        refuse_outside("clip.model", self.model, ("dropout",), 0, 0.999)
        self.data.check("clip.data")
        if self.validation:
            refuse_outside("clip.validation", self.validation, ("pictures",), _AMONG)
            if self.validation.pictures % _AMONG:
                raise UserError(
                    f"clip.validation.pictures is {self.validation.pictures}: make it a multiple of {_AMONG}"
                )
            self.validation.data.check("clip.validation.data")


class Objective:
    """Pictures and their captions find each other in a batch, at noise levels over the schedule.

    Each picture's negatives are the other captions of its part of the batch: of one process and one of its
    gradient_accumulation_steps.
    """

    def __init__(self, config: Config):
        config.check()
        self.config = config
        system = base_system(config.base, config.variant, {}, torch.float32)
        self.autoencoder, self.text = system.autoencoder, system.text
        self.schedule = system.scheduler.noise_schedule()
        self.source = config.data.latents("clip.data", system, False)
        self.held_out = None
        if config.validation:
            self.held_out = config.validation.data.latents("clip.validation.data", system, False)
        sizes: dict[str, Any] = {
            "in_channels": system.autoencoder.config.latent_channels,
            "sample_size": (self.source.resolution or system.default_size)
            // system.autoencoder.config.factor,
            "text_hidden_size": system.text.encode([""])[0].text.shape[-1],
        }
        own = CLIPConfig(**{**vars(config.model), **sizes})
        own.check("clip.model")
        self.clip = CLIP(replace(own, **self._probes()))
        self.model: nn.Module = self.clip
        self.watched = "loss"
        self.conditions = Conditions(system.text, 1, config.data.text_cache)

    def _probes(self) -> dict[str, tuple[float, ...]]:
        """By what the frozen parts are known again when the network is loaded."""
        return {"autoencoder": autoencoder_probe(self.autoencoder), "text_encoder": text_probe(self.text)}

    def helpers(self) -> Mapping[str, nn.Module]:
        """Return the frozen networks beside `model`."""
        return {**self.text.modules, "vae": self.autoencoder}

    def prepare(self, device: torch.device, batch_size: int) -> None:
        """Move everything, and fill the caches, as far as they are not there.

        Raises UserError where there is nothing to tell apart.
        """
        _check_negatives(batch_size)
        if len(set(self.source.captions)) == 1:  # 0: they are not known before
            raise UserError("clip.data: all pictures have one caption: give them captions of their own")
        for module in (self.model, *self.helpers().values()):
            module.to(device)
        self.source.prepare(batch_size)
        if self.held_out:
            self.held_out.prepare(_AMONG)
        self.conditions.prepare(self.source.captions)

    def batch(self, start: int, size: int, rows: slice) -> LatentBatch:
        return self.source.read(start, size, rows)

    def loss(
        self, model: nn.Module, batch: LatentBatch, rng: BatchGenerator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(model.parameters()).device
        # The order of the draws is a part of every run: which are clean, noise, captions.
        clean = (rng.uniform() < self.config.clean).to(device)
        noised = noised_batch(batch.latents, rng, self.schedule, device)
        captions = batch.draw_captions(rng)
        _check_negatives(len(captions))
        sigma = torch.where(clean, 0, noised.sigma)
        x = torch.where(per_image(clean, noised.x), noised.x0, noised.x)
        same = equal_captions(captions).to(device)
        logits: Tensor = model(x, sigma, self._hidden(captions, device))
        losses, right = contrastive_loss(logits, same), retrieved(logits, same).float()
        return losses.mean(), {"retrieval": right.mean()}

    def _hidden(self, captions: list[str], device: torch.device) -> Tensor:
        with torch.no_grad():
            return self.conditions(captions, torch.zeros(len(captions), dtype=torch.bool)).text.to(device)

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Return the share of held-out pictures that find their caption among 64: clean ones, and by band of noise.

        The bands are equal parts of the schedule's timesteps; the noise is the same every time.
        """
        if self.held_out is None:
            return {}
        assert isinstance(model, CLIP)
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        found: dict[str, list[float]] = {}
        for batch in self._groups():
            latents, same = batch.latents.to(device), equal_captions(batch.captions)
            hidden = self._hidden(batch.captions, device)
            for band in range(-1, _BANDS):
                sigma = torch.zeros(len(latents))
                name = "retrieval_clean"
                if band >= 0:
                    share = (band + torch.rand(len(latents), generator=generator)) / _BANDS
                    sigma = self.schedule.sigma((share * self.schedule.num_train_timesteps).long()).float()
                    name = f"retrieval_band_{band + 1}_of_{_BANDS}"
                noise = torch.randn(latents.shape, generator=generator)
                level = sigma.to(device)
                logits = model(latents + per_image(level, latents) * noise.to(device), level, hidden)
                found.setdefault(name, []).extend(retrieved(logits, same).tolist())
        return {name: sum(each) / len(each) for name, each in found.items()}

    def _groups(self) -> Iterator[LatentBatch]:
        """Groups of 64 held-out pictures."""
        assert self.config.validation and self.held_out
        for start in range(0, self.config.validation.pictures - _AMONG + 1, _AMONG):
            yield self.held_out.read(start, _AMONG, slice(None))

    def notes(self) -> list[str]:
        """Return what was found out about the pictures and their captions."""
        return self.source.notes() + self.conditions.notes()

    def export(self, model: nn.Module, folder: Path, config: str) -> None:
        """Write the folder `clip`, as `ldm.conditioning.clip.load_clip` reads it, in float16."""
        assert isinstance(model, CLIP)
        tensors = {name: each.half() for name, each in model.state_dict().items()}
        write_component(folder, "clip", model.config.write(), tensors)
        write_text(folder / "clip" / "training.yaml", config)


def _check_negatives(rows: int) -> None:
    """Raise UserError for a picture alone: its loss is 0, whatever the network says."""
    if rows < 2:
        raise UserError(
            "a contrastive loss compares pictures of a batch: set loop.batch_size to 2 or more for each of the "
            "processes' gradient_accumulation_steps"
        )
