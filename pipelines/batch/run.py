"""A run from its beginning to its manifest, by one process or several of one machine."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ldm.console import note
from ldm.errors import UserError
from pipelines import TextToImagePipeline
from pipelines.batch.ledger import MANIFEST, Ledger
from pipelines.batch.manifest import arrow, write_manifest
from pipelines.batch.processes import Helpers
from pipelines.batch.progress import Progress
from pipelines.batch.setup import Setup
from pipelines.batch.work import Work, draw_open
from pipelines.recipe import PRECISIONS

_WAIT = 0.5  # seconds until what others have claimed is looked at again
_SHOWN = 20  # failures, and missing pictures, that are told one by one


@dataclass(frozen=True)
class Outcome:
    """How a run ended. failed: how many pictures could not be drawn, for reasons that the manifest tells."""

    manifest: Path
    drawn: int
    failed: int
    summary: str


# Draws all that is open, and calls the second argument from time to time.
Engine = Callable[["Begun", Callable[[], None]], None]


@dataclass
class Begun:
    """A run that this process takes part in."""

    setup: Setup
    pipe: TextToImagePipeline
    ledger: Ledger
    progress: Progress
    join: bool


def run(
    setup: Setup,
    workers: int | None = 1,
    join: bool = False,
    retry: bool = False,
    verbose: bool = True,
    engine: Engine | None = None,
    pipe: TextToImagePipeline | None = None,
) -> Outcome:
    """Draw all rows that aren't drawn yet, and write the manifest.

    workers: processes on this machine; None is as many as suit it. join: beside others that draw into the same folder.
    retry: draw rows that failed once more. verbose: tell how it gets on. engine: another way to share out the blocks.
    pipe: what `setup` loads, where that is loaded already. Raises UserError.
    """
    with begun(setup, join, retry, verbose, pipe) as each:
        if each.ledger.open_blocks():
            if engine is not None:
                engine(each, lambda: each.progress.set(*counts(each.ledger)))
            else:
                _together(each, workers)
        return _end(each)


@contextmanager
def begun(
    setup: Setup, join: bool, retry: bool, verbose: bool, pipe: TextToImagePipeline | None
) -> Iterator[Begun]:
    """Load the model, and begin the run or go on with it, after a look at what is there. Raises UserError."""
    arrow()
    if join and retry:
        raise UserError("who joins a run draws what is left: give --retry without --join, once it is done")
    ledger, threads = Ledger(setup.out), torch.get_num_threads()
    try:
        ledger.enter(join)
        before = ledger.stated()
        if setup.dtype is None and before is not None and before.get("dtype") in PRECISIONS:
            setup = replace(setup, dtype=before["dtype"])
        pipe = pipe or setup.load()
        setup = replace(
            setup, dtype=str(pipe.dtype).removeprefix("torch.")
        )  # of all processes, wherever they run
        for each in (*pipe.notes, *ledger.begin(setup.asked(pipe, before), alone=not join)):
            note(each)
        if not join:
            _reopen(setup, ledger, retry)
            ledger.share()
        progress = Progress(ledger.asked["items"], *counts(ledger), shown=verbose)
        yield Begun(setup, pipe, ledger, progress, join)
    finally:
        torch.set_num_threads(threads)  # which drawing has set, to those of the run
        ledger.close()


def counts(ledger: Ledger) -> tuple[int, int]:
    """How many pictures are drawn, and how many failed, by all processes."""
    drawn = failed = 0
    still_open = ledger.open_blocks()
    done = sorted(set(range(ledger.blocks)) - set(still_open))
    for records in (*map(ledger.tally, done), *map(ledger.tally_begun, still_open)):
        drawn, failed = drawn + records[0], failed + records[1]
    return drawn, failed


def _together(each: Begun, workers: int | None) -> None:
    """Draw here, and in other processes of this machine."""
    fit = each.setup.fitting(each.pipe)[0]
    alone = len(each.ledger.open_blocks()) < 4  # not worth another start
    others = (1 if alone else fit) - 1 if workers is None else workers - 1
    work = Work(each.setup, each.pipe, each.ledger, each.progress.add)
    if others < 1:
        draw_open(work, each.ledger, lambda: each.progress.set(*counts(each.ledger)) if each.join else None)
        return
    with Helpers(each.setup, others) as helpers:

        def between() -> None:
            helpers.mend()
            each.progress.set(*counts(each.ledger))

        draw_open(work, each.ledger, between)


def _reopen(setup: Setup, ledger: Ledger, retry: bool) -> None:
    """Look whether all that is noted is there; what is not is drawn again."""
    store, missing = setup.store(ledger), list[str]()
    still_open = set(ledger.open_blocks())
    for block in range(ledger.blocks):
        if block in still_open:
            found = [*ledger.begun(block).values()]
        else:
            found = ledger.records_of(block)
        gone = {r["item"]: r["file_name"] for r in found if not r["error"] and not store.is_there(r)}
        missing += gone.values()
        if gone or (retry and any(record["error"] for record in found)):
            store.reopen(ledger, block)
            ledger.reopen(block, lambda r, gone=gone: r["item"] not in gone and not (retry and r["error"]))
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        note(
            f"of the pictures that were drawn {len(missing):,} are gone from {setup.out} and drawn again: {few}"
        )


def _end(each: Begun) -> Outcome:
    """Write the manifest, unless another process has."""
    setup, ledger = each.setup, each.ledger
    if left := ledger.open_blocks():
        raise UserError(f"{len(left):,} blocks of rows are not done: the same command goes on")
    setup.store(ledger).settle(ledger)
    ledger.sweep()
    path = setup.out / MANIFEST
    drawn, failed, told = 0, 0, list[str]()
    for record in ledger.records():
        drawn, failed = drawn + (not record["error"]), failed + bool(record["error"])
        if record["error"] and len(told) < _SHOWN:
            told.append(f"{record['where']}: {record['error']}")
    while not path.exists():
        with ledger.claim_shard(ledger.all_of_it()) as mine:
            if mine and not path.exists():
                write_manifest(path, ledger.records(), ledger.asked)
        if not mine:
            time.sleep(_WAIT)
    each.progress.set(drawn, failed)
    for line in told:
        note(line)
    if failed > len(told):
        note(f"... and {failed - len(told):,} more, see the column error of {path}")
    return Outcome(path, drawn, failed, each.progress.end())
