"""Noisy classifiers from and to disk, and what one of them says of pictures under noise."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import load_strict, read_text, write_text
from ldm.checkpoints.folder import component_folder, read_component, read_json, write_component
from ldm.diffusion.classifier_guidance import LogLikelihood
from ldm.diffusion.parameterization import per_image, unit_variance
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_config import FILE_NAME, SchedulerConfig
from ldm.errors import UserError, nearest
from ldm.foreign import parse_json
from ldm.models.classifier import ClassifierConfig, NoisyClassifier
from ldm.models.diffusers_config import check_layers

_PART, _LABELS = "classifier", "labels.json"


@dataclass(frozen=True)
class Classifier:
    """A classifier with the noise that it was trained under, and the names of its classes.

    A noise level is the same thing to it and to a model of another schedule: x = x0 + sigma * noise stands for both,
    and it is told the timestep of its own schedule that has this sigma.
    """

    network: NoisyClassifier
    scheduler: SchedulerConfig
    labels: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Classifier":
        """Load a folder that training exported: `classifier` and `scheduler`. Raises UserError."""
        mapping, tensors = read_component(folder, _PART)
        config = ClassifierConfig.read(mapping, f"{folder}/{_PART}/config.json")
        check_layers(config.layers, f"{folder}/{_PART}", len(tensors))
        with torch.device("meta"):
            network = NoisyClassifier(config)
        load_strict(network, tensors, f"{folder}/{_PART}")
        path = component_folder(folder, "scheduler") / FILE_NAME
        scheduler = SchedulerConfig.from_dict(read_json(path), str(path))
        path = component_folder(folder, _PART) / _LABELS
        labels = parse_json(read_text(path), path)
        if not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
            raise UserError(f"{path} holds no list of names")
        if len(labels) != config.num_classes:
            raise UserError(
                f"{path} has {len(labels)} names, and the classifier tells {config.num_classes} apart"
            )
        found = cls(network.float().eval().requires_grad_(False).to(device), scheduler, tuple(labels))
        _ = found.schedule  # one that can't be is refused now
        return found

    def save(self, folder: str | Path) -> None:
        """Write the folder that `load` reads. Raises UserError."""
        write_component(folder, _PART, self.network.config.to_dict(), self.network.state_dict())
        write_component(folder, "scheduler", self.scheduler.to_dict())
        write_text(Path(folder) / _PART / _LABELS, json.dumps(self.labels) + "\n")

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise that it was trained under."""
        return self.scheduler.noise_schedule()

    def numbers(self, labels: Sequence[str | int]) -> Tensor:
        """Return the numbers (B,) of classes that are named, or numbered already. Raises UserError."""
        found = list[int]()
        for label in labels:
            if isinstance(label, str):
                if label not in self.labels:
                    hint = nearest(label, self.labels) or f": it knows {', '.join(self.labels)}"
                    raise UserError(f"the classifier knows no {label!r:.60}{hint:.400}")
                found.append(self.labels.index(label))
            elif not 0 <= label < len(self.labels):
                raise UserError(
                    f"the classifier knows {len(self.labels)} classes, numbered from 0, and no {label}"
                )
            else:
                found.append(label)
        return torch.tensor(found)

    def logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return its logits (B, K) for x = x0 + sigma * noise, (B, C, h, w), at sigma (B,)."""
        timestep = self.schedule.to(sigma.device).timestep(sigma)
        weight = self.network.conv_in.weight
        seen = (x * per_image(unit_variance(sigma), x)).to(weight.dtype)
        return self.network(seen, timestep.float())

    def log_likelihood(self, labels: Tensor) -> LogLikelihood:
        """Return log p(y | x) of the classes `labels` (B,), with a gradient in x."""

        def of(x: Tensor, sigma: Tensor) -> Tensor:
            terms = F.log_softmax(self.logits(x, sigma).float(), dim=1)
            return terms.gather(1, labels.to(x.device)[:, None])[:, 0]

        return of
