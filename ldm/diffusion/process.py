"""Diffusion processes: the noise levels that a network was trained at, what it predicts, and how it is drawn with.

A process is written as diffusers' scheduler_config.json and read from it. That in discrete steps (DDPM, Ho et al. 2020)
is here; those of continuous noise are in `score_processes` and `edm_processes`. A process of another kind is a class
with the same members and a line in READERS, and settings with its `kind` that training takes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from ldm.diffusion import driver
from ldm.diffusion.denoiser import Asking, Denoise, Denoiser, Network
from ldm.diffusion.edm_processes import EDM_PROCESSES
from ldm.diffusion.parameterization import check
from ldm.diffusion.plan import plan
from ldm.diffusion.samplers import NoiseSource
from ldm.diffusion.schedule import NoiseSchedule, Schedule
from ldm.diffusion.scheduler_config import CLASSES, COMPATIBLE, FILE_NAME, SchedulerConfig
from ldm.diffusion.score_processes import SCORE_PROCESSES
from ldm.errors import UserError


class Drawing(Protocol):
    """The way pictures are drawn: a `Plan` is one."""

    def denoiser(self, network: Network) -> Denoiser:
        """Return the network, with its condition bound, as a denoiser."""
        ...

    def run(self, denoise: Denoise, noise: NoiseSource, callback: driver.Callback | None = None) -> Asking:
        """Draw from the first of `noise()` (B, C, h, w) to a sample of the data, as a coroutine."""
        ...

    def sample(self, denoise: Denoise, noise: NoiseSource, callback: driver.Callback | None = None) -> Tensor:
        """Do the same at once."""
        ...


class Process(Protocol):
    """A diffusion process with a network's prediction type (see `parameterization`)."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def prediction_type(self) -> str: ...

    def plan(self, steps: int, sampler: str | None = None) -> Drawing:
        """Plan so many steps. sampler: a name; None is the process's own. Raises UserError for an unknown one."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in scheduler_config.json."""
        ...


@dataclass(frozen=True)
class Discrete:
    """A process in T steps, drawn with by all samplers of `samplers.SAMPLERS`."""

    scheduler: SchedulerConfig

    @property
    def schedule(self) -> NoiseSchedule:
        return self._schedule

    @cached_property
    def _schedule(self) -> NoiseSchedule:
        return self.scheduler.noise_schedule()

    @property
    def prediction_type(self) -> str:
        return self.scheduler.get("prediction_type")

    def plan(self, steps: int, sampler: str | None = None) -> Drawing:
        return plan(self.scheduler, steps, sampler)

    def to_dict(self) -> dict[str, Any]:
        return self.scheduler.to_dict()


@dataclass(frozen=True)
class DDPMConfig:
    """The settings of a process in steps (Ho et al. 2020), named as in diffusers' scheduler_config.json.

    variance_type: fixed_small or fixed_large; of a network that learns its variance (Nichol & Dhariwal 2021)
    learned_range. clip_sample: limit the estimates of x0 to [-1, 1], where pixels lie.
    """

    kind: ClassVar[str] = "ddpm"

    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    clip_sample: bool = False

    def process(self) -> Discrete:
        """Return the process. Raises UserError for values that can't be."""
        found = Discrete(SchedulerConfig.from_dict({"_class_name": "DDPMScheduler", **vars(self)}))
        found.scheduler.check()
        check(found.prediction_type, found.schedule)
        return found


READERS: dict[str, Callable[[Mapping[str, Any], str], Process]] = {
    **dict.fromkeys(
        (*CLASSES, *COMPATIBLE), lambda mapping, where: Discrete(SchedulerConfig.from_dict(mapping, where))
    ),
    **{each.class_name: each.read for each in SCORE_PROCESSES},
    **{name: each.read for name, each in EDM_PROCESSES.items()},
}


def read_process(mapping: Mapping[str, Any], where: str = FILE_NAME) -> Process:
    """Read a scheduler_config.json. Raises UserError, which names `where`."""
    name = mapping.get("_class_name")
    reader = READERS.get(name) if isinstance(name, str) else None
    if reader is None:
        raise UserError(
            f"{where}: _class_name {name!r:.60} is no process that is known: {', '.join(READERS)}"
        )
    return reader(mapping, where)
