"""Processes of continuous noise: NCSN's ladder and the VE, VP and sub-VP SDEs, as settings, on disk, and drawn with.

Each is what `process.Process` asks for, and what the `process` section of a training config is read into: its schedule,
what its network predicts, and the samplers that draw with it. VP and VE are diffusers' ScoreSdeVpScheduler and
ScoreSdeVeScheduler on disk, with more keys; for sub-VP and NCSN diffusers has no class.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ldm.config.kinds import KIND
from ldm.config.typed import from_dict
from ldm.diffusion import driver, parameterization
from ldm.diffusion.denoiser import Asking, Denoise, Denoiser, Network, answered
from ldm.diffusion.edm import EDM
from ldm.diffusion.langevin import annealed_langevin, step_size
from ldm.diffusion.noise_rates import LinearBeta
from ldm.diffusion.samplers import SAMPLERS, NoiseSource, Steps
from ldm.diffusion.schedule import MOST_TIMESTEPS
from ldm.diffusion.sde import SDE, VP, Embedding, SubVP
from ldm.diffusion.sde_samplers import euler_maruyama, predictor_corrector
from ldm.diffusion.variance_exploding import VE, Ladder
from ldm.errors import UserError, nearest

Solve = Callable[..., Steps]
_LARGEST = 1e18  # a noise level whose square float32 holds


@dataclass(frozen=True)
class ScoreDrawing:
    """The way pictures are drawn: a sampler over noise levels, from the prior's noise. A `process.Drawing`."""

    schedule: SDE | Ladder | EDM
    prediction_type: str
    sigmas: tuple[float, ...]
    solve: Solve

    def denoiser(self, network: Network) -> Denoiser:
        """Return the network, with its condition bound, as a denoiser."""
        return Denoiser(network, self.schedule, self.prediction_type)

    def run(self, denoise: Denoise, noise: NoiseSource, callback: driver.Callback | None = None) -> Asking:
        """Draw from the first of `noise()` (B, C, h, w) to a sample of the data, as a coroutine."""
        first = noise() * self.schedule.first_std
        return (yield from driver.run(denoise, self.solve(first, self.sigmas, noise), callback))

    def sample(self, denoise: Denoise, noise: NoiseSource, callback: driver.Callback | None = None) -> Tensor:
        """Do the same at once."""
        return answered(self.run(denoise, noise, callback))


class ScoreProcess:
    """What the settings below have in common: the names in files, and samplers by their names."""

    kind: ClassVar[str]
    class_name: ClassVar[str]
    prediction_type: str

    @property
    def schedule(self) -> SDE | Ladder | EDM:
        raise NotImplementedError

    def samplers(self, steps: int) -> dict[str, Solve]:
        """The process's own, for a drawing of so many steps; the first is that which nobody names."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise UserError for values that can't be, beside those that the schedule refuses itself."""
        raise NotImplementedError

    def process(self) -> "ScoreProcess":
        """Return the process itself. Raises UserError for values that can't be."""
        self.check()
        parameterization.check(self.prediction_type, self.schedule)
        if not self.schedule.sigma_max < _LARGEST:
            raise UserError(
                f"{self.kind}: its strongest noise is too strong for float32: take a smaller sigma_max or beta_max"
            )
        return self

    def plan(self, steps: int, sampler: str | None = None) -> ScoreDrawing:
        """Plan so many steps. sampler: one of the process's own or of SAMPLERS. Raises UserError for an unknown one."""
        if not 1 <= steps <= MOST_TIMESTEPS:
            raise UserError(
                f"num_inference_steps must be at least 1, and at most {MOST_TIMESTEPS:,}, not {steps!s:.40}"
            )
        known = {name: each.solve for name, each in SAMPLERS.items()} | self.samplers(steps)
        name = next(iter(self.samplers(steps))) if sampler is None else sampler
        if name not in known:
            names = ", ".join(sorted(known))
            raise UserError(f"sampler {name!r:.60} is unknown{nearest(name, known)}; known: {names}")
        schedule = self.schedule
        return ScoreDrawing(schedule, self.prediction_type, tuple(schedule.sigmas(steps)), known[name])

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in scheduler_config.json."""
        return {"_class_name": self.class_name, **vars(self)}

    @classmethod
    def read(cls, mapping: Mapping[str, Any], where: str) -> "ScoreProcess":
        """Read what `to_dict` or diffusers wrote; keys that mean nothing here are left. Raises UserError."""
        known = {each.name for each in fields(cls)}  # pyright: ignore[reportArgumentType]
        given = {key: each for key, each in mapping.items() if key in known}
        return from_dict(cls, {KIND: cls.kind, **given}, where).process()


def _check_sde(kind: str, least: float, eps: float, snr: float, correct_steps: int) -> None:
    if not least <= eps < 1:
        raise UserError(
            f"{kind}: sampling_eps is {eps}: it is the least t, which is {least:g} or more and below 1"
        )
    if not 0 < snr < math.inf or correct_steps < 0:
        raise UserError(f"{kind}: snr is above 0, and correct_steps 0 or more, not {snr} and {correct_steps}")


def _sde_samplers(sde: SDE, snr: float, correct_steps: int, first: str) -> dict[str, Solve]:
    found: dict[str, Solve] = {
        "predictor_corrector": partial(predictor_corrector, sde=sde, corrector_steps=correct_steps, snr=snr),
        "euler_maruyama": partial(euler_maruyama, sde=sde),
        "reverse_diffusion": partial(predictor_corrector, sde=sde, corrector_steps=0),
    }
    return {first: found[first], **found}


@dataclass(frozen=True)
class VPConfig(ScoreProcess):
    """The variance-preserving SDE (Song et al. 2021, eq. 11).

    beta_min, beta_max: of beta(t). sampling_eps: the least t. snr, correct_steps: of the sampler predictor_corrector.
    """

    kind: ClassVar[str] = "vp"
    class_name: ClassVar[str] = "ScoreSdeVpScheduler"

    beta_min: float = 0.1
    beta_max: float = 20.0
    sampling_eps: float = 1e-3
    prediction_type: str = "epsilon"
    snr: float = 0.16
    correct_steps: int = 1

    def check(self) -> None:
        # At t = 0 there is no noise, and the score has no end.
        _check_sde(self.kind, 1e-8, self.sampling_eps, self.snr, self.correct_steps)

    @property
    def schedule(self) -> SDE:
        return VP(LinearBeta(self.beta_min, self.beta_max), self.sampling_eps)

    def samplers(self, steps: int) -> dict[str, Solve]:
        return _sde_samplers(self.schedule, self.snr, self.correct_steps, "euler_maruyama")


@dataclass(frozen=True)
class SubVPConfig(ScoreProcess):
    """The sub-VP SDE (eq. 12). The settings are VP's."""

    kind: ClassVar[str] = "subvp"
    class_name: ClassVar[str] = "ScoreSdeSubVpScheduler"

    beta_min: float = 0.1
    beta_max: float = 20.0
    sampling_eps: float = 1e-3
    prediction_type: str = "epsilon"
    snr: float = 0.16
    correct_steps: int = 1

    def check(self) -> None:
        # At t = 0 there is no noise, and the score has no end.
        _check_sde(self.kind, 1e-8, self.sampling_eps, self.snr, self.correct_steps)

    @property
    def schedule(self) -> SDE:
        return SubVP(LinearBeta(self.beta_min, self.beta_max), self.sampling_eps)

    def samplers(self, steps: int) -> dict[str, Solve]:
        return _sde_samplers(self.schedule, self.snr, self.correct_steps, "euler_maruyama")


@dataclass(frozen=True)
class VEConfig(ScoreProcess):
    """The variance-exploding SDE (eq. 9).

    sigma_min, sigma_max: of the noise. embedding: of the network, whose time_embedding_type it is; "fourier" is told
    sigma. prediction_type: ve_score for a U-Net of fourier features, which divides by sigma; else ve_epsilon.
    sampling_eps: the least t. snr, correct_steps: of the sampler predictor_corrector.
    """

    kind: ClassVar[str] = "ve"
    class_name: ClassVar[str] = "ScoreSdeVeScheduler"

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    embedding: Embedding = "fourier"
    prediction_type: str = "ve_score"
    sampling_eps: float = 1e-5
    snr: float = 0.15
    correct_steps: int = 1

    def check(self) -> None:
        _check_sde(self.kind, 0.0, self.sampling_eps, self.snr, self.correct_steps)

    @property
    def schedule(self) -> SDE:
        return VE(self.sigma_min, self.sigma_max, self.embedding, self.sampling_eps)

    def samplers(self, steps: int) -> dict[str, Solve]:
        return _sde_samplers(self.schedule, self.snr, self.correct_steps, "predictor_corrector")


@dataclass(frozen=True)
class NCSNConfig(ScoreProcess):
    """A ladder of noise levels (Song & Ermon 2019), drawn with by annealed Langevin dynamics.

    sigma_min, sigma_max, levels: of the ladder. steps_per_level: of the walk. step: its size, see `langevin`; None
    computes it (2020, technique 4). embedding, prediction_type: as of VEConfig.
    """

    kind: ClassVar[str] = "ncsn"
    class_name: ClassVar[str] = "AnnealedLangevinScheduler"

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    levels: int = 232
    steps_per_level: int = 5
    step: float | None = None
    embedding: Embedding = "fourier"
    prediction_type: str = "ve_score"

    def check(self) -> None:
        if self.steps_per_level < 1 or (self.step is not None and not 0 < self.step < 1):
            raise UserError(
                f"{self.kind}: steps_per_level is at least 1, and step between 0 and 1, or left out"
            )

    @property
    def schedule(self) -> Ladder:
        return Ladder(self.sigma_min, self.sigma_max, self.levels, self.embedding)

    def samplers(self, steps: int) -> dict[str, Solve]:
        ladder = self.schedule.sigmas(steps)
        ratio = ladder[0] / ladder[1] if len(ladder) > 2 else self.schedule.ratio
        step = step_size(ratio, self.steps_per_level) if self.step is None else self.step
        return {
            "annealed_langevin": partial(annealed_langevin, step=step, steps_per_level=self.steps_per_level)
        }


SCORE_PROCESSES: tuple[type[ScoreProcess], ...] = (VPConfig, SubVPConfig, VEConfig, NCSNConfig)
