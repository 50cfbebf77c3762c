"""A plan: everything a pipeline needs to know of sampling, from a scheduler's config and a number of steps.

steps = plan(config, 20, sampler="euler")
denoise = classifier_free(steps.denoiser(network), scale=7.5)
latents = steps.sample(denoise, Noise(seeds, shape, device))
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion import consistency, driver, guidance, parameterization
from ldm.diffusion.denoiser import Asking, Denoise, Denoiser, Network, Rounding, answered
from ldm.diffusion.guidance import Limit
from ldm.diffusion.samplers import SAMPLERS, NoiseSource, Steps
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_config import CLASSES, SchedulerConfig
from ldm.diffusion.spacing import TIMESTEP_SPACINGS, lcm_timesteps, spaced_sigmas
from ldm.errors import UserError

# Stable Diffusion's noise ends at sigma 14.6, which a few dozen steps come down from in reach of each other. With zero
# terminal SNR the first step is from 4096; DDPM's linear betas end at 157, cosine ones at 20,291.
_NEARLY_NOISE = 20.0
_ROUNDED = 1e-3  # of a timestep: more than float32 loses of one below 1000


@dataclass(frozen=True)
class Plan:
    """The way one picture is drawn; nothing in it changes meanwhile, so it may serve any number of runs.

    sigmas: n + 1 noise levels. initial_scale: what unit noise is multiplied by to stand at the first, as diffusers
    has it. unit_variance: the sample is the last state, scaled to unit variance, as of diffusers' classes of DDIM's
    kind; else the state itself, as of those that count in sigma.
    span: the steps of the whole that a run takes, see `samplers`; None is all.
    """

    sampler: str
    sigmas: tuple[float, ...]
    schedule: NoiseSchedule
    prediction_type: str
    initial_scale: float
    unit_variance: bool
    options: Mapping[str, Any]
    rounding: Rounding = "none"
    wrappers: tuple[Callable[[Denoise], Denoise], ...] = ()
    span: range | None = None

    def part(self, begin: int = 0, end: int | None = None) -> "Plan":
        """Plan the same steps, of which a run takes those from number `begin` on, and ends before number `end`.

        A run that begins at sigmas[begin] and ends at sigmas[end]. Raises UserError where there are no such steps.
        """
        steps = len(self.sigmas) - 1
        end = steps if end is None else end
        if not 0 <= begin <= end <= steps:
            raise UserError(
                f"steps {begin} to {end} are asked for of {steps}: begin at 0 or later, end at {steps}"
            )
        return replace(self, span=range(begin, end))

    def step_at(self, share: float) -> int:
        """Return the number of the first step by which `share` of the training's timesteps is gone.

        share: 0 to 1; a plan may end before this step, and another one, of another model, begin with it, as diffusers'
        denoising_end and denoising_start have it.
        """
        total = self.schedule.num_train_timesteps
        cutoff = round(total - share * total)
        timesteps = self.schedule.timestep(torch.tensor(self.sigmas[:-1], dtype=torch.float64))
        return int((timesteps >= cutoff - _ROUNDED).sum()) if share > 0 else 0

    @property
    def first_sigma(self) -> float:
        """The noise level that a run begins at."""
        return self.sigmas[self.span.start if self.span is not None else 0]

    @property
    def final_scale(self) -> float:
        """What the last state is multiplied by to become the sample."""
        last = self.sigmas[self.span.stop if self.span is not None else -1]
        return 1 / math.sqrt(1 + last**2) if self.unit_variance else 1.0

    @property
    def learned_variance(self) -> bool:
        """Whether the sampler takes the variance that the network learned."""
        return self.options.get("variance") == "learned_range"

    @property
    def predictions(self) -> tuple[float, ...]:
        """The noise levels of the predictions that a run asks for, in order; some are visited twice."""
        zero, levels = torch.zeros(1, 1), list[float]()
        estimate = torch.zeros(1, 2 if self.learned_variance else 1)
        driver.sample(
            lambda x, sigma: estimate, self.steps(zero, lambda: zero), lambda step: levels.append(step.sigma)
        )
        return tuple(levels)

    @property
    def evaluations(self) -> int:
        """How many predictions a run asks for: the number of steps of its progress bar."""
        return len(self.predictions)

    def window(self, start: float = 0.0, end: float = 1.0) -> tuple[float, float]:
        """Return the timesteps, above the first and up to the second, of a run's predictions from `start` to `end`.

        Of N predictions number i lies inside where start <= i / N and (i + 1) / N <= end, as diffusers counts them.
        What depends on the noise level alone can't tell two visits of one level apart: the later one decides for both.
        """
        levels = self.predictions
        inside = {
            sigma: start <= i / len(levels) and (i + 1) / len(levels) <= end for i, sigma in enumerate(levels)
        }
        sigmas = torch.tensor(sorted(inside, reverse=True), dtype=torch.float64)
        timesteps = self.denoiser(lambda x, timestep: x).timestep(sigmas).tolist()
        rows = [timesteps[k] for k, sigma in enumerate(sigmas.tolist()) if inside[sigma]]
        if not rows:
            return math.inf, math.inf
        after = next((each for each in timesteps if each < rows[-1]), -math.inf)
        before = next((each for each in reversed(timesteps) if each > rows[0]), math.inf)
        # A float's rounding above the levels' own, which a batch of another length may compute otherwise.
        return after + min(_ROUNDED, (rows[-1] - after) / 2), rows[0] + min(_ROUNDED, (before - rows[0]) / 2)

    def denoiser(self, network: Network) -> Denoiser:
        """Return the network, with its condition bound, as a denoiser."""
        return Denoiser(network, self.schedule, self.prediction_type, self.rounding, self.learned_variance)

    def wrap(self, denoise: Denoise) -> Denoise:
        """Put the config's own limits on x0 around a (guided) denoiser."""
        for wrapper in self.wrappers:
            denoise = wrapper(denoise)
        return denoise

    def steps(self, x: Tensor, noise: NoiseSource) -> Steps:
        """Return the sampler's coroutine from the state `x` (B, C, h, w) at `first_sigma`."""
        return SAMPLERS[self.sampler].solve(x, self.sigmas, noise, span=self.span, **self.options)

    def run(
        self,
        denoise: Denoise,
        noise: NoiseSource,
        callback: driver.Callback | None = None,
        latents: Tensor | None = None,
        x0: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Asking:
        """Draw, as a coroutine, from `latents` (B, C, h, w) of unit noise, or the first of `noise()`, to the sample.

        denoise: that of `denoiser`, guided or not. The state is float32 whatever the network computes in.
        x0: clean latents (B, C, h, w) that the noise is added to, for a plan that begins on the way (Meng et al. 2022,
        SDEdit); without them such a plan begins from noise alone. state: (B, C, h, w), what a plan that ended at
        `first_sigma` gave, to go on from, in place of all noise. callback: see `driver.run`.
        """
        if state is not None:
            x = state.to(torch.float32) * (math.sqrt(1 + self.first_sigma**2) if self.unit_variance else 1.0)
        else:
            x = (noise() if latents is None else latents).to(torch.float32)
            if x0 is not None:
                x = x0.to(x) + x * self.first_sigma
            else:
                x = x * (self.initial_scale if self.first_sigma == self.sigmas[0] else self.first_sigma)
        last = yield from driver.run(self.wrap(denoise), self.steps(x, noise), callback)
        return last * self.final_scale

    def sample(
        self,
        denoise: Denoise,
        noise: NoiseSource,
        callback: driver.Callback | None = None,
        **begin: Tensor | None,
    ) -> Tensor:
        """Draw at once; begin: latents, x0 and state of `run`."""
        return answered(self.run(denoise, noise, callback, **begin))


def plan(
    config: SchedulerConfig,
    num_inference_steps: int,
    sampler: str | None = None,
    schedule: str | None = None,
    eta: float = 0.0,
    is_xl: bool = False,
    strength: float = 1.0,
) -> Plan:
    """Plan `num_inference_steps` steps as `config` says.

    sampler, schedule: names of samplers.SAMPLERS and spacing.SPACINGS in place of the config's own; the
    betas, the prediction type and, without a schedule, the spacing stay. eta: DDIM's noise, 0 to 1.
    is_xl: the model is an SDXL, for which align_your_steps has timesteps of its own.
    strength: of LCMScheduler's own spacing, see `lcm_timesteps`: with less than 1 all steps begin from a picture.
    Raises UserError for unknown names, unsupported values and impossible numbers of steps.
    """
    config = config.with_sampler(sampler) if sampler is not None else config
    config = config.with_schedule(schedule) if schedule is not None else config
    name = config.sampler
    config.check()
    noise_schedule = config.noise_schedule()
    parameterization.check(config.get("prediction_type"), noise_schedule)
    spacing = _spacing(config)
    sigmas = _descending(
        partial(_sigmas, config, noise_schedule, spacing, is_xl, strength), num_inference_steps
    )
    first = sigmas[0]
    unit_variance = CLASSES[config.class_name].family != "k"
    from_above = not unit_variance and config.get("timestep_spacing") in ("linspace", "trailing")
    limit = _limit(config)
    wrappers: list[Callable[[Denoise], Denoise]] = []
    if limit and name != "ddim":
        wrappers.append(partial(guidance.limited, limit=limit))
    if name == "lcm":
        scaling = config.get("timestep_scaling")
        wrappers.append(
            partial(consistency.latent_boundary, schedule=noise_schedule, timestep_scaling=scaling)
        )
    return Plan(
        sampler=name,
        sigmas=tuple(sigmas),
        schedule=noise_schedule,
        prediction_type=config.get("prediction_type"),
        initial_scale=first if from_above else math.sqrt(1 + first**2),
        unit_variance=unit_variance,
        options=_options(config, noise_schedule, spacing, sigmas, limit, eta),
        rounding=_rounding(config, spacing),
        wrappers=tuple(wrappers),
    )


def _spacing(config: SchedulerConfig) -> str:
    if config.spacing:
        return config.spacing
    if config.get("use_karras_sigmas"):
        return "karras"
    if config.get("use_exponential_sigmas"):
        return "exponential"
    return config.get("timestep_spacing") or "linspace"


def _descending(sigmas_of: Callable[[int], list[float]], n: int) -> list[float]:
    """The noise levels of n steps; UserError, with the most that are possible, where two steps share one.

    Whole timesteps run out near T steps, and solvers divide by the distance of two levels. The last step alone may
    be empty: at the smallest level already where some are to remain (`set_alpha_to_one` false).
    """

    def falls(count: int) -> bool:
        return all(high > low for high, low in pairwise(sigmas_of(count)[:-1]))

    if not falls(n):
        most = next(count for count in range(n - 1, 0, -1) if falls(count))
        raise UserError(
            f"num_inference_steps {n} would visit a noise level twice: this sampler and schedule take at most {most}"
        )
    return sigmas_of(n)


def _sigmas(
    config: SchedulerConfig, schedule: NoiseSchedule, spacing: str, is_xl: bool, strength: float, n: int
) -> list[float]:
    """The noise levels that the config's class in diffusers visits."""
    family = CLASSES[config.class_name].family
    remains = config.get("final_sigmas_type") == "sigma_min"
    if config.sampler in ("ddim", "pndm"):
        remains = config.get("set_alpha_to_one") is False
    spaced = partial(
        spaced_sigmas,
        schedule,
        n=n,
        final=schedule.sigma_min if remains else 0.0,
        steps_offset=config.get("steps_offset") or 0,
        whole=family != "k",
        extra_point=family == "dpm",
        is_xl=is_xl,
    )
    if config.sampler == "lcm" and config.spacing is None:
        original = config.get("original_inference_steps")
        timesteps = lcm_timesteps(n, schedule.num_train_timesteps, original, strength)
        return [*schedule.sigma(timesteps).tolist(), 0.0]
    if spacing in TIMESTEP_SPACINGS:
        return spaced(spacing).tolist()
    high, low = schedule.sigma_max, schedule.sigma_min
    if family == "k":
        *levels, _ = spaced(config.get("timestep_spacing")).tolist()
        high, low = levels[0], levels[-1]
    stated = config.values.get if config.spacing else config.get  # a named one: whichever class the key is of
    ends = stated("sigma_max") or high, stated("sigma_min") or low
    return spaced(spacing, ends=ends).tolist()


def _rounding(config: SchedulerConfig, spacing: str) -> Rounding:
    """What diffusers' classes of integer timesteps make of noise levels between two of them."""
    if CLASSES[config.class_name].family != "dpm" or spacing not in ("karras", "exponential"):
        return "none"
    cosine = config.sampler.startswith("dpmpp_2m") and config.get("beta_schedule") == "squaredcos_cap_v2"
    return "floor" if spacing == "exponential" or cosine else "round"


def _limit(config: SchedulerConfig) -> Limit | None:
    """What the config does to an estimate of x0."""
    if config.get("thresholding"):
        quantile, limit = config.get("dynamic_thresholding_ratio"), config.get("sample_max_value")
        return partial(guidance.threshold_x0, quantile=quantile, limit=limit)
    if config.get("clip_sample"):
        limit = config.get("clip_sample_range")
        return lambda x0: x0.clamp(-limit, limit)
    return None


def _options(
    config: SchedulerConfig,
    schedule: NoiseSchedule,
    spacing: str,
    sigmas: list[float],
    limit: Limit | None,
    eta: float,
) -> dict[str, Any]:
    """The options of the config's sampler."""
    name, lower_order_final = config.sampler, bool(config.get("lower_order_final"))
    if name == "ddim":
        return {"eta": eta, "clip": limit, "stops": _ddim_stops(schedule, spacing, sigmas)}
    if name == "heun":
        return {"long_steps": schedule.sigma_max > _NEARLY_NOISE}
    if name == "ddpm":
        return {"variance": (config.get("variance_type") or "fixed_small").removesuffix("_log")}
    if name in ("dpmpp_2m", "dpmpp_2m_sde"):
        return {"lower_order_final": lower_order_final, "euler_at_final": bool(config.get("euler_at_final"))}
    if name in ("dpmpp_2s", "unipc"):
        return {"lower_order_final": lower_order_final}
    if name == "pndm":
        midpoints = () if config.get("skip_prk_steps") else _prk_midpoints(schedule, sigmas)
        uneven = _uneven_steps(schedule, sigmas)
        return {"prediction_type": config.get("prediction_type"), "midpoints": midpoints, "uneven": uneven}
    return {}


def _ddim_stops(schedule: NoiseSchedule, spacing: str, sigmas: list[float]) -> list[float] | None:
    """Where diffusers' DDIM ends its steps: T // n timesteps back, though the next may lie elsewhere."""
    if spacing not in TIMESTEP_SPACINGS or spacing == "sgm_uniform":
        return None
    here = schedule.timestep(torch.tensor(sigmas[:-1], dtype=torch.float64))
    back = here - schedule.num_train_timesteps // len(here)
    return torch.where(back >= 0, schedule.sigma(back), sigmas[-1]).tolist()


def _prk_midpoints(schedule: NoiseSchedule, sigmas: list[float]) -> list[float]:
    """The noise levels halfway, in timesteps, through the first three steps that have a next one."""
    timesteps = schedule.timestep(torch.tensor(sigmas[:-1][:4], dtype=torch.float64)).tolist()
    middles = [end + (start - end) // 2 for start, end in pairwise(timesteps)]
    return schedule.sigma(torch.tensor(middles, dtype=torch.float64)).tolist()


def _uneven_steps(schedule: NoiseSchedule, sigmas: list[float]) -> frozenset[int]:
    """The steps, but for the last, that are more than twice as long in timesteps as the one before, or half as long."""
    timesteps = schedule.timestep(torch.tensor(sigmas[:-1], dtype=torch.float64)).tolist()
    lengths = [start - end for start, end in pairwise(timesteps)]
    return frozenset(i for i, (a, b) in enumerate(pairwise(lengths), 1) if not a / 2 <= b <= 2 * a)
