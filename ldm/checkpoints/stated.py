"""What a single file says of itself beside its tensors' shapes: ModelSpec metadata, marks, and a config beside it.

The words in use: `modelspec.*` in the header of a safetensors file (Stability AI's ModelSpec, as sd-scripts writes it;
ComfyUI writes `modelspec.predict_key`), empty tensors named `v_pred` and `ztsnr` (NoobAI, ComfyUI, AUTOMATIC1111), and
the config of LDM or sgm under the checkpoint's own name, `model.yaml` beside `model.safetensors` (AUTOMATIC1111).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config import load_mapping
from ldm.errors import UserError

# In lower case and without spaces, hyphens and underscores.
_PREDICTIONS = {
    "epsilon": (
        "epsilon",
        "eps",
        "noise",
        "epsilonprediction",
        "epsprediction",
        "noiseprediction",
        "epsscaling",
    ),
    "v_prediction": ("v", "vprediction", "vpred", "velocity", "vscaling"),
    "sample": ("sample", "x0"),
}
_OTHER_WAYS = ("edm", "flow", "flowmatching", "rf", "rectifiedflow", "edmscaling", "vscalingwithedmcnoise")
_ZERO_SNR = (
    *("rescale_betas_zero_snr", "rescale_zero_terminal_snr", "zero_terminal_snr", "use_zero_snr", "zero_snr"),
    *("ztsnr", "zsnr"),
)
# Numbers of an LDM config, and what diffusers calls them.
_NUMBERS = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
# LDM's names of noise schedules, of which "linear" is linear in the square root of beta.
_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}


@dataclass
class Stated:
    """The values that a file says; what it leaves open is missing.

    Attributes:
        scheduler: keys of diffusers' scheduler_config.json: "prediction_type", "rescale_betas_zero_snr" and the like.
        vae: keys of its vae/config.json.
        architecture: ModelSpec's name of the model, such as "stable-diffusion-xl-v1-base"; "" for none.
        side: pixels along each side of a square picture, by ModelSpec; None where it is not square, or not said.
        other: a way of predicting, by the file's own words, that no U-Net here has; "" for none.
        notes: contradictions, and what could not be understood.
    """

    scheduler: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""
    side: int | None = None
    other: str = ""
    notes: list[str] = field(default_factory=list)


def stated(tensors: Collection[str], metadata: Mapping[str, str], path: str | Path) -> Stated:
    """Return what is said of a single file by its tensors' names, its metadata, and a `.yaml` beside it.

    Where they contradict each other, the `.yaml` that somebody put there counts before the marks, and those before the
    metadata; a note says so.
    """
    found = Stated(architecture=metadata.get("modelspec.architecture", "").strip().lower())
    sides = metadata.get("modelspec.resolution", "").lower().replace(" ", "").split("x")
    if sides[0].isascii() and sides[0].isdigit() and sides[0] == sides[-1]:
        found.side = int(sides[0][:6])
    beside = next((each for each in map(Path(path).with_suffix, (".yaml", ".yml")) if each.is_file()), None)
    sources = {
        "its metadata": _of_metadata(metadata, found),
        "a tensor of that name": _of_marks(tensors),
        str(beside): _of_config(beside, found) if beside else {},
    }
    for source, scheduler in sources.items():
        for key, value in scheduler.items():
            other = found.scheduler.get(key, value)
            if other != value:
                found.notes.append(f"{source} gives {key} as {value}, which counts; elsewhere it is {other}")
        found.scheduler |= scheduler
    return found


def _of_metadata(metadata: Mapping[str, str], found: Stated) -> dict[str, Any]:
    """The prediction type, said outright or by the model's name, and zero SNR as sd-scripts notes it."""
    zero = any(
        _is_true(metadata.get(key))
        for key in ("ss_zero_terminal_snr", "modelspec.is_zsnr", "modelspec.ztsnr")
    )
    snr: dict[str, Any] = {"rescale_betas_zero_snr": True} if zero else {}
    return _prediction_in(metadata, found) | snr


def _prediction_in(metadata: Mapping[str, str], found: Stated) -> dict[str, Any]:
    for key in ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type"):
        if said := metadata.get(key, "").strip():
            return _prediction(said, f"its metadata ({key})", found)
    if "v-pred" in found.architecture or _is_true(metadata.get("ss_v_parameterization")):
        return {"prediction_type": "v_prediction"}
    if found.architecture.startswith("stable-diffusion-v2"):
        if "768-v" in found.architecture:
            return {"prediction_type": "v_prediction"}
        if "512" in found.architecture or "inpainting" in found.architecture:
            return {"prediction_type": "epsilon"}
    return {}


def _prediction(said: object, where: str, found: Stated) -> dict[str, Any]:
    word = re.sub(r"[\s_-]", "", str(said).lower())
    known = next((name for name, words in _PREDICTIONS.items() if word in words), None)
    if word in _OTHER_WAYS:
        found.other = f"{where} says that it predicts {str(said)[:40]!r}"
    elif known is None:
        found.notes.append(
            f"{where} says that it predicts {str(said)[:40]!r}, which is not known and was passed over"
        )
    return {} if known is None else {"prediction_type": known}


def _of_marks(names: Collection[str]) -> dict[str, Any]:
    said: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    return said | ({"rescale_betas_zero_snr": True} if "ztsnr" in names else {})


def _of_config(path: Path, found: Stated) -> dict[str, Any]:
    """What a config of LDM, or of sgm for SDXL, says of the schedule, the prediction and the latents' scale."""
    try:
        settings = _inside(load_mapping(path), "model", "params")
    except UserError as error:
        found.notes.append(f"{error}: it was passed over")
        return {}
    if not settings:
        found.notes.append(f"{path} is no config of LDM or sgm (it has no model.params) and was passed over")
        return {}
    denoiser = _inside(settings, "denoiser_config", "params")
    discretization = _inside(denoiser, "discretization_config", "params")
    said: dict[str, Any] = {}
    scaling = _inside(denoiser, "scaling_config").get("target")
    if "parameterization" in settings:
        said = _prediction(settings["parameterization"], str(path), found)
    elif scaling:
        said = _prediction(str(scaling).rpartition(".")[2], str(path), found)
    sampled = _inside(settings, "sampler_config", "params", "discretization_config", "params")
    for name, ours in _NUMBERS.items():
        for place in (settings, discretization):
            if (value := _number(name, place.get(name), path, found)) is not None:
                said[ours] = round(value) if name == "timesteps" else value
    if any(
        _is_true(place.get(name))
        for place in (settings, denoiser, discretization, sampled)
        for name in _ZERO_SNR
    ):
        said["rescale_betas_zero_snr"] = True
    if "beta_schedule" in settings:
        if known := _SCHEDULES.get(str(settings["beta_schedule"])):
            said["beta_schedule"] = known
        else:
            found.notes.append(
                f"{path}: its beta_schedule {str(settings['beta_schedule'])[:40]!r} is not known here"
            )
    if (scale := _number("scale_factor", settings.get("scale_factor"), path, found)) is not None:
        found.vae["scaling_factor"] = scale
    return said


def _number(name: str, value: object, path: Path, found: Stated) -> float | None:
    """A finite number above 0, also one that is written as text; None, with a note, for anything else."""
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number > 0):
        found.notes.append(
            f"{path}: its {name} is {str(value)[:40]!r}, where a number was expected: passed over"
        )
        return None
    return number


def _is_true(value: object) -> bool:
    return value is True or str(value).strip().lower() in ("true", "yes", "1")


def _inside(mapping: Any, *keys: str) -> dict[str, Any]:
    """The mapping at the end of a path through mappings, {} where the path leads elsewhere."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping if isinstance(mapping, dict) else {}
