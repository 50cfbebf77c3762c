"""From a config file to a finished run.

A config names an output, the loop's settings, and one objective by the name of its module in
`ldm/training/objectives`. Such a module has two names: `Config`, a dataclass, and `Objective`, made from it. A new
objective is a new file there and nothing else.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, make_dataclass
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
    kind = make_dataclass("Run", [("output", str), ("loop", LoopConfig), (name, _module(name).Config)])
    config: Any = from_dict(kind, override(mapping, overrides, kind), str(path))
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    return Run(Path(config.output), config.loop, name, getattr(config, name), text)


def train(path: str | Path, overrides: Iterable[str] = ()) -> bool:
    """Train what the config file says; True when the run is complete.

    The resolved config goes into the run's folder and into its state. Outside of the loop, which saves its state first,
    SIGTERM and SIGHUP end it as Ctrl-C does, by a KeyboardInterrupt.
    """
    with raised_signals():
        run = read_run(path, overrides)
        with processes().main_process_first():  # it fetches what is missing
            objective = run.objective()
        return Trainer(objective, run.loop, run.output, run.resolved).run()


def _module(name: str) -> Any:
    return importlib.import_module(f"{objectives.__name__}.{name}")
