"""The training loop, on accelerate: an objective says what is trained and what its loss is; the loop does the rest.

Progress is counted in pictures seen. To resume, run the same command again: data order and random numbers are
functions of (seed, pictures seen), so nothing but weights, optimizer and EMA has to be stored.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import read_metadata, read_tensors, write_tensors, write_text
from ldm.errors import UserError
from ldm.training.ema import EMA


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train; every count is in pictures.

    decay: the last share of the run over which the learning rate falls to zero, linearly (warmup-stable-decay;
        Hägele et al. 2024), so that a run can be prolonged from before it.
    max_seconds: stop early and save, to fit a machine that is lent for a while; the same command goes on.
    """

    pictures: int
    batch_size: int = 64
    learning_rate: float = 5e-4
    warmup: int = 10_000
    decay: float = 0.3
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0
    ema_half_life: int = 20_000
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    log_every: int = 2_000
    save_every: int = 20_000
    validate_every: int = 20_000
    max_seconds: float | None = None


class Objective(Protocol):
    """What is trained, on what, towards what."""

    model: nn.Module

    def batch(self, start: int, size: int) -> Any:
        """The pictures `start` .. `start + size` of the endless, deterministic data order."""
        ...

    def loss(self, model: nn.Module, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The scalar loss and named figures for the log."""
        ...

    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Figures, and pictures written into `folder`, of the averaged weights."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the finished network as others read it."""
        ...


def learning_rate(config: LoopConfig, seen: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` of the run."""
    rise = min(1.0, (seen + config.batch_size) / max(config.warmup, 1))
    fall = min(1.0, (config.pictures - seen) / max(config.decay * config.pictures, 1))
    return config.learning_rate * min(rise, max(fall, 0.0))


class Trainer:
    """The state of one run: weights, optimizer, averaged weights, pictures seen."""

    def __init__(self, objective: Objective, config: LoopConfig, folder: Path):
        from accelerate import Accelerator

        self.objective, self.config, self.folder = objective, config, folder
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
        model = objective.model.to(self.accelerator.device).train()
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.ema = EMA(model, config.ema_half_life)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.seen = 0

    def run(self) -> bool:
        """Train to the end; False where `max_seconds` ended it before."""
        self.resume()
        started, since, logged = time.monotonic(), time.monotonic(), self.seen
        while self.seen < self.config.pictures:
            logs = self.step()
            if self._due(self.config.log_every):
                rate = (self.seen - logged) / (time.monotonic() - since)
                since, logged = time.monotonic(), self.seen
                self.log({**logs, "pictures_per_second": rate})
            if self._due(self.config.save_every):
                self.save()
            if self._due(self.config.validate_every):
                self.log(self.objective.validate(self.ema.model, self.folder, self.seen))
                self.model.train()
            if self.config.max_seconds is not None and time.monotonic() - started > self.config.max_seconds:
                self.save()
                return False
        self.save()
        self.objective.export(self.ema.model, self.folder / "export")
        return True

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        config = self.config
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + self.seen)
        batch = self.objective.batch(self.seen, config.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.seen)
        with self.accelerator.autocast():
            loss, logs = self.objective.loss(self.model, batch, rng)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss became {loss.item()} after {self.seen} pictures; the last checkpoint in {self.folder} "
                "is whole: lower the learning rate and run the same command again"
            )
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += config.batch_size
        self.ema.update(self.accelerator.unwrap_model(self.model), config.batch_size, self.seen)
        return {
            "loss": loss.item(),
            "grad_norm": float(norm or 0),
            "lr": learning_rate(config, self.seen),
            **logs,
        }

    def _due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` pictures."""
        return self.seen // every > (self.seen - self.config.batch_size) // every

    def log(self, figures: dict[str, float]) -> None:
        """One line on the console and in `log.jsonl`."""
        print(f"{self.seen:>9,}  " + "  ".join(f"{k} {v:.5g}" for k, v in figures.items()), flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"seen": self.seen, **figures}) + "\n")

    def save(self) -> None:
        """Weights, averaged weights and optimizer in one file, written whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        tensors |= {f"optimizer.{names[i]}.{k}": v for i, s in moments.items() for k, v in s.items()}
        write_tensors(self.folder / "state.safetensors", tensors, {"seen": str(self.seen)})
        write_text(
            self.folder / "progress.json", json.dumps({"seen": self.seen, "pictures": self.config.pictures})
        )

    def resume(self) -> None:
        """Go on from `state.safetensors`, if there is one."""
        path = self.folder / "state.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        tensors = read_tensors(path)
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(_part(tensors, "model."))
        self.ema.model.load_state_dict(_part(tensors, "ema."))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        state = {i: _like(p, _part(tensors, f"optimizer.{name}.")) for i, (name, p) in enumerate(trained)}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.seen = int(read_metadata(path)["seen"])
        print(f"resumed from {path} at {self.seen:,} pictures", flush=True)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, copied out of the mapped file, which the next save replaces."""
    return {name[len(prefix) :]: each.clone() for name, each in tensors.items() if name.startswith(prefix)}


def _like(parameter: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments in the memory layout of their parameter: the fused optimizer walks both in the order of memory."""
    return {
        name: torch.empty_like(parameter).copy_(each) if each.shape == parameter.shape else each
        for name, each in moments.items()
    }
