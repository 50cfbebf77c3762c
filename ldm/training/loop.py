"""The training loop, on accelerate: an objective says what is trained and what its loss is; the loop does the rest.

Progress is counted in pictures seen. To resume, run the same command again: data order and random numbers are
functions of (seed, pictures seen), so nothing but weights, optimizer and averages has to be stored. Several processes
share each batch, and do together what one would do alone.
"""

import json
import math
import time
import traceback
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from ldm.console import out_of_memory
from ldm.errors import UserError
from ldm.files import sweep, write_text
from ldm.models.layers import blocks_of, recompute_activations
from ldm.models.packed import unpack
from ldm.system import fingerprint
from ldm.training import state
from ldm.training.distributed import BatchGenerator, launch_notes, rows_of, shard_on_cpu, sharded, whole
from ldm.training.ema import EMA
from ldm.training.folders import held, make_folder
from ldm.training.layout import memory_format
from ldm.training.loop_config import LoopConfig, accelerator_for, precision_notes
from ldm.training.objective import Objective
from ldm.training.optimization import build_optimizer, learning_rate
from ldm.training.report import Report
from ldm.training.stop import noted_signals


class Trainer:
    """The state of one run: weights, optimizer, averaged weights, pictures seen.

    resolved: the whole configuration as text, which goes into the folder and into the state.
    """

    def __init__(self, objective: Objective, config: LoopConfig, folder: Path, resolved: str = ""):
        # What can't be honoured is refused here, before anything is computed.
        self.accelerator = accelerator_for(config, folder)
        make_folder(folder)
        self._held: ExitStack | None = None
        with self._hold(folder) as stack:  # let go of where this fails
            self._build(objective, config, folder, resolved)
            self._held = stack.pop_all()

    def _hold(self, folder: Path) -> ExitStack:
        """Hold the output for this run: the main process does, for all of its launch. Raises UserError in all."""
        stack, fault = ExitStack(), ""
        self._lockless = False
        if self.accelerator.is_main_process:
            try:
                self._lockless = not stack.enter_context(held(folder))
            except UserError as error:
                fault = str(error)
        if self._any(bool(fault)):
            raise UserError(fault or f"another training writes to {folder}")
        return stack

    def _build(self, objective: Objective, config: LoopConfig, folder: Path, resolved: str) -> None:
        place = self.accelerator.process_index, self.accelerator.num_processes
        self.rows = rows_of(config.batch_size, *place, config.gradient_accumulation_steps)
        self.objective, self.config, self.folder, self.resolved = objective, config, folder, resolved
        self.report = Report(self.accelerator, folder, config.pictures)
        self.report.tell([*launch_notes(), *precision_notes(config, self.accelerator.device)])
        if self._lockless:
            self.report.tell([f"{folder} can't be locked: see to it that no other training writes there"])
        objective.prepare(self.accelerator.device, config.batch_size)
        self.report.tell(objective.notes())
        model = objective.model.train()
        unpack(model)  # what has drawn before
        self.frozen = fingerprint({n: p for n, p in model.named_parameters() if not p.requires_grad})
        # FSDP takes contiguous weights only.
        layout = torch.contiguous_format if sharded() else memory_format(self.accelerator.device)
        model = model.to(self.accelerator.device, memory_format=layout)  # type: ignore[call-overload]
        self.ema = EMA(model, config.ema_half_life)
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        if plugin:  # its own casts would round timesteps: autocast does what is needed
            from torch.distributed.fsdp import MixedPrecisionPolicy

            plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if config.gradient_checkpointing:
            recompute_activations(model)
        done = shard_on_cpu(model, blocks_of(model))
        optimizer = build_optimizer(config.optimizer, model.parameters())
        self.model, self.optimizer = (
            (model, self.accelerator.prepare(optimizer))
            if done
            else self.accelerator.prepare(model, optimizer)
        )
        self.ema.start(self.plain)
        self.learning_rate = learning_rate(config.optimizer, config.pictures)
        self.seen, self.best = 0, math.inf
        self._unsaved = False  # whether the weights are whole, and of a step that no state holds
        self._ended = False  # by our own judgement, with what is saved said

    @property
    def plain(self) -> nn.Module:
        """The model without what accelerate put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def run(self) -> bool:
        """Train to the end; False where `max_seconds` or a signal (see `stop`) ended it before, the state saved."""
        held, self._held = self._held or self._hold(self.folder), None
        with held:
            self.resume()
            self.report.start(self.seen, {"config": self.resolved})
            try:
                finished = self._guarded()
            finally:  # also where the loss is no number
                self.report.tell(self.objective.notes())
                self.report.end()
            self.accelerator.wait_for_everyone()  # a launcher kills the others once one has ended
            return finished

    def _guarded(self) -> bool:
        """Train and export; where the machine fails, what was trained is saved first, if that can still be done."""
        try:
            if finished := self._train():
                averaged = self.ema.model(self.plain, keep=self.accelerator.is_main_process)
                if self.accelerator.is_main_process:
                    self.objective.export(averaged, self.folder / "export", self.resolved)
            return finished
        except Exception as error:
            if self._ended:
                raise
            traceback.clear_frames(error.__traceback__)  # their tensors take the memory that saving needs
            what, place = self._saved_now(), "after" if self.seen else "before the first step, after"
            if out_of_memory(error):
                raise UserError(
                    f"out of memory {place} {self.seen:,} pictures: make loop.batch_size smaller or "
                    f"loop.gradient_accumulation_steps larger, or set loop.gradient_checkpointing{what}"
                ) from None  # or it would be said in other words
            if isinstance(error, UserError):
                raise UserError(f"{error}{what}") from error
            if isinstance(error, OSError) and error.errno:
                raise UserError(f"{error.filename or self.folder}: {error.strerror}{what}") from error
            raise

    def _saved_now(self) -> str:
        """Save what is whole and not saved; what there is to go on from, as the end of a message."""
        if self._unsaved and self.accelerator.num_processes == 1:  # several would have to do it together
            with suppress(
                UserError, MemoryError, RuntimeError
            ):  # of the same trouble: the state before is whole
                self.save()
                return f"; all {self.seen:,} pictures are saved: run the same command again to go on"
        newest = state.newest(self.folder)
        return f"; {newest} is whole: run the same command again to go on from it" if newest else ""

    def _train(self) -> bool:
        """Steps to the end, or until the run has to stop; the state is saved."""
        limit = math.inf if self.config.max_seconds is None else self.config.max_seconds
        started = time.monotonic()
        with noted_signals() as signals:
            while self.seen < self.config.pictures:
                self.report.step(self.step(), self.seen)
                if self._due(self.config.log_every):
                    self._refuse_divergence(self.report.line(self.seen, lr=self.rate)[self.objective.watched])
                stop = self._any(time.monotonic() - started > limit or bool(signals))
                if stop or self._due(self.config.save_every):
                    self.save()
                if stop:
                    why = signals[0] if signals else "max_seconds"
                    self.report.say(
                        f"stopped by {why} at {self.seen:,} pictures, saved: run the same command to go on"
                    )
                    return False
                if self._due(self.config.validate_every):
                    self.validate()
        self.save()
        return True

    def step(self) -> dict[str, float]:
        """Take one optimizer step; return its figures, averaged over the processes."""
        config, seed = self.config, self.config.seed * 1_000_003 + self.seen
        # Dropout's: each process has its own, and none has that of the draws.
        torch.manual_seed(seed + (self.accelerator.process_index + 1 << 40))
        self.rate = self.learning_rate(self.seen)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        sums: dict[str, Tensor] = {}
        for rows in self.rows:
            batch = self.objective.batch(self.seen, config.batch_size, rows)
            last = rows == self.rows[-1]  # only then do processes exchange their gradients
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, logs = self.objective.loss(
                        self.model, batch, BatchGenerator(seed, config.batch_size, rows)
                    )
                self.accelerator.backward(loss / len(self.rows))
            for name, each in {"loss": loss, **logs}.items():
                sums[name] = sums.get(name, 0) + each.detach() / len(self.rows)
        limit = config.optimizer.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        figures = self._mean({**sums, "grad_norm": torch.as_tensor(norm)})
        self._refuse_nan(figures)
        self._unsaved = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += config.batch_size
        self.ema.update(self.plain, config.batch_size, self.seen)
        self._unsaved = True
        return figures

    def validate(self) -> None:
        """Log figures and pictures of the averaged weights."""
        averaged = self.ema.model(self.plain, keep=self.accelerator.is_main_process)
        before = set(self.folder.glob("*.png"))
        if self.accelerator.is_main_process:
            self.report.log(self.seen, self.objective.validate(averaged, self.folder, self.seen))
            self.report.pictures_of(self.seen, before)

    def save(self) -> None:
        """Write the state, whole or not at all, and remove the oldest. Raises UserError where it is not finite."""
        main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        self._unsaved = False  # what fails here is not tried once more
        tensors = state.collect(self.plain, self.ema.averages, self.optimizer.optimizer, keep=main)
        fault = state.fault(tensors)
        if self._any(bool(fault)):  # the main process alone has the tensors, and all of them stop
            self._stop(fault or "NaN or infinity in the state,")
        if main:
            metadata = {
                "config": self.resolved,
                "frozen": self.frozen,
                "best": str(self.best),
                "scaler": json.dumps(scaler.state_dict() if scaler else {}),
            }
            state.write(self.folder, self.seen, tensors, metadata, self.config.keep)
        self.accelerator.wait_for_everyone()  # no process ends before the state is written

    def resume(self) -> None:
        """Go on from the newest state, if there is one. Raises UserError where it is damaged or of another model."""
        if self.accelerator.is_main_process:
            sweep(self.folder)
        if path := state.newest(self.folder):
            found = self._read_state(path)
            if found.seen % self.config.batch_size:
                raise UserError(
                    f"{path} stands at {found.seen} pictures, no multiple of loop.batch_size "
                    f"{self.config.batch_size}: give a batch size that divides it"
                )
            state.restore(found, self.plain, self.ema.averages, self.optimizer.optimizer)
            if self.accelerator.scaler and found.scaler:
                self.accelerator.scaler.load_state_dict(found.scaler)
            self.seen, self.best = found.seen, found.best
            self.report.say(f"resumed from {path} at {self.seen:,} pictures")
        if self.accelerator.is_main_process and self.resolved:
            write_text(self.folder / "config.yaml", self.resolved)

    def _read_state(self, path: Path) -> state.Saved:
        """Read a state. Raises UserError, which names an older one that could be gone on from."""
        own = self.plain, self.ema.averages, self.optimizer.optimizer, self.frozen
        try:
            return state.read(path, *own)
        except UserError as error:
            for older in (each for each in state.saved(self.folder) if each < path):
                with suppress(UserError):
                    state.read(older, *own)
                    advice = f"{older.name} beside it is whole: delete {path.name} to go on from that"
                    break
            else:
                raise
            raise UserError(f"{error}; {advice}") from error

    def _due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` pictures; 0 is never."""
        return every > 0 and self.seen // every > (self.seen - self.config.batch_size) // every

    def _mean(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over the processes: the same everywhere, so that all go on or all stop."""
        device = self.accelerator.device
        values = torch.stack([whole(each.detach()).to(device, torch.float32) for each in figures.values()])
        values = self.accelerator.reduce(values, "mean")
        assert isinstance(values, Tensor)
        return dict(zip(figures, values.tolist(), strict=True))

    def _any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self._mean({"flag": torch.tensor(float(flag))})["flag"] > 0

    def _refuse_nan(self, figures: dict[str, float]) -> None:
        """Gradients may overflow in float16: its scaler passes over such a step and takes a smaller scale."""
        scaler = self.accelerator.scaler
        if not math.isfinite(figures["loss"]):
            self._stop(f"the loss became {figures['loss']}")
        if not math.isfinite(figures["grad_norm"]) and not (scaler and scaler.get_scale() >= 1):
            self._stop(f"the gradient's norm became {figures['grad_norm']}")

    def _refuse_divergence(self, loss: float) -> None:
        if loss > self.config.diverged * self.best > 0:
            self._stop(f"the loss rose to {loss:.4g}, from {self.best:.4g} at its best")
        self.best = min(self.best, loss)

    def _stop(self, why: str) -> NoReturn:
        """Raises UserError; a state from which not one step succeeded is named."""
        self._ended = True
        saved, newest = ":", state.newest(self.folder)
        if newest and newest == state.path_of(self.folder, self.seen):
            saved = f", and nothing came of {newest}: delete that file,"
        elif newest:
            saved = f"; the last saved state in {self.folder} is whole:"
        raise UserError(
            f"{why} after {self.seen} pictures{saved} lower the learning rate and run the same command again"
        )
