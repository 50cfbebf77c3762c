"""A classifier of noisy pictures, or of noisy latents of a frozen first stage (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.classifier import Classifier
from ldm.diffusion.noising import Noised, add_noise
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.models.classifier import ClassifierConfig, NoisyClassifier
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import Batch
from ldm.training.data.kinds import Data
from ldm.training.distributed import BatchGenerator
from ldm.training.start import ScheduleConfig, load_autoencoder

_CHUNK = 64  # pictures a call in validation
_SEEN_AS = "epsilon"  # of all variance-preserving networks c_in is the same


@dataclass(frozen=True)
class Config:
    """The settings.

    data: pictures with labels, of a kind.
    model: the classifier; its sample_size, in_channels and num_classes have to be those of the data.
    autoencoder: a folder that holds `vae`, the first stage of the model to guide, whose latents are classified; None
        classifies the pictures themselves.
    schedule: the noise that it learns under; all timesteps alike.
    levels: at how many noise levels a step sees each picture: encoding costs more than classifying.
    bands: of the schedule, in which validation counts what is right.
    """

    data: Data
    model: ClassifierConfig
    autoencoder: str | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    levels: int = 1
    bands: int = 5
    validation_pictures: int = 256

    def check(self) -> None:
        """Raises UserError for settings that can't be."""
        refuse_outside("classifier", self, ("levels", "bands", "validation_pictures"), 1)
        refuse_outside("classifier", self, ("bands",), 1, self.schedule.num_train_timesteps)
        self.model.check("classifier.model")
        self.data.check("classifier.data")


class Objective:
    """Cross-entropy at timesteps drawn uniformly."""

    def __init__(self, config: Config):
        config.check()
        self.config = config
        self.examples = config.data.examples("classifier.data", None, config.validation_pictures)
        self.scheduler = SchedulerConfig("DDPMScheduler", asdict(config.schedule))
        self.schedule = self.scheduler.noise_schedule()
        self.first_stage = load_autoencoder(Path(config.autoencoder)) if config.autoencoder else None
        self._check_model()
        self.network = NoisyClassifier(config.model)
        self.model: nn.Module = self.network
        self.watched = "loss"

    def _check_model(self) -> None:
        """Raise UserError for a network that is not for these data."""
        if not self.examples.labels:
            raise UserError(
                "classifier.data has no labels: give a kind that has, such as compositions with labels: thing"
            )
        channels, height, width = self._latents(self.examples.whole(0, 1).pictures).shape[1:]
        if height != width:
            raise UserError(
                f"classifier.data has pictures of {height} x {width} positions: they must be square"
            )
        wanted = {"sample_size": width, "in_channels": channels, "num_classes": len(self.examples.labels)}
        for name, value in wanted.items():
            if getattr(self.config.model, name) != value:
                raise UserError(
                    f"classifier.model.{name} is {getattr(self.config.model, name)}, and the data's is {value}"
                )

    def prepare(self, device: torch.device, batch_size: int) -> None:
        if self.first_stage is not None:
            self.first_stage.to(device)

    def helpers(self) -> Mapping[str, nn.Module]:
        """Return the first stage, if there is one."""
        return {} if self.first_stage is None else {"vae": self.first_stage}

    def batch(self, start: int, size: int, rows: slice) -> Batch:
        """Return whole pictures with their labels."""
        return self.examples.cuts(start, size, rows)

    def loss(self, model: nn.Module, batch: Batch, rng: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ldm.training.objective` says; every picture is there at `levels` noise levels."""
        device = next(model.parameters()).device
        latents = self._latents(batch.pictures.to(device)).float()
        some = [
            add_noise(
                latents,
                rng.normal(*latents.shape[1:]).to(device),
                self.schedule.draw(rng.uniform()).to(device),
                self.schedule,
            )
            for _ in range(self.config.levels)
        ]
        logits = model(
            torch.cat([each.sample(_SEEN_AS) for each in some]), torch.cat([each.timestep for each in some])
        ).float()
        labels = _labels(batch).to(device).repeat(self.config.levels)
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}

    @torch.no_grad()
    def _latents(self, pictures: Tensor) -> Tensor:
        """What is classified, without noise: (B, C, h, w)."""
        if self.first_stage is None:
            return pictures
        return self.first_stage.scale(self.first_stage.encode(pictures).mean)

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Return the share right of pictures never trained on: in all, and by bands of timesteps, of low noise first.

        Each picture is there once in each band, at a timestep of its own.
        """
        device = next(model.parameters()).device
        rng = torch.Generator().manual_seed(0)
        steps, bands = self.schedule.num_train_timesteps, self.config.bands
        edges = [steps * k // bands for k in range(bands + 1)]
        right, losses = [0.0] * bands, 0.0
        count = self.examples.held_out
        for start in range(0, count, _CHUNK):
            batch = self.examples.whole(start, min(_CHUNK, count - start)).to(device)
            latents, labels = self._latents(batch.pictures).float(), _labels(batch)
            for k in range(bands):
                noise = torch.randn(latents.shape, generator=rng).to(device)
                timestep = torch.randint(edges[k], edges[k + 1], (len(latents),), generator=rng).to(device)
                noised: Noised = add_noise(latents, noise, timestep, self.schedule)
                logits = model(noised.sample(_SEEN_AS), noised.timestep).float()
                right[k] += float((logits.argmax(1) == labels).sum())
                losses += float(F.cross_entropy(logits, labels, reduction="sum"))
        by_band = {f"accuracy_{edges[k]:03d}_{edges[k + 1] - 1:03d}": right[k] / count for k in range(bands)}
        return {"accuracy": sum(right) / (bands * count), "nll": losses / (bands * count), **by_band}

    def notes(self) -> list[str]:
        return self.examples.notes()

    def export(self, model: nn.Module, folder: Path, config: str = "") -> None:
        """Write the folder that `Classifier.load` reads."""
        assert isinstance(model, NoisyClassifier)
        Classifier(model, self.scheduler, tuple(self.examples.labels)).save(folder)


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None
    return batch.labels
