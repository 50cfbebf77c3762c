"""From a config file to a finished run."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml

from ldm.config import load_yaml, to_dict
from ldm.errors import UserError
from ldm.training.autoencoder import AutoencoderObjective, AutoencoderObjectiveConfig
from ldm.training.loop import LoopConfig, Objective, Trainer
from ldm.training.share import processes
from ldm.training.text_to_image import TextToImageObjective, TextToImageObjectiveConfig


@dataclass(frozen=True)
class RunConfig:
    """One training run: where it writes, how long it trains, and exactly one objective."""

    output: str
    loop: LoopConfig
    autoencoder: AutoencoderObjectiveConfig | None = None
    text_to_image: TextToImageObjectiveConfig | None = None


def build_objective(config: RunConfig) -> Objective:
    """Raises UserError unless exactly one objective is configured."""
    named = [f.name for f in fields(config) if f.name not in ("output", "loop") and getattr(config, f.name)]
    if len(named) != 1:
        raise UserError(
            f"a run config needs exactly one of autoencoder, text_to_image; it has {named or 'none'}"
        )
    if config.autoencoder:
        return AutoencoderObjective(config.autoencoder)
    assert config.text_to_image
    return TextToImageObjective(config.text_to_image)


def train(path: str | Path, overrides: Iterable[str] = ()) -> bool:
    """Train what the config file says; True when the run is complete.

    The resolved config goes into the run's folder and into its state.
    """
    config = load_yaml(path, RunConfig, overrides)
    torch.manual_seed(config.loop.seed)  # the weights that training starts from
    with processes().main_process_first():  # it fetches what is missing
        objective = build_objective(config)
    resolved = yaml.safe_dump(to_dict(config), sort_keys=False)
    return Trainer(objective, config.loop, Path(config.output), resolved).run()
