"""The loop's settings, and Accelerate set up by them, as far as this machine can honour them."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ldm import processor
from ldm.errors import UserError
from ldm.training.bounds import refuse_outside
from ldm.training.distributed import processes, rows_of, sharded
from ldm.training.optimization import OptimizerConfig, warmup_of

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class LoopConfig:
    """The length of training, and the times of what is written; every count is in pictures, and 0 is never.

    batch_size: of one optimizer step, all processes together. gradient_accumulation_steps: in how many parts each
        process takes its share of it, to save memory.
    precision: of the computation; weights, averages and optimizer are float32.
    gradient_checkpointing: recompute activations in the backward pass, for less memory and more time.
    keep: how many saved states stay: two or more, for on the newest no loss was computed yet.
    diverged: stop where the loss is so many times its best (means between lines).
    trackers: any of accelerate's, such as tensorboard and wandb, or "all" that are installed.
    max_seconds: stop early and save, to fit a machine that is lent for a while; the same command goes on.
    """

    renamed: ClassVar[dict[str, str]] = {
        "checkpointing": "gradient_checkpointing",
        "accumulate": "gradient_accumulation_steps",
    }

    pictures: int
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_half_life: int = 20_000
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    log_every: int = 2_000
    save_every: int = 20_000
    keep: int = 2
    validate_every: int = 20_000
    diverged: float = 20.0
    trackers: tuple[str, ...] = ()
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values that can't be."""
        counts = ("pictures", "ema_half_life", "log_every", "save_every", "validate_every", "max_seconds")
        refuse_outside("loop", self, counts, 0)
        refuse_outside("loop", self, ("batch_size", "gradient_accumulation_steps"), 1)
        refuse_outside("loop", self, ("keep",), 2)
        refuse_outside("loop", self, ("seed",), 0, 2**32)
        if self.diverged:
            refuse_outside("loop", self, ("diverged",), 1)
        warmup_of(self.optimizer, self.pictures)


def precision_notes(config: LoopConfig, device: torch.device) -> list[str]:
    """Return what the user should know of the precision on this device."""
    if config.precision != "bf16" or device.type != "cpu" or processor.multiplies_bfloat16():
        return []
    return [
        "loop.precision bf16 takes several times as long as no on this processor, which has no instructions for it: "
        "loop.precision=no is the faster one"
    ]


def accelerator_for(config: LoopConfig, folder: Path) -> "Accelerator":
    """Set up Accelerate for a run into `folder`. Raises UserError for what this machine or launch can't honour."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    shared = processes()
    rows_of(config.batch_size, shared.process_index, shared.num_processes, config.gradient_accumulation_steps)
    sharded()
    if config.precision == "fp16" and str(shared.device) == "cpu":  # accelerate would pass over it in silence
        raise UserError("loop.precision fp16 is for GPUs: use bf16 or no on the CPU")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.precision):  # "no" is also what is launched by default
        raise UserError(
            f"accelerate was told mixed_precision {launched} and the config says loop.precision {config.precision}: "
            "launch with --mixed_precision no, which leaves the choice to the config, or make them the same"
        )
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.precision:
        # accelerate keeps the first precision of a process for good; a second run in a notebook may have another.
        AcceleratorState._reset_state()
    # cuDNN's attention, the default on Hopper, gives NaN gradients for some lengths in 16 bits (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision, log_with=list(config.trackers) or None, project_dir=folder
        )
    except ValueError as error:  # no such precision on this device, or no such tracker
        raise UserError(f"accelerate refuses loop.precision or loop.trackers: {error}") from error
    installed = {str(each) for each in accelerator.log_with}
    if absent := sorted({*config.trackers} - installed - {"all"}):
        raise UserError(f"loop.trackers: {absent[0]} is not installed: pip install {absent[0]}")
    if config.trackers and not installed:
        raise UserError("loop.trackers: all, and none is installed: pip install tensorboard, or leave it out")
    return accelerator
