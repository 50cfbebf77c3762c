"""A whole system without text: a denoising network, its process and, of latents, a first stage; from and to disk.

Unconditional models, those of classes, and those that are told a picture (a map, a low resolution). On disk it is a
diffusers folder: a DDPMPipeline or ConsistencyModelPipeline where that draws it, and where not each component is one of
diffusers' all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.folder import read_folder, write_folder
from ldm.condition import Condition
from ldm.conditioning.bound import BoundNetwork
from ldm.diffusion.edm_processes import ConsistencyConfig
from ldm.diffusion.process import Discrete, Process, read_process
from ldm.errors import UserError, nearest
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.denoising import DenoisingNetwork
from ldm.models.networks import NETWORKS
from ldm.models.unet2d import UNet2D
from ldm.system import filled

CLASS = "ClassToImagePipeline"
_LABELS = "id2label"  # in model_index.json, as diffusers' DiTPipeline has the names of its classes


@dataclass
class PlainSystem:
    """The parts, frozen and in evaluation mode where they were loaded.

    labels: the names of the classes, by number; none for a model that knows no classes. A network that learned some
    pictures without theirs has one more row in its table, the last, for "no class".
    """

    network: DenoisingNetwork
    process: Process
    autoencoder: AutoencoderKL | None = None
    labels: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "PlainSystem":
        """Load a folder that `save` or, of a UNet2DModel, diffusers wrote. Raises UserError."""
        checkpoint, path = read_folder(folder), Path(folder)
        if "text_encoder" in checkpoint.configs:
            raise UserError(
                f"{path} is drawn with from text: by TextToImagePipeline, or ldm-generate --model {path}"
            )
        if odd := [part for part in ("unet", "scheduler") if part not in checkpoint.configs]:
            raise UserError(f"{path} has no {odd[0]} in its model_index.json")
        kind = str(checkpoint.configs["unet"].get("_class_name"))
        if kind not in NETWORKS:
            raise UserError(f"{path}: unet: {kind} is no network that is known: {', '.join(NETWORKS)}")
        config = NETWORKS[kind].read_config(checkpoint.configs["unet"], f"{path}: unet")
        autoencoder = None
        if "vae" in checkpoint.configs:
            settings = AutoencoderConfig.from_diffusers(checkpoint.configs["vae"], f"{path}: vae")
            autoencoder = filled(AutoencoderKL, settings, checkpoint, "vae", path).to(device, torch_dtype)
        system = cls(
            filled(NETWORKS[kind], config, checkpoint, "unet", path).to(device, torch_dtype),
            read_process(checkpoint.configs["scheduler"], f"{path}: scheduler"),
            autoencoder,
            _labels(checkpoint.options.pop(_LABELS, {}), path),
            checkpoint.options,
        )
        system.check(str(path))
        return system

    def check(self, where: str) -> None:
        """Raise UserError where the parts do not belong together."""
        out = self.network.config.out_channels
        if out != (wanted := self.channels * (2 if self._learns_variance else 1)):
            raise UserError(
                f"{where}: the network gives {out} channels, where its process and its autoencoder need {wanted}: "
                f"parts of different models"
            )
        rows = self.wants.get("labels", 0)
        if self.labels and rows not in (len(self.labels), len(self.labels) + 1):
            raise UserError(
                f"{where}: the network knows {rows} classes, and {len(self.labels)} names are given in {_LABELS}"
            )

    @property
    def channels(self) -> int:
        """C of what is denoised: pixels, coordinates or latents. Twice as many come out with a learned variance."""
        if self.autoencoder is not None:
            return self.autoencoder.config.latent_channels
        return self.network.config.out_channels // (2 if self._learns_variance else 1)

    @property
    def _learns_variance(self) -> bool:
        process = self.process
        return isinstance(process, Discrete) and process.scheduler.get("variance_type") == "learned_range"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is denoised, as the network was trained on it."""
        side = self.network.config.sample_size or 64
        return self.channels, side, side

    @property
    def wants(self) -> dict[str, int]:
        """The parts of a condition that the network wants, and of how many features each is (of labels, how many)."""
        return self.network.wants(self.channels)

    @property
    def null_label(self) -> int | None:
        """The label of "no class"; None where the network learned none."""
        rows = self.wants.get("labels", 0)
        return rows - 1 if rows > len(self.labels) > 0 else None

    def label(self, name: str | int) -> int:
        """Return the number of a class, by its name or number. Raises UserError for one that there is not.

        name: of a class with several, between commas as ImageNet's are, one that is its alone will do.
        """
        count = len(self.labels) or self.wants.get("labels", 0)
        if not count:
            raise UserError("this model knows no classes: leave them out")
        if isinstance(name, int) and not isinstance(name, bool):
            if not 0 <= name < count:
                raise UserError(f"there is no class {name}: the classes are 0 to {count - 1}")
            return name
        if name in self.labels:
            return self.labels.index(name)
        called = [k for k, each in enumerate(self.labels) if name in [one.strip() for one in each.split(",")]]
        if len(called) == 1:
            return called[0]
        if called:
            several = " and ".join(repr(self.labels[k]) for k in called[:2])
            raise UserError(
                f"{name!r:.60} is a name of several classes, such as {several}: give the whole of one"
            )
        known = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
        raise UserError(f"there is no class {name!r:.60}{nearest(str(name), self.labels)}; known: {known}")

    def without(self, condition: Condition) -> Condition:
        """Return what stands for "no condition" beside this one: the null class, and zeros in all other parts.

        Raises UserError for a model that always learned with its classes, and for a condition of nothing.
        """
        empty = condition.zeros()
        if not condition.parts():
            raise UserError("this model is told nothing, and guidance goes away from that: take guidance 1")
        if condition.labels is None:
            return empty
        if self.null_label is None:
            raise UserError(
                "this model never learned without a class, which guidance needs: take guidance 1, or train with "
                "condition.dropout"
            )
        return replace(empty, labels=torch.full_like(condition.labels, self.null_label))

    def bind(self, condition: Condition) -> BoundNetwork:
        """Return the network under a condition of R rows. Raises UserError for a part too many or too few."""
        condition.require(self.wants, "the network")
        return BoundNetwork(self.network, condition)

    def checkpoint(self) -> Checkpoint:
        """Return configs and tensors as files hold them."""
        parts: dict[str, Any] = {"unet": self.network}
        parts |= {} if self.autoencoder is None else {"vae": self.autoencoder}
        configs = {name: each.config.to_diffusers() for name, each in parts.items()}
        options = dict(self.options)
        if self.labels:
            options[_LABELS] = {str(number): name for number, name in enumerate(self.labels)}
        tensors = {name: each.state_dict() for name, each in parts.items()}
        return Checkpoint(self._class, configs | {"scheduler": self.process.to_dict()}, tensors, options)

    @property
    def _class(self) -> str:
        """The name of the pipeline of diffusers that draws this one; a name of our own where there is none."""
        if isinstance(self.network, UNet2D) and self.autoencoder is None:
            if isinstance(self.process, Discrete) and not self.wants:
                return "DDPMPipeline"
            consistency = isinstance(self.process, ConsistencyConfig) and self.process.diffusers_draws
            if consistency and set(self.wants) <= {"labels"}:
                return "ConsistencyModelPipeline"
        return CLASS

    def save(self, folder: str | Path) -> None:
        """Write a diffusers folder, whole or not at all."""
        write_folder(folder, self.checkpoint())


def _labels(named: object, path: Path) -> list[str]:
    """The names by number. Raises UserError unless they are numbered from 0 on."""
    if not isinstance(named, Mapping):
        raise UserError(f"{path}: {_LABELS} in model_index.json must name the classes by their numbers")
    numbered = {str(number): str(name) for number, name in named.items()}
    if odd := [number for number in map(str, range(len(numbered))) if number not in numbered]:
        raise UserError(
            f"{path}: {_LABELS} in model_index.json has {len(numbered)} names, and none for {odd[0]}"
        )
    return [numbered[str(number)] for number in range(len(numbered))]
