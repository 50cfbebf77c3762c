"""The settings that a call has where nobody names them."""

from typing import Any

from ldm.system import System

_CONSISTENT = "LatentConsistencyModel"  # of which there are two classes in diffusers


def takes_all_steps(system: System, sampler: str | None, schedule: str | None) -> bool:
    """Whether a picture of any strength is drawn from in all steps, on a shorter way, as diffusers' class has it."""
    return system.pipeline.startswith(_CONSISTENT) and sampler == "lcm" and schedule is None


def defaults_of(system: System) -> dict[str, Any]:
    """Return num_inference_steps and guidance_scale: the model's own (in its `options`), else its diffusers class's."""
    if system.pipeline.startswith(_CONSISTENT):
        usual = {"num_inference_steps": 4, "guidance_scale": 8.5}
    else:
        usual = {"num_inference_steps": 50, "guidance_scale": 5.0 if system.is_xl else 7.5}
    return {**usual, **system.options}
