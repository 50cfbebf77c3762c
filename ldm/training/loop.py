"""The training loop, on accelerate: an objective says what is trained and what its loss is; the loop does the rest.

Progress is counted in pictures seen. To resume, run the same command again: data order and random numbers are
functions of (seed, pictures seen), so nothing but weights, optimizer and EMA has to be stored. Several processes
share each batch, and do together what one would do alone.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import a_few, load_strict, read_metadata, read_tensors, write_tensors, write_text
from ldm.errors import UserError
from ldm.training.ema import EMA
from ldm.training.share import Draws, processes, rows_of
from ldm.training.stop import noted_signals


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train; every count is in pictures.

    batch_size: of one optimizer step, all processes together.
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
    precision: Literal["no", "bf16"] = "bf16"
    log_every: int = 2_000
    save_every: int = 20_000
    validate_every: int = 20_000
    max_seconds: float | None = None


class Objective(Protocol):
    """What is trained, on what, towards what. The parameters of `model` that require a gradient are trained."""

    model: nn.Module

    def to(self, device: torch.device) -> None:
        """Move the frozen networks that help, but not `model`, to where the training runs."""
        ...

    def batch(self, start: int, size: int, rows: slice) -> Any:
        """The `rows` of pictures `start` .. `start + size` of the endless, deterministic data order."""
        ...

    def loss(self, model: nn.Module, batch: Any, rng: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, a mean over the batch's rows, and named scalars for the log."""
        ...

    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Figures, and pictures written into `folder`, of the averaged weights. In the main process alone."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the finished network as others read it. In the main process alone."""
        ...


def learning_rate(config: LoopConfig, seen: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` of the run."""
    rise = min(1.0, (seen + config.batch_size) / max(config.warmup, 1))
    fall = min(1.0, (config.pictures - seen) / max(config.decay * config.pictures, 1))
    return config.learning_rate * min(rise, max(fall, 0.0))


class Trainer:
    """The state of one run: weights, optimizer, averaged weights, pictures seen.

    resolved: the whole configuration as text, which goes into the folder and into the state.
    """

    def __init__(self, objective: Objective, config: LoopConfig, folder: Path, resolved: str = ""):
        from accelerate import Accelerator

        self.objective, self.config, self.folder, self.resolved = objective, config, folder, resolved
        self.rows = rows_of(config.batch_size, processes().process_index, processes().num_processes)
        try:
            self.accelerator = Accelerator(mixed_precision=config.precision)
        except ValueError as error:  # no bfloat16 on this device
            raise UserError(f"loop.precision {config.precision} can't be had: {error}") from error
        objective.to(self.accelerator.device)
        model = objective.model.to(self.accelerator.device).train()
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.ema = EMA(model, config.ema_half_life)
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
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
        """Train to the end; False where `max_seconds`, SIGTERM or Ctrl-C ended it before, the state saved."""
        self.resume()
        limit = math.inf if self.config.max_seconds is None else self.config.max_seconds
        started = since = time.monotonic()
        logged = self.seen
        with noted_signals() as signals:
            while self.seen < self.config.pictures:
                figures = self.step()
                if self._due(self.config.log_every):
                    rate = (self.seen - logged) / (time.monotonic() - since)
                    since, logged = time.monotonic(), self.seen
                    self.log({**figures, "pictures_per_second": rate})
                late = time.monotonic() - started > limit
                stop = self._any(late or bool(signals))
                if stop or self._due(self.config.save_every):
                    self.save()
                if stop:
                    why = signals[0] if signals else "max_seconds"
                    self.say(
                        f"stopped by {why} at {self.seen:,} pictures, saved: run the same command to go on"
                    )
                    return False
                if self._due(self.config.validate_every) and self.accelerator.is_main_process:
                    self.log(self.objective.validate(self.ema.model, self.folder, self.seen))
        self.save()
        if self.accelerator.is_main_process:
            self.objective.export(self.ema.model, self.folder / "export")
        return True

    def step(self) -> dict[str, float]:
        """One optimizer step; its figures, averaged over the processes."""
        config, seed = self.config, self.config.seed * 1_000_003 + self.seen
        torch.manual_seed(seed + (self.accelerator.process_index << 40))  # dropout, of each process's own
        rate = learning_rate(config, self.seen)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.objective.batch(self.seen, config.batch_size, self.rows)
        with self.accelerator.autocast():
            loss, logs = self.objective.loss(self.model, batch, Draws(seed, config.batch_size, self.rows))
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        figures = self._mean({"loss": loss, "grad_norm": torch.as_tensor(norm), **logs})
        for name, what in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
            if not math.isfinite(figures[name]):
                raise UserError(
                    f"{what} became {figures[name]} after {self.seen} pictures; the last checkpoint in "
                    f"{self.folder} is whole: lower the learning rate and run the same command again"
                )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += config.batch_size
        self.ema.update(self.accelerator.unwrap_model(self.model), config.batch_size, self.seen)
        return {**figures, "lr": rate}

    def _due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` pictures."""
        return self.seen // every > (self.seen - self.config.batch_size) // every

    def _mean(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over the processes: the same everywhere, so that all go on or all stop."""
        device = self.accelerator.device
        values = torch.stack([each.detach().to(device, torch.float32) for each in figures.values()])
        values = self.accelerator.reduce(values, "mean")
        assert isinstance(values, Tensor)
        return dict(zip(figures, values.tolist(), strict=True))

    def _any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self._mean({"flag": torch.tensor(float(flag))})["flag"] > 0

    def say(self, line: str) -> None:
        """A line on the main process's console."""
        if self.accelerator.is_main_process:
            print(line, flush=True)

    def log(self, figures: dict[str, float]) -> None:
        """One line on the console and in `log.jsonl`."""
        self.say(f"{self.seen:>9,}  " + "  ".join(f"{k} {v:.5g}" for k, v in figures.items()))
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"seen": self.seen, **figures}) + "\n")

    def save(self) -> None:
        """Weights, averaged weights and optimizer in one file, written whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"model.{k}": v for k, v in self.accelerator.unwrap_model(self.model).state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        tensors |= {f"optimizer.{self.trained[i]}.{k}": v for i, s in moments.items() for k, v in s.items()}
        metadata = {"seen": str(self.seen), "config": self.resolved}
        write_tensors(self.folder / "state.safetensors", tensors, metadata)

    def resume(self) -> None:
        """Go on from `state.safetensors`, if there is one. Raises UserError where it is of another model."""
        path = self.folder / "state.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._load(path)
            self.say(f"resumed from {path} at {self.seen:,} pictures")
        if self.accelerator.is_main_process and self.resolved:
            write_text(self.folder / "config.yaml", self.resolved)

    def _load(self, path: Path) -> None:
        tensors = read_tensors(path)
        moments = {name[10:].rpartition(".")[0] for name in tensors if name.startswith("optimizer.")}
        try:
            load_strict(self.ema.model, _part(tensors, "ema."), path)
            if differ := sorted(moments ^ set(self.trained)):
                raise UserError(f"{path}: other weights were trained, or not: {a_few(differ)}")
        except UserError as error:
            raise UserError(
                f"{error}; this run began otherwise: give another output, or delete {self.folder}"
            ) from None
        self.ema.model.to(self.accelerator.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(_part(tensors, "model."))
        parameters = dict(model.named_parameters())
        state = {
            i: _like(parameters[name], _part(tensors, f"optimizer.{name}."))
            for i, name in enumerate(self.trained)
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.seen = int(read_metadata(path)["seen"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, copied out of the mapped file, which the next save replaces."""
    return {name[len(prefix) :]: each.clone() for name, each in tensors.items() if name.startswith(prefix)}


def _like(parameter: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments in the memory layout of their parameter: the fused optimizer walks both in the order of memory."""
    return {
        name: torch.empty_like(parameter).copy_(each) if each.shape == parameter.shape else each
        for name, each in moments.items()
    }
