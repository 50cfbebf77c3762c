"""A diffusion model without text (Ho et al. 2020): of pixels, points or latents, of classes or of none."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.diffusion.edm_processes import EDMConfig
from ldm.diffusion.losses import LossConfig, prediction_loss
from ldm.diffusion.process import DDPMConfig
from ldm.diffusion.score_processes import NCSNConfig, SubVPConfig, VEConfig, VPConfig
from ldm.errors import UserError
from ldm.files import write_bytes
from ldm.models.denoising import DenoisingNetwork
from ldm.pictures import png
from ldm.system.plain import PlainSystem
from ldm.training.bounds import refuse_loss, refuse_outside
from ldm.training.data.arrays import DigitsConfig, ToysConfig
from ldm.training.data.examples import Batch
from ldm.training.data.kinds import Data
from ldm.training.data.on_disk import PicturesConfig
from ldm.training.data.plain import PlainSource
from ldm.training.data.told import BlurredPicture, Labels, Nothing, SemanticMap, SmallPicture
from ldm.training.distributed import BatchGenerator
from ldm.training.networks import NetworkSettings, UNet2DSettings, built_for
from ldm.training.noising import noised_batch
from ldm.training.start import check_untold, load_autoencoder

BROUGHT = (DigitsConfig, ToysConfig, PicturesConfig)  # the kinds of data that come with this objective


@dataclass(frozen=True)
class ValidationConfig:
    """What is drawn at every validation: so many `pictures` in `steps`, with seeds 0, 1, ..., of each class in turn."""

    pictures: int = 64
    steps: int = 50
    guidance: float = 1.0
    sampler: str | None = None


@dataclass(frozen=True)
class Config:
    """The settings.

    data: what it learns from, of a kind: digits, toys, pictures (from disk), or one's own.
    network: of a kind: unet2d, unet (with cross-attention), or points. Its channels, its side and its classes are
        those of the data.
    process: of a kind: ddpm, in discrete steps; vp, subvp and ve, in continuous time; ncsn, on a ladder of levels; edm,
        whose paper's loss is weighting unit.
    condition: what it is told, of a kind: nothing, labels, semantic_map, low_resolution, or blurred.
    autoencoder: a folder that holds a first stage, for a model of its latents; None for one of pixels.
    crop: training sees squares of so many pixels, at random; None for whole pictures.
    validation_pictures: of the data, held out; the loss on them is a figure of validation.
    """

    data: Data
    network: NetworkSettings = field(default_factory=UNet2DSettings)
    process: DDPMConfig | VPConfig | SubVPConfig | VEConfig | NCSNConfig | EDMConfig = field(
        default_factory=DDPMConfig
    )
    condition: Nothing | Labels | SemanticMap | SmallPicture | BlurredPicture = field(default_factory=Nothing)
    autoencoder: str | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    crop: int | None = None
    validation_pictures: int = 256
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        """Raises UserError for settings that do not go together."""
        refuse_outside("diffusion", self, ("validation_pictures", "crop"), 1)
        refuse_loss("diffusion.loss", self.loss)
        if self.autoencoder and self.loss.decoder != "gaussian":
            raise UserError(
                "diffusion.loss.decoder is of pixels, and latents have no levels: leave it gaussian"
            )
        refuse_outside("diffusion.validation", self.validation, ("pictures", "steps"), 1)
        refuse_outside("diffusion.validation", self.validation, ("guidance",), 0)
        if self.validation.guidance > 1 and not self.condition.left_out:
            raise UserError(
                "diffusion.validation.guidance is of a model that also learns without a condition: set it to 1, or "
                "give diffusion.condition a dropout"
            )
        self.data.check("diffusion.data")
        if bool(self.loss.variance) != (getattr(self.process, "variance_type", "") == "learned_range"):
            raise UserError(
                "diffusion.loss.variance goes with diffusion.process.variance_type learned_range: give both or none"
            )
        process, embedding = (
            self.process.process(),
            getattr(self.network, "time_embedding_type", "positional"),
        )
        sigma = getattr(process.schedule, "embedding", "positional") == "fourier"
        if sigma != (embedding != "positional"):
            told = (
                "noise levels (time_embedding_type fourier, of points logarithmic)" if sigma else "timesteps"
            )
            raise UserError(
                f"diffusion.network takes {embedding} features, and diffusion.process {self.process.kind} tells "
                f"{told}: make the network's time_embedding_type and the process's embedding fit"
            )
        if (embedding == "fourier") != (process.prediction_type == "ve_score"):
            raise UserError(
                "diffusion.process.prediction_type ve_score is of a network of fourier features, which divides by "
                "sigma, and no other is of it: take ve_score there, and ve_epsilon elsewhere"
            )


class Objective:
    """Weighted mean squared error of the prediction, at noise levels drawn as the process's schedule has them."""

    def __init__(self, config: Config):
        config.check()
        self.config = config
        self.examples = config.data.examples("diffusion.data", config.crop, config.validation_pictures)
        config.condition.check("diffusion.condition", self.examples)
        folder = config.autoencoder
        if folder and not Path(folder).is_dir():
            raise UserError(f"diffusion.autoencoder: there is no folder {folder}: give one that holds a vae")
        self.autoencoder = load_autoencoder(Path(folder)) if folder else None
        self.source = PlainSource(self.examples, config.condition, self.autoencoder, config.crop)
        process = config.process.process()
        self.schedule = process.schedule
        network = built_for(
            config.network, self.source, config.data, "diffusion", variance=bool(config.loss.variance)
        )
        names = config.condition.names(self.examples)
        self.system = PlainSystem(network, process, self.autoencoder, names)
        self.system.check("diffusion")
        self._check_network()
        self.drawing = process.plan(config.validation.steps, config.validation.sampler)
        self.model: nn.Module = self.system.network
        self.watched = "loss"

    def _check_network(self) -> None:
        """Raise UserError, before anything is trained, for what would fail at the first step or at a validation."""
        told = self.source.told(self.examples.cuts(0, 1), self.system.shape[-1])
        check_untold("diffusion", self.system.wants)
        told.require(self.system.wants, "diffusion.network")

    def prepare(self, device: torch.device, batch_size: int) -> None:
        for module in (self.model, *self.helpers().values()):
            module.to(device)

    def helpers(self) -> Mapping[str, nn.Module]:
        return {} if self.autoencoder is None else {"vae": self.autoencoder}

    def batch(self, start: int, size: int, rows: slice) -> Batch:
        return self.examples.cuts(start, size, rows)

    def loss(self, model: nn.Module, batch: Batch, rng: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        dropped = rng.uniform() < self.config.condition.left_out
        return self._losses(model, batch, rng, dropped).mean(), {}

    def _losses(self, model: nn.Module, batch: Batch, rng: BatchGenerator, dropped: Tensor) -> Tensor:
        """The loss of each picture, (B,)."""
        device, loss, process = next(model.parameters()).device, self.config.loss, self.system.process
        batch = batch.to(device)
        noised = noised_batch(
            self.source.clean(batch),
            rng,
            self.schedule,
            device,
            timestep_shift=loss.timestep_shift,
            offset_noise=loss.offset_noise,
            input_perturbation=loss.input_perturbation,
        )
        told = self.source.told(batch, self.system.shape[-1], dropped)
        output = model(noised.sample(process.prediction_type), noised.timestep.float(), told)
        return prediction_loss(output, noised, self.schedule, process.prediction_type, loss)

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Return the loss on pictures never trained on, at the same noise each time; draw some."""
        assert isinstance(model, DenoisingNetwork)
        system, shown = replace(self.system, network=model), self.config.validation
        losses = [
            self._losses(model, batch, rng, torch.zeros(rng.size, dtype=torch.bool))
            for batch, rng in self.source.held_out()
        ]
        drawn = self.source.drawn(system, self.drawing, shown.pictures, shown.guidance)
        write_bytes(folder / f"drawn-{seen:08d}.png", png(drawn))
        return {"held_out_loss": float(torch.cat(losses).mean())} if losses else {}

    def notes(self) -> list[str]:
        return self.examples.notes()

    def export(self, model: nn.Module, folder: Path, config: str) -> None:
        """Write a folder that `PlainSystem.load` reads: unet, scheduler, the classes' names, and the vae if any."""
        assert isinstance(model, DenoisingNetwork)
        replace(self.system, network=model).save(folder)
