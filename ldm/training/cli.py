"""The command line of training: `scripts/train.py`, which `scripts/finetune.py` is another name of."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.console import Parser, command
from ldm.errors import printable

if TYPE_CHECKING:
    from torch import nn

    from ldm.training.run import Run

_GIB = 2**30


@command(
    stopped="stopped; the same command goes on from the last state that was saved",
    memory="train with a smaller loop.batch_size, with more loop.gradient_accumulation_steps, or with "
    "loop.gradient_checkpointing=true",
)
def main(arguments: Sequence[str] | None = None, kinds: Sequence[str] = ()) -> int:
    """Train what a config says.

    kinds: modules that bring kinds of data (see `ldm.training.data.kinds`), to be imported first.
    Exit status: 0 finished, 3 stopped before the end with its state saved, 2 something the user should mend, 130
    ended by Ctrl-C, SIGTERM or SIGHUP where there was nothing to save.

    Launchers turn the last three into 1.
    """
    parser = Parser(
        description="Train what a config file says. To resume, run the same command again.",
        epilog="Several processes: accelerate launch --multi_gpu --num_processes 2 scripts/train.py ..., or torchrun "
        "--nproc_per_node 2 scripts/train.py ...; on CPUs alike, where accelerate's --cpu would start one only "
        "(ACCELERATE_USE_CPU=true leaves GPUs alone). FSDP2 is chosen in accelerate config.",
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
    from ldm.training.run import read_run, train

    for module in kinds:
        importlib.import_module(module)
    if chosen.dry_run:
        run = read_run(chosen.config, chosen.set)
        print(run.resolved, flush=True)  # before anything else can fail
        print(describe(run))
        return 0
    return 0 if train(chosen.config, chosen.set) else 3


def describe(run: "Run") -> str:
    """Return what training takes; of several rounds, the first that is not finished.

    Raises UserError where it would not begin: this machine, the objective, the optimizer.
    """
    from ldm.training import state
    from ldm.training.distributed import launch_notes
    from ldm.training.loop_config import accelerator_for
    from ldm.training.optimization import build_optimizer

    run, listed = _first_unfinished(run)
    accelerator = accelerator_for(run.loop, run.output)
    objective = run.objective()
    build_optimizer(run.loop.optimizer, objective.model.parameters())
    inside = list(objective.model.parameters())
    trained = [each for each in inside if each.requires_grad]
    frozen = [each for each in inside if not each.requires_grad]
    beside = {name: _others(module, inside) for name, module in objective.helpers().items()}
    # Weights, gradients and average in float32, and AdamW's two moments.
    moment = 1 if run.loop.optimizer.kind == "adamw8bit" else 4
    memory = _count(trained) * (3 * 4 + 2 * moment)
    helping = sum(each.numel() * each.element_size() for some in [frozen, *beside.values()] for each in some)
    newest = state.newest(run.output)
    seen = state.seen_by(newest) if newest else 0
    steps = -(-max(0, run.loop.pictures - seen) // run.loop.batch_size)
    share = run.loop.batch_size // accelerator.num_processes // run.loop.gradient_accumulation_steps
    named = ", ".join(f"{name} {_count(some):,}" for name, some in beside.items() if some)
    return "\n".join(
        [
            *launch_notes(),
            f"objective    {run.name}",
            *([f"rounds       {printable(listed)}"] if listed else []),
            f"parameters   {_count(trained):,} trained, {_count(frozen):,} frozen in the same model",
            *([f"beside it    {named}, frozen"] if named else []),
            f"memory       {memory / _GIB:.2f} GiB for weights, gradients, average and optimizer, "
            f"{helping / _GIB:.2f} GiB for what is frozen; on top come the activations of {share} pictures at a time"
            + (", recomputed" if run.loop.gradient_checkpointing else ""),
            f"steps        {steps:,} to come, of {run.loop.batch_size} pictures"
            + (f"; {seen:,} of {run.loop.pictures:,} pictures are done" if seen else ""),
            f"output       {printable(str(run.output))}",
        ]
    )


def _first_unfinished(run: "Run") -> "tuple[Run, str]":
    """The round of a run to come, or its last, and all of them as text; the run itself and "" where it has none."""
    rounds = run.rounds()
    if len(rounds) == 1:
        return run, ""
    ended = [each.as_round().finished for each in rounds]
    chosen = next((each for each, over in zip(rounds, ended, strict=True) if not over), rounds[-1])
    said = [
        "finished" if over else "this one" if each is chosen else "to come"
        for each, over in zip(rounds, ended, strict=True)
    ]
    return chosen, ", ".join(f"{each.output.name} ({how})" for each, how in zip(rounds, said, strict=True))


def _others(module: "nn.Module", known: "list[nn.Parameter]") -> "list[nn.Parameter]":
    """The parameters of a module that are not among those known, to which they are added."""
    seen = {id(each) for each in known}
    new = [each for each in module.parameters() if id(each) not in seen]
    known += new
    return new


def _count(parameters: "list[nn.Parameter]") -> int:
    return sum(each.numel() for each in parameters)
