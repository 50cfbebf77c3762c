"""What a run says while it goes on: a progress bar, lines, `log.jsonl`, trackers."""

import json
import math
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.files import read_text
from ldm.errors import printable
from ldm.files import write_text, writing
from ldm.pictures import open_raster

if TYPE_CHECKING:
    from accelerate import Accelerator


class Report:
    """Speaks in the main process alone. Figures between two lines are averaged."""

    def __init__(self, accelerator: "Accelerator", folder: Path, total: int):
        self.accelerator, self.folder, self.total = accelerator, folder, total
        self._log = folder / "log.jsonl"
        self._sums: dict[str, float] = {}
        self._steps, self._since, self._logged = 0, time.monotonic(), 0
        self._told: set[str] = set()
        self._bar: Any = None

    def start(self, seen: int, config: dict[str, Any]) -> None:
        """Begin the bar and the trackers, at `seen` pictures; `config` is what the trackers show of the run.

        Later lines of the log go: a run that was killed had trained on after the state it now goes on from.
        """
        from tqdm.auto import tqdm

        if self.accelerator.is_main_process and self._log.exists():
            lines = read_text(self._log).splitlines(keepends=True)
            if len(kept := [line for line in lines if _seen(line) <= seen]) < len(lines):
                write_text(self._log, "".join(kept))

        self._since, self._logged = time.monotonic(), seen
        shown = None if self.accelerator.is_main_process else True
        self._bar = tqdm(total=self.total, initial=seen, unit="pic", disable=shown, dynamic_ncols=True)
        if self.accelerator.log_with:
            self.accelerator.init_trackers(self.folder.name, config)

    def step(self, figures: dict[str, float], seen: int) -> None:
        """Count one step's figures."""
        self._sums = {name: self._sums.get(name, 0.0) + each for name, each in figures.items()}
        self._steps += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {figures['loss']:.4g}", refresh=False)
            self._bar.update(seen - self._bar.n)

    def line(self, seen: int, **more: float) -> dict[str, float]:
        """Log the averages since the last line and the pictures a second; they are returned too."""
        figures = {name: each / self._steps for name, each in self._sums.items()} | more
        passed = max(time.monotonic() - self._since, 1e-9)
        self.log(seen, {**figures, "pictures_per_second": (seen - self._logged) / passed})
        self._sums, self._steps, self._since, self._logged = {}, 0, time.monotonic(), seen
        return figures

    def log(self, seen: int, figures: dict[str, float]) -> None:
        """Write one line on the console and in `log.jsonl`, and the trackers' figures."""
        if not figures:
            return
        self.say(f"{seen:>9,}  " + "  ".join(f"{k} {v:.5g}" for k, v in figures.items()))
        self.accelerator.log(figures, step=seen)
        if self.accelerator.is_main_process:
            with writing(self._log), self._log.open("a") as file:
                file.write(json.dumps({"seen": seen, **figures}) + "\n")

    def pictures_of(self, seen: int, before: set[Path]) -> None:
        """Show the trackers the pictures that a validation added to the folder."""
        added = sorted(set(self.folder.glob("*.png")) - before)
        for tracker in self.accelerator.trackers if added else []:
            if hasattr(tracker, "log_images"):
                import numpy as np

                opened = [np.asarray(open_raster(path.read_bytes(), ["PNG"])) for path in added]
                names = [path.stem.rpartition("-")[0] for path in added]
                shown = {name: picture[None] for name, picture in zip(names, opened, strict=True)}
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(shown, step=seen, **layout)

    def say(self, text: str) -> None:
        """Print a line on the console, above the bar."""
        if self.accelerator.is_main_process:
            from tqdm.auto import tqdm

            tqdm.write(printable(text, sys.stdout.encoding))

    def tell(self, notes: Collection[str]) -> None:
        """Print lines on the console, each once in a run."""
        for note in dict.fromkeys(notes):
            if note not in self._told:
                self.say(note)
        self._told.update(notes)

    def end(self) -> None:
        """Close the bar and the trackers."""
        if self._bar is not None:
            self._bar.close()
        # Not accelerate's end_training: it also parts the processes, before all of them are done.
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except OSError as error:  # it must not hide what ended the run
                self.say(f"{tracker.name} could not write its last: {error.strerror or error}")


def _seen(line: str) -> float:
    """The pictures of a line of the log; infinite where a kill cut it short, or it is no such line."""
    try:
        return float(json.loads(line)["seen"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return math.inf
