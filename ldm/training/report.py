"""What a run says while it goes on: a progress bar, lines, `log.jsonl`, trackers."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


class Report:
    """Speaks in the main process alone. Figures between two lines are averaged."""

    def __init__(self, accelerator: "Accelerator", folder: Path, pictures: int):
        self.accelerator, self.folder, self.pictures = accelerator, folder, pictures
        self._sums: dict[str, float] = {}
        self._steps, self._since, self._logged = 0, time.monotonic(), 0
        self._bar: Any = None

    def start(self, seen: int, config: dict[str, Any]) -> None:
        """Begin the bar and the trackers; `config` is what the trackers show of the run."""
        from tqdm.auto import tqdm

        self._since, self._logged = time.monotonic(), seen
        shown = None if self.accelerator.is_main_process else True
        self._bar = tqdm(total=self.pictures, initial=seen, unit="pic", disable=shown, dynamic_ncols=True)
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
        """One line on the console and in `log.jsonl`, and the trackers' figures."""
        if not figures:
            return
        self.say(f"{seen:>9,}  " + "  ".join(f"{k} {v:.5g}" for k, v in figures.items()))
        self.accelerator.log(figures, step=seen)
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"seen": seen, **figures}) + "\n")

    def pictures_of(self, seen: int, before: set[Path]) -> None:
        """Show the trackers the pictures that a validation added to the folder."""
        from PIL import Image

        added = sorted(set(self.folder.glob("*.png")) - before)
        for tracker in self.accelerator.trackers if added else []:
            if hasattr(tracker, "log_images"):
                import numpy as np

                shown = {path.stem.rpartition("-")[0]: np.asarray(Image.open(path))[None] for path in added}
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(shown, step=seen, **layout)

    def say(self, text: str) -> None:
        """A line on the console, above the bar."""
        if self.accelerator.is_main_process:
            from tqdm.auto import tqdm

            tqdm.write(text)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.accelerator.log_with:
            self.accelerator.end_training()
