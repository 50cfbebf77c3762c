"""EDM (Karras et al. 2022) and consistency models (Song et al. 2023), as settings, on disk, and drawn with.

On disk they are diffusers' EDMEulerScheduler and CMStochasticIterativeScheduler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from ldm.diffusion.edm import EDM, karras_levels
from ldm.diffusion.parameterization import SIGMA_DATA, SIGMA_MIN
from ldm.diffusion.samplers import euler, heun, lcm
from ldm.diffusion.score_processes import ScoreDrawing, ScoreProcess, Solve
from ldm.errors import UserError, nearest

# Of timesteps that diffusers' classes do not tell.
_OWN_EDM, _OWN_CONSISTENCY = "EDMScheduler", "ConsistencyScheduler"
_DIFFUSERS_SCALE = 1000.0


def _check_sigma_data(sigma_data: float) -> None:
    if sigma_data != SIGMA_DATA:
        raise UserError(
            f"sigma_data is {sigma_data}, and {SIGMA_DATA} alone is known, which the papers have: scale the data"
        )


@dataclass(frozen=True)
class EDMConfig(ScoreProcess):
    """Karras et al. 2022, table 1, column "Ours".

    sigma_min, sigma_max, rho: of the levels that are drawn with. p_mean, p_std: of ln(sigma) in training.
    timestep_scale: a network is told so many times ln(sigma) / 4. The paper and diffusers have 1; a teacher of
        consistency models has 1000, for diffusers tells its students so (OpenAI's teachers are told so too), and there
        diffusers has no class for the teacher.
    """

    kind: ClassVar[str] = "edm"
    class_name: ClassVar[str] = "EDMEulerScheduler"

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = SIGMA_DATA
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2
    timestep_scale: float = 1.0
    sigma_schedule: Literal["karras"] = "karras"
    final_sigmas_type: Literal["zero"] = "zero"

    def check(self) -> None:
        _check_sigma_data(self.sigma_data)

    @property
    def prediction_type(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "edm"

    @property
    def schedule(self) -> EDM:
        # diffusers takes the data to have unit variance where drawing begins
        return EDM(
            self.sigma_min,
            self.sigma_max,
            self.rho,
            self.timestep_scale,
            self.p_mean,
            self.p_std,
            data_std=1.0,
        )

    def samplers(self, steps: int) -> dict[str, Solve]:
        return {"euler": euler, "heun": heun}

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in scheduler_config.json; the prediction is "epsilon" in diffusers' words."""
        name = self.class_name if self.timestep_scale == 1 else _OWN_EDM
        return {**super().to_dict(), "_class_name": name, "prediction_type": "epsilon"}

    @classmethod
    def read(cls, mapping: Mapping[str, Any], where: str) -> ScoreProcess:
        """Read what `to_dict` or diffusers wrote. Raises UserError."""
        if (given := mapping.get("prediction_type", "epsilon")) != "epsilon":
            raise UserError(f"{where}: prediction_type {given!r:.60} of EDM is not known: known is epsilon")
        return super().read(mapping, where)


@dataclass(frozen=True)
class ConsistencyConfig(ScoreProcess):
    """A consistency model, which maps every noise level to sigma_min in one step (Song et al. 2023).

    num_train_timesteps: N, the levels it learned last; what drawing in several steps chooses from. s_noise: scale of
    the noise that is put back between steps. clip_denoised: limit the estimates to [-1, 1], where pixels lie.
    timestep_scale: a network is told so many times ln(sigma) / 4; diffusers has 1000 and no class for another.
    """

    kind: ClassVar[str] = "consistency"
    class_name: ClassVar[str] = "CMStochasticIterativeScheduler"

    num_train_timesteps: int = 40
    sigma_min: float = SIGMA_MIN
    sigma_max: float = 80.0
    sigma_data: float = SIGMA_DATA
    s_noise: float = 1.0
    rho: float = 7.0
    clip_denoised: bool = True
    timestep_scale: float = _DIFFUSERS_SCALE

    def check(self) -> None:
        _check_sigma_data(self.sigma_data)
        if self.sigma_min != SIGMA_MIN:
            raise UserError(
                f"sigma_min is {self.sigma_min}, and a consistency model's boundary lies at {SIGMA_MIN}: take that"
            )
        if self.num_train_timesteps < 2:
            raise UserError(f"num_train_timesteps must be at least 2, not {self.num_train_timesteps}")

    @property
    def prediction_type(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "consistency"

    @property
    def schedule(self) -> EDM:
        return EDM(self.sigma_min, self.sigma_max, self.rho, self.timestep_scale)

    def samplers(self, steps: int) -> dict[str, Solve]:
        clip = (lambda x0: x0.clamp(-1, 1)) if self.clip_denoised else None
        return {"lcm": partial(lcm, floor=self.sigma_min, s_noise=self.s_noise, clip=clip)}

    def plan(self, steps: int, sampler: str | None = None) -> ScoreDrawing:
        """Plan so many steps (algorithm 1), of diffusers' own levels. Raises UserError for more than there are.

        sampler: lcm, which is multistep consistency sampling; what the others solve with is no consistency function.
        """
        known, name = self.samplers(steps), sampler or "lcm"
        if name not in known:
            raise UserError(
                f"sampler {name!r:.60} is none of a consistency model{nearest(name, known)}; known: {', '.join(known)}"
            )
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise UserError(
                f"num_inference_steps must be between 1 and {total}, the model's noise levels, not {steps}"
            )
        share = torch.arange(steps, dtype=torch.float64) * (total // steps) / (total - 1)
        levels = karras_levels(self.sigma_min, self.sigma_max, share, self.rho).tolist()
        return ScoreDrawing(self.schedule, self.prediction_type, (*levels, self.sigma_min), known[name])

    @property
    def diffusers_draws(self) -> bool:
        """Whether diffusers has a class for it."""
        return self.timestep_scale == _DIFFUSERS_SCALE

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in scheduler_config.json."""
        name = self.class_name if self.diffusers_draws else _OWN_CONSISTENCY
        return {**super().to_dict(), "_class_name": name}


EDM_PROCESSES: dict[str, type[ScoreProcess]] = {
    EDMConfig.class_name: EDMConfig,
    _OWN_EDM: EDMConfig,
    ConsistencyConfig.class_name: ConsistencyConfig,
    _OWN_CONSISTENCY: ConsistencyConfig,
}
