"""From a config file to a finished run.

A config names an output, the loop's settings, and one objective by the name of its module in
`ldm/training/objectives`. Such a module has two names: `Config`, a dataclass, and `Objective`, made from it. A new
objective is a new file there and nothing else. A `Config` may have `rounds(output)`, which gives the folder and the
`Config` of each of several trainings that follow each other (see `rounds`).
"""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.config import from_dict, load_mapping, override, to_dict
from ldm.errors import UserError, nearest
from ldm.training import objectives
from ldm.training.distributed import processes
from ldm.training.loop import Trainer
from ldm.training.loop_config import LoopConfig
from ldm.training.objective import Objective
from ldm.training.rounds import Round, walk
from ldm.training.stop import raised_signals


@dataclass(frozen=True)
class Run:
    """A config file, read and checked: where the run writes, how long it trains, what, and all of it as text."""

    output: Path
    loop: LoopConfig
    name: str
    settings: Any
    resolved: str

    def objective(self) -> Objective:
        """Build the objective, with the weights that training starts from. Raises UserError."""
        torch.manual_seed(self.loop.seed)
        return _module(self.name).Objective(self.settings)

    def rounds(self) -> "list[Run]":
        """Return the runs that this one is made of, in their order: mostly this one alone. Raises UserError."""
        offered = getattr(self.settings, "rounds", None)
        found = offered(self.output) if offered else []
        if len(found) < 2:
            return [self]
        return [
            Run(folder, self.loop, self.name, settings, _resolved(folder, self.loop, self.name, settings))
            for folder, settings in found
        ]

    def as_round(self) -> Round:
        """Return what the walk through rounds has to know of it."""
        return Round(self.output, self.loop.pictures, self._train)

    def _train(self, max_seconds: float | None) -> bool:
        with processes().main_process_first():  # it fetches what is missing
            objective = self.objective()
        loop = replace(self.loop, max_seconds=max_seconds)
        return Trainer(objective, loop, self.output, self.resolved).run()


def objective_names() -> list[str]:
    """Return the objectives that a config can name."""
    return sorted(each.name for each in pkgutil.iter_modules(objectives.__path__))


def read_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Read a config file, with overrides ("loop.pictures=1000"). Raises UserError."""
    mapping = load_mapping(path)
    known = objective_names()
    sections = [key for key in mapping if key in known]
    unknown = [key for key in mapping if key not in ("output", "loop", *known)]
    if unknown and not sections:
        raise UserError(f"{path}: unknown key {unknown[0]!r}{nearest(str(unknown[0]), known)}")
    if len(sections) != 1:
        raise UserError(
            f"{path}: a run has exactly one objective ({', '.join(known)}); this has {sections or 'none'}"
        )
    name = sections[0]
    kind = _kind(name)
    config: Any = from_dict(kind, override(mapping, overrides, kind), str(path))
    output, settings = Path(config.output), getattr(config, name)
    return Run(output, config.loop, name, settings, _resolved(output, config.loop, name, settings))


def train(path: str | Path, overrides: Iterable[str] = ()) -> bool:
    """Train what the config file says, all its rounds; True when the run is complete.

    The resolved config goes into the run's folder and into its state. Outside of the loop, which saves its state first,
    SIGTERM and SIGHUP end it as Ctrl-C does, by a KeyboardInterrupt.
    """
    with raised_signals():
        run = read_run(path, overrides)
        rounds = [each.as_round() for each in run.rounds()]
        if len(rounds) == 1:
            return rounds[0].train(run.loop.max_seconds)
        return walk(run.output, rounds, run.loop.max_seconds, run.resolved)


def _kind(name: str) -> type:
    """The dataclass of a whole config file with this objective."""
    return make_dataclass("Run", [("output", str), ("loop", LoopConfig), (name, _module(name).Config)])


def _resolved(output: Path, loop: LoopConfig, name: str, settings: Any) -> str:
    """A whole config as the text of a file."""
    return yaml.safe_dump(to_dict(_kind(name)(str(output), loop, settings)), sort_keys=False)


def _module(name: str) -> Any:
    return importlib.import_module(f"{objectives.__name__}.{name}")
