"""The few-step form of a model: a LoRA that makes of it a student of few steps, in a folder beside the model's parts.

    MODEL/fast/pytorch_lora_weights.safetensors   as distillation writes it; diffusers loads it as any LoRA
    MODEL/fast/scheduler/scheduler_config.json    what the student is drawn with
    MODEL/fast/few_steps.json                     its base, and its numbers of steps and of guidance

Such a folder is a model itself, wherever a model is named.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ldm.checkpoints.folder import read_json, write_component
from ldm.checkpoints.hub import is_hub_id, resolve
from ldm.checkpoints.lora import read_lora_file
from ldm.checkpoints.paths import readable
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.files import write_text
from ldm.models.denoising import DenoisingNetwork
from ldm.models.lora import LoRA

FOLDER, FILE, BUNDLED = "fast", "few_steps.json", "bundled"
_DEFAULTS = ("num_inference_steps", "guidance_scale")


@dataclass(frozen=True)
class FewSteps:
    """What a few-step form's folder says.

    base: the model that its LoRA is for: a path, from this folder on (".." is the model whose part it is), a hub id, or
        "bundled".
    options: the entries of model_index.json that it sets.
    """

    folder: Path
    base: str
    scheduler: SchedulerConfig
    options: Mapping[str, Any]

    def model(self, variant: str | None) -> Path | None:
        """Return the base, fetched where it is a hub id; None for the bundled model.

        Raises UserError where it is not there, or no whole model. variant: see `System.load`.
        """
        if self.base == BUNDLED:
            return None
        file = self.folder / FILE
        with readable(file):
            place = self.folder / Path(self.base).expanduser()
            there = place.exists()
        if not there and not is_hub_id(self.base):  # and not from where the program runs
            raise UserError(
                f"{file}: its base {self.base!r:.60} is no such folder or file, and no hub id (org/name) either"
            )
        found = place.resolve() if there else resolve(self.base, variant)
        refuse_form(found, f"{file}: its base {self.base!r:.60}")
        return found

    def merge(self, network: DenoisingNetwork, others: Mapping[str, nn.Module]) -> list[str]:
        """Make the student of its teacher, for good, in the precision that its weights have.

        Returns what the reader of the LoRA's file should be told. Raises UserError.
        """
        networks = {network.component: network, **others}
        found = read_lora_file(self.folder, networks, network.config.to_diffusers())
        if not found.adapters:
            raise UserError(f"{self.folder} holds no LoRA")
        for part, weights in found.adapters.items():
            LoRA.from_weights(networks[part], weights).fuse()
        words = [f"{self.folder}: new words in its LoRA are passed over"] if found.bundled else []
        return [*found.notes, *words]


def fast_form(path: Path) -> Path:
    """Return the folder of a model's few-step form. Raises UserError where it has none."""
    refuse_form(path, str(path))
    place = path / FOLDER
    if not (place / FILE).is_file():
        raise UserError(
            f"{path} has no few-step form ({FOLDER}/{FILE}): leave fast out, or distil one (docs/lectures/few-steps.md)"
        )
    return place


def refuse_form(path: Path, what: str) -> None:
    """Raise UserError, that calls it `what`, where a path is that of a few-step form and no whole model's."""
    if (path / FILE).is_file():
        raise UserError(f"{what} is a few-step form itself: name a whole model")


def read_few_steps(path: Path) -> FewSteps | None:
    """Read what a folder says of a few-step form; None where it is none. Raises UserError."""
    if not path.is_dir() or not (path / FILE).is_file():
        return None
    said = read_json(path / FILE)
    base = said.get("base", "..")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path / FILE}: base is {base!r:.60}: name the model that it is for")
    where = path / "scheduler" / "scheduler_config.json"
    scheduler = SchedulerConfig.from_dict(read_json(where), str(where))
    return FewSteps(path, base, scheduler, {name: said[name] for name in _DEFAULTS if name in said})


def write_few_steps(
    folder: Path, base: str, scheduler: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Write what makes a model of a folder with a LoRA; see `FewSteps`."""
    write_component(folder, "scheduler", scheduler)
    chosen = {name: options[name] for name in _DEFAULTS if name in options}
    write_text(folder / FILE, json.dumps({"base": base, **chosen}, indent=2) + "\n")
