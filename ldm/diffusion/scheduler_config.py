"""diffusers' scheduler_config.json: read, changed as `Scheduler.from_config` changes it, and written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import MOST_TIMESTEPS, TERMINAL_ALPHA_BAR, NoiseSchedule
from ldm.diffusion.spacing import SPACINGS, TIMESTEP_SPACINGS
from ldm.errors import UserError, nearest

FILE_NAME = "scheduler_config.json"

_MODEL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
# These belong to the model, not to the solver: they hold for every class, where diffusers' newer key for
# zero terminal SNR is dropped by the classes that do not know it, and the picture with it.
MODEL_KEYS = (*_MODEL, "rescale_betas_zero_snr")

_BASE = {**_MODEL, "timestep_spacing": "linspace", "steps_offset": 0}
_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_RANGE = {"sigma_min": None, "sigma_max": None}
_DDIM = {**_BASE, **_CLIP, **_THRESHOLD, **_ZERO_SNR, "timestep_spacing": "leading"}
_KARRAS = {**_BASE, **_SIGMAS}
_SINGLE = {
    **_MODEL,
    **_SIGMAS,
    **_THRESHOLD,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": False,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
    "use_dynamic_shifting": False,
}
_LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class SchedulerClass:
    """A scheduler class of diffusers: all its keys with their defaults, and its way of spacing.

    family k: written after k-diffusion: the state is x0 + sigma * noise, timesteps may be fractions, Karras
    levels lie between the ends of the timestep spacing. ddim: the state has unit variance, timesteps are
    whole. dpm: as ddim, but the spacing divides in one point more and leaves out the last.
    """

    family: Literal["k", "ddim", "dpm"]
    defaults: Mapping[str, Any] = field(repr=False)


CLASSES = {
    "EulerDiscreteScheduler": SchedulerClass(
        "k",
        {
            **_KARRAS,
            **_RANGE,
            **_ZERO_SNR,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass("k", {**_BASE, **_ZERO_SNR}),
    "HeunDiscreteScheduler": SchedulerClass("k", {**_KARRAS, **_CLIP, **_LATENT_BETAS}),
    "LMSDiscreteScheduler": SchedulerClass("k", _KARRAS),
    "DPMSolverSDEScheduler": SchedulerClass("k", {**_KARRAS, **_LATENT_BETAS, "noise_sampler_seed": None}),
    "DDIMScheduler": SchedulerClass("ddim", {**_DDIM, "clip_sample": True, "set_alpha_to_one": True}),
    "DDPMScheduler": SchedulerClass("ddim", {**_DDIM, "clip_sample": True, "variance_type": "fixed_small"}),
    "PNDMScheduler": SchedulerClass(
        "ddim", {**_BASE, "timestep_spacing": "leading", "skip_prk_steps": False, "set_alpha_to_one": False}
    ),
    "LCMScheduler": SchedulerClass(
        "ddim",
        {
            **_DDIM,
            **_LATENT_BETAS,
            "beta_schedule": "scaled_linear",
            "set_alpha_to_one": True,
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
        },
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass("dpm", _SINGLE),
    "DPMSolverMultistepScheduler": SchedulerClass(
        "dpm",
        {
            **_BASE,
            **_SINGLE,
            **_ZERO_SNR,
            "lower_order_final": True,
            "euler_at_final": False,
            "use_lu_lambdas": False,
        },
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        "dpm",
        {
            **_BASE,
            **_SIGMAS,
            **_RANGE,
            **_THRESHOLD,
            **_ZERO_SNR,
            "solver_order": 2,
            "predict_x0": True,
            "solver_type": "bh2",
            "lower_order_final": True,
            "disable_corrector": [],
            "solver_p": None,
            "use_flow_sigmas": False,
            "final_sigmas_type": "zero",
            "use_dynamic_shifting": False,
            "shift_terminal": None,
        },
    ),
}
# Classes with the same keys that have no sampler here: a folder that names one needs a sampler named.
COMPATIBLE = (
    "DEISMultistepScheduler",
    "EDMEulerScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
# Known keys that a sampler here can only take at their default.
_FIXED = (
    "interpolation_type",
    "timestep_type",
    "use_beta_sigmas",
    "noise_sampler_seed",
    "solver_order",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "lambda_min_clipped",
    "predict_x0",
    "disable_corrector",
    "solver_p",
    "shift_terminal",
)
# For keys with few values: those supported (others are free, or are checked where they are used).
_CHOICES = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    # Each family takes another's names for its own default, as in diffusers.
    "solver_type": ("midpoint", "bh2", "logrho"),
    # The two small ones are the same; DPM-Solver has no use for a variance, learned or not.
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
}

# Where numbers that a sampler computes with must lie; None and text are checked where they are used.
_RANGES = {
    "num_train_timesteps": (1, MOST_TIMESTEPS),
    "steps_offset": (-MOST_TIMESTEPS, MOST_TIMESTEPS),
    "clip_sample_range": (1e-6, 1e6),
    "dynamic_thresholding_ratio": (0.0, 1.0),
    "sample_max_value": (1.0, 1e6),  # below 1, thresholding would clamp to a range turned around
    "sigma_min": (1e-9, 1e9),
    "sigma_max": (1e-9, 1e9),
    "original_inference_steps": (1, MOST_TIMESTEPS),
    "timestep_scaling": (1e-6, 1e6),
    "lambda_min_clipped": (-math.inf, 1e6),
}


@dataclass(frozen=True)
class SchedulerConfig:
    """The keys of a scheduler_config.json, as they stand in the file.

    Absent keys take the default of the class that reads them, so they change with the sampler, as they do
    in diffusers; keys that the class does not know rest until a class reads them.
    spacing: a spacing named over the file's own, by `with_schedule`.
    """

    class_name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    spacing: str | None = None

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = FILE_NAME) -> "SchedulerConfig":
        """Read the file's mapping; raises UserError for a `_class_name` of another kind, and for the model's keys."""
        class_name = mapping.get("_class_name")
        if class_name not in [*CLASSES, *COMPATIBLE]:  # a list: what stands in a file may not be hashable
            hint = nearest(str(class_name)[:100], CLASSES)
            raise UserError(f"{where}: _class_name {class_name!r:.60} is not supported{hint}")
        private = ("_class_name", "_use_default_values")
        defaulted = mapping.get("_use_default_values") or ()
        if not isinstance(defaulted, list | tuple):
            raise UserError(f"{where}: _use_default_values must be a list of keys, not {defaulted!r:.60}")
        values = {key: mapping[key] for key in mapping if key not in private and key not in defaulted}
        for key, default in (_MODEL | _ZERO_SNR).items():
            _check_kind(key, values.get(key, default), default, where)
        for key, (least, most) in _RANGES.items():
            _check_range(key, values.get(key), least, most, where)
        return cls(class_name, values)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping to write as scheduler_config.json; diffusers reads it as we do.

        Raises UserError if the spacing named has no name in diffusers' class.
        """
        key = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}.get(
            self.spacing or "", "timestep_spacing"
        )
        if self.spacing and (self.get(key) is None or self.get(key) not in (True, self.spacing)):
            raise UserError(f"diffusers' {self.class_name} has no schedule {self.spacing!r}: save another")
        return {"_class_name": self.class_name, **self.values}

    @property
    def sampler(self) -> str:
        """The name of the sampler that the class stands for; raises UserError if there is none."""
        if self.class_name == "DPMSolverMultistepScheduler":
            return "dpmpp_2m_sde" if self.get("algorithm_type") == "sde-dpmsolver++" else "dpmpp_2m"
        for name, sampler in SAMPLERS.items():
            if sampler.scheduler == self.class_name:
                return name
        raise UserError(
            f"there is no sampler for _class_name {self.class_name!r}: name one, of {', '.join(SAMPLERS)}"
        )

    def get(self, key: str) -> Any:
        """Return the value of `key` as the class reads it: the file's, or its default, or None if unknown to it."""
        known = CLASSES[self.class_name].defaults if self.class_name in CLASSES else _MODEL
        if key in self.values and (key in known or key in MODEL_KEYS):
            return self.values[key]
        return known.get(key)

    def with_sampler(self, name: str) -> "SchedulerConfig":
        """Return the same keys under the class of the sampler `name`; raises UserError if it is unknown."""
        if name not in SAMPLERS:
            raise UserError(
                f"sampler {name!r} is unknown{nearest(name, SAMPLERS)}; known: {', '.join(SAMPLERS)}"
            )
        values = dict(self.values)
        if name.startswith("dpmpp_2"):  # one class serves two samplers by this key
            values["algorithm_type"] = "sde-dpmsolver++" if name == "dpmpp_2m_sde" else "dpmsolver++"
        return replace(self, class_name=SAMPLERS[name].scheduler, values=values)

    def with_schedule(self, name: str) -> "SchedulerConfig":
        """Return the same with the spacing `name` (of spacing.SPACINGS) in place of the file's own.

        karras and exponential, named here, lie between the noise schedule's own ends with every sampler, as in
        k-diffusion; where a file says `use_karras_sigmas` itself, they lie where diffusers' class has them, with
        Euler's kin between the ends of the file's timestep spacing.
        """
        if name not in SPACINGS:
            raise UserError(
                f"schedule {name!r} is unknown{nearest(name, SPACINGS)}; known: {', '.join(SPACINGS)}"
            )
        values = {key: value for key, value in self.values.items() if key not in _SIGMAS}
        if name in _CHOICES["timestep_spacing"]:
            values["timestep_spacing"] = name
        elif name in ("karras", "exponential"):
            values |= {f"use_{name}_sigmas": True, "timestep_spacing": "linspace"}  # which has both ends
        return replace(self, values=values, spacing=name)

    def with_values(self, **values: Any) -> "SchedulerConfig":
        """Return the same with keys set."""
        return replace(self, values={**self.values, **values})

    def noise_schedule(self) -> NoiseSchedule:
        """Return the model's noise schedule; raises UserError if it is unknown."""
        # Of diffusers' classes those of family ddim leave alpha_bar at 0; here it only has to be too small to see. A
        # spacing named by noise levels would spend its steps on the way down from there: it begins as everywhere else.
        family = CLASSES[self.class_name].family if self.class_name in CLASSES else "k"
        by_timesteps = self.spacing is None or self.spacing in TIMESTEP_SPACINGS
        terminal = 2.0**-48 if family == "ddim" and by_timesteps else TERMINAL_ALPHA_BAR
        return NoiseSchedule.build(
            self.get("beta_schedule"),
            self.get("beta_start"),
            self.get("beta_end"),
            self.get("num_train_timesteps"),
            self.get("trained_betas"),
            bool(self.get("rescale_betas_zero_snr")),
            terminal,
        )

    def check(self) -> None:
        """Raise UserError, naming the key, for a value of the wrong type or one that is not supported."""
        for key, default in CLASSES[self.class_name].defaults.items():
            value = self.get(key)
            _check_kind(key, value, default, FILE_NAME)
            choices = _CHOICES.get(key, (default,) if key in _FIXED else None)
            if choices and value not in choices:
                known = ", ".join(map(repr, choices))
                raise UserError(
                    f"{FILE_NAME}: {key} {value!r} is not supported by {self.sampler}; use {known}"
                )


def _check_kind(key: str, value: Any, default: Any, where: str) -> None:
    if key == "trained_betas":
        if isinstance(value, list | tuple) and len(value) > MOST_TIMESTEPS:
            raise UserError(
                f"{where}: trained_betas are {len(value):,}: at most {MOST_TIMESTEPS:,} timesteps can be"
            )
        numbers = isinstance(value, list | tuple) and all(_same_kind(each, 0.0) for each in value)
        if value is not None and not numbers:
            raise UserError(f"{where}: trained_betas must be a list of numbers, not {value!r:.60}")
    elif not _same_kind(value, default):
        raise UserError(f"{where}: {key} must be like {default!r}, not {value!r:.60}")


def _check_range(key: str, value: Any, least: float, most: float, where: str) -> None:
    """Raise UserError for a number outside of [least, most], NaN among them, and for what is no number and no None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(
            f"{where}: {key} is {value!r:.60}, where a number from {least:g} to {most:g} is needed"
        )


def _same_kind(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, bool):
        return value is None or isinstance(value, bool)
    if isinstance(default, int | float):
        whole = isinstance(default, int)
        return isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))
