"""The command line of training: `scripts/train.py` and `scripts/finetune.py`."""

import argparse
import sys
from collections.abc import Sequence

from torch import nn

from ldm.errors import UserError
from ldm.training import state
from ldm.training.run import Run, read_run, train
from ldm.training.share import processes

_GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished, 3 stopped before the end with its state saved, 2 something the user should mend."""
    parser = argparse.ArgumentParser(
        description="Train what a config file says. To resume, run the same command again.",
        epilog="accelerate launch starts several processes, and knows FSDP2 (accelerate config).",
    )
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override values of the config",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole config, parameters, memory and steps; train nothing",
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.dry_run:
            print(describe(read_run(chosen.config, chosen.set)))
            return 0
        return 0 if train(chosen.config, chosen.set) else 3
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def describe(run: Run) -> str:
    """The resolved config, and what training by it takes. Raises UserError where the objective can't be built."""
    model = run.objective().model
    trained, frozen = _sizes(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in model.parameters()) - count
    bits = 8 if run.loop.optimizer.kind == "adamw8bit" else 32
    # Weights, gradients, average, and AdamW's two moments.
    memory = 3 * trained + 2 * bits // 8 * count + frozen
    newest = state.newest(run.output)
    seen = int(newest.stem.removeprefix("state-")) if newest else 0
    steps = -(-max(0, run.loop.pictures - seen) // run.loop.batch_size)
    share = run.loop.batch_size // processes().num_processes // max(run.loop.accumulate, 1)
    return "\n".join(
        [
            run.resolved,
            f"objective    {run.name}",
            f"parameters   {count:,} trained, {others:,} frozen in the same model",
            f"memory       {memory / _GIB:.2f} GiB for weights, gradients, average and optimizer; on top come the "
            f"activations of {share} pictures at a time" + (", recomputed" if run.loop.checkpointing else ""),
            f"steps        {steps:,} to come, of {run.loop.batch_size} pictures"
            + (f"; {seen:,} of {run.loop.pictures:,} pictures are done" if seen else ""),
            f"output       {run.output}",
        ]
    )


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes of trained parameters in float32, and of frozen ones as they are."""
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return trained, frozen
