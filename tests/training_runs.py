"""Runs over tiny networks and sprites made here, for the tests of training."""

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_bert_folder

from ldm.checkpoints.folder import write_component
from ldm.emoji.mixture import MixtureConfig
from ldm.emoji.pools import CompositionsConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.training.distributed import BatchGenerator
from ldm.training.loop import LoopConfig
from ldm.training.objectives import autoencoder
from ldm.training.optimization import OptimizerConfig
from ldm.training.state import newest

TINY_VAE = {
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}
TINY_UNET = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
LOOP = {
    "pictures": 64,
    "batch_size": 8,
    "save_every": 16,
    "validate_every": 64,
    "log_every": 16,
    "precision": "no",
}


def config(folder: Path, sprites: str, latents: Path | None = None, **changes: object) -> Path:
    """A whole run over tiny networks, as a file. latents: a folder of a pool that other runs have filled."""
    with torch.random.fork_rng():  # the same autoencoder each time, and so the same pool
        torch.manual_seed(1)
        vae = AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE))
    write_component(folder, "vae", vae.config.to_diffusers(), vae.state_dict())
    tiny_bert_folder(folder)
    mixture = {"size": 32, "things": ["tree", "star", "rocket"], "styles": ["3d"]}
    objective = {
        "base": {
            "autoencoder": str(folder),
            "text_encoder": str(folder),
            "unet": {**TINY_UNET, "in_channels": 4, "out_channels": 4},
            "steps": 2,
        },
        "data": {
            "kind": "compositions",
            "cache": str(latents or folder / "latents"),
            "sprites": sprites,
            "pictures": 2048,
            "mixture": mixture,
        },
        "validation": {"prompts": ["a tree", "a star"], "steps": 2},
    }
    return write_config(folder, {"loop": {**LOOP, **changes}, "text_to_image": objective})


def write_config(folder: Path, sections: dict[str, Any]) -> Path:
    """A config file whose run goes into `folder/run`."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "run"), **sections}))
    return path


def first_stage_config(sprites: str, **changes: Any) -> autoencoder.Config:
    mixture = MixtureConfig(size=32, things=["tree", "star", "rocket"], styles=["3d"])
    data = CompositionsConfig(mixture, sprites, labels=changes.pop("labels", None))
    return autoencoder.Config(**{"data": data, "crop": 16, **changes})


class Toy:
    """A regression with dropout; `meddle` is called with the pictures seen before each loss."""

    watched = "loss"

    def __init__(self, width: int = 4, meddle: Callable[[int], None] = lambda seen: None):
        torch.manual_seed(3)
        hidden = torch.nn.Linear(3, width)
        self.model: torch.nn.Module = torch.nn.Sequential(
            hidden, torch.nn.Dropout(0.5), torch.nn.Linear(width, 1)
        )
        self.meddle = meddle

    def helpers(self) -> dict[str, torch.nn.Module]:
        return {}

    def prepare(self, device: torch.device, batch_size: int) -> None:
        self.device = device

    def batch(self, start: int, size: int, rows: slice) -> torch.Tensor:
        self.meddle(start)
        return torch.arange(start, start + size)[rows, None] / torch.tensor([10.0, 20.0, 30.0])

    def loss(
        self, model: torch.nn.Module, batch: torch.Tensor, rng: BatchGenerator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error = model((batch + rng.normal(3)).to(self.device)) - 1
        return error.square().mean(), {"error": error.abs().mean()}

    def validate(self, model: torch.nn.Module, folder: Path, seen: int) -> dict[str, float]:
        return {}

    def export(self, model: torch.nn.Module, folder: Path, config: str) -> None:
        folder.mkdir(exist_ok=True)

    def notes(self) -> list[str]:
        return []


TOY = LoopConfig(
    pictures=64,
    batch_size=8,
    optimizer=OptimizerConfig(warmup=0),
    log_every=8,
    save_every=1000,
    validate_every=1000,
    precision="no",
)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The newest."""
    path = newest(folder)
    assert path
    return load_file(path)


def side_by_side(script: str) -> list[str]:
    """Run a script in two processes that know of each other, on the CPU; what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), said
    return [out for out, _ in said]
