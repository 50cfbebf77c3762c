"""A run of several rounds: trainings that follow each other, each of which begins from what the one before exported.

    OUTPUT/round-NAME   a round: a run of its own, with its states, its log, its learning rate's schedule, its export
    OUTPUT/export       what the last round exported

A round that is finished is passed over without being built, so a run that was ended at any moment goes on where it was.
"""

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError, printable
from ldm.files import replaced_folder, write_text, writing
from ldm.training import state
from ldm.training.distributed import processes
from ldm.training.folders import held, make_folder

EXPORT = "export"


@dataclass(frozen=True)
class Round:
    """A round's folder, the pictures that it trains on, and `train`, of the seconds left, which is true at its end."""

    folder: Path
    pictures: int
    train: Callable[[float | None], bool]

    @property
    def seen(self) -> int | None:
        """How many pictures its newest state has seen; None where there is no state."""
        newest = state.newest(self.folder)
        return None if newest is None else state.seen_by(newest)

    @property
    def begun(self) -> bool:
        """Whether it has to train further from a state."""
        return self.seen is not None and self.seen < self.pictures

    @property
    def finished(self) -> bool:
        """Whether it is trained and exported."""
        return self.seen is not None and not self.begun and (self.folder / EXPORT).exists()


def walk(output: Path, rounds: Sequence[Round], max_seconds: float | None, resolved: str) -> bool:
    """Train the rounds that are not finished; False where `max_seconds`, of all together, or a signal ended it before.

    resolved: the whole configuration as text. Raises UserError where a round can't go on.
    """
    started = time.monotonic()
    make_folder(output)
    with _alone(output):
        _refuse_outdated(rounds)
        main = processes().is_main_process
        if main:
            write_text(output / "config.yaml", resolved)
        worked = False
        for number, each in enumerate(rounds, 1):
            if each.finished:
                continue
            left = None if max_seconds is None else max(0.0, max_seconds - (time.monotonic() - started))
            # The first goes on by a step at least, however long it takes to build.
            if worked and any(_all_say(left == 0)):
                _say(f"stopped by max_seconds before {each.folder.name}: run the same command to go on")
                return False
            _say(f"round {number} of {len(rounds)}: {printable(str(each.folder))}")
            if main and each.begun and (stale := each.folder / EXPORT).exists():
                with writing(stale):  # or it would pass for that of the state to come
                    shutil.rmtree(stale)
            if not each.train(left):
                return False
            worked = True
            gc.collect()  # its networks, before the next ones are loaded
        if main:
            with replaced_folder(output / EXPORT) as new:
                shutil.copytree(rounds[-1].folder / EXPORT, new, dirs_exist_ok=True)
        processes().wait_for_everyone()
        return True


def _refuse_outdated(rounds: Sequence[Round]) -> None:
    """Raise UserError where a round has to train further that later ones have already begun from."""
    for number, each in enumerate(rounds):
        later = [after.folder for after in rounds[number + 1 :] if after.seen is not None]
        if later and (each.seen is None or each.begun):
            had = "no state" if each.seen is None else f"{each.seen:,} of {each.pictures:,} pictures"
            raise UserError(
                f"{each.folder} has {had}, and the rounds after it began from what it was: delete "
                f"{', '.join(map(str, later))} to train them anew, or set loop.pictures back"
            )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the output of all rounds: the main process does, for all of its launch. Raises UserError in all."""
    with ExitStack() as stack:
        fault = ""
        if processes().is_main_process:
            try:
                stack.enter_context(held(output))
            except UserError as error:
                fault = str(error)
        if faults := [each for each in _all_say(fault) if each]:
            raise UserError(str(faults[0]))
        yield


def _all_say(value: str | bool) -> list[str | bool]:
    """What each process says, the same list in all of them: they have clocks and locks of their own."""
    from accelerate.utils import gather_object

    processes()  # it makes them known to each other
    return gather_object([value])


def _say(text: str) -> None:
    if processes().is_main_process:
        print(text, flush=True)
