"""InvokeAI's and SwarmUI's metadata: flat JSON, with names of their own."""

from collections.abc import Mapping
from typing import Any

from pipelines.infotext.comfyui import SAMPLERS, SCHEDULES
from pipelines.infotext.values import Infotext, Taking

_KARRAS = ("euler", "heun", "lms", "unipc", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_2s")
_INVOKEAI = {"euler_a": "euler_ancestral"} | {f"{name}_k": name for name in _KARRAS}


def read_invokeai(metadata: Mapping[str, Any]) -> Infotext:
    """Return what InvokeAI's `invokeai_metadata` says."""
    taking = Taking("InvokeAI", "compel")
    taking.text("prompt", metadata.get("positive_prompt"))
    taking.text("negative_prompt", metadata.get("negative_prompt"))
    for name, theirs in (
        ("seed", "seed"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfg_scale"),
        ("width", "width"),
        ("height", "height"),
        ("guidance_rescale", "cfg_rescale_multiplier"),
        ("clip_skip", "clip_skip"),
    ):
        taking.number(name, metadata.get(theirs))
    scheduler = metadata.get("scheduler")
    taking.sampler(scheduler, _INVOKEAI)
    if isinstance(scheduler, str) and scheduler.endswith("_k"):
        taking.settings["schedule"] = "karras"
    taking.model, taking.model_hash = _model(taking, metadata.get("model"))
    for each in _listed(metadata.get("loras")):
        known = each if isinstance(each, Mapping) else {}
        name, hashed = _model(taking, known.get("model", known.get("lora")))
        taking.lora(name, known.get("weight", 1.0), hashed)
    if taking.number("strength", metadata.get("strength"), taking.beyond) is not None:
        taking.note("it was drawn from another picture, which is not in the text")
    if metadata.get("rand_device", "cpu") != "cpu":
        taking.note("its noise was drawn on a GPU: here the same seed draws another picture")
    rest = [
        key
        for key in ("controlnets", "ipAdapters", "t2iAdapters", "refiner_model", "vae")
        if metadata.get(key)
    ]
    if rest:
        taking.note(f"not taken: {', '.join(rest)}")
    return taking.done()


def _model(taking: Taking, found: Any) -> tuple[str | None, str | None]:
    """The name and the hash of a model's record, of this version or an older one."""
    if not isinstance(found, Mapping):
        return taking.name(found), None
    hashed = found.get("hash")
    name = taking.name(found.get("name", found.get("model_name")))
    return name, hashed.rpartition(":")[2][:64] if isinstance(hashed, str) else None


def read_swarmui(metadata: Mapping[str, Any]) -> Infotext:
    """Return what SwarmUI's `sui_image_params` says."""
    taking = Taking("SwarmUI", "comfyui")
    inside = metadata.get("sui_image_params")
    if not isinstance(inside, Mapping):
        taking.note("sui_image_params holds no named entries: nothing is taken")
        return taking.done()
    known = {str(key).lower(): each for key, each in inside.items()}
    taking.text("prompt", known.pop("prompt", None))
    taking.text("negative_prompt", known.pop("negativeprompt", ""))
    for name, theirs in (
        ("seed", "seed"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfgscale"),
        ("width", "width"),
        ("height", "height"),
    ):
        taking.number(name, known.pop(theirs, None))
    taking.sampler(known.pop("sampler", None), SAMPLERS)
    taking.schedule(known.pop("scheduler", None), SCHEDULES)
    taking.model = taking.name(known.pop("model", None))
    names, weights = _listed(known.pop("loras", None)), _listed(known.pop("loraweights", None))
    for place, name in enumerate(names):
        taking.lora(name, weights[place] if place < len(weights) else 1.0)
    for idle in ("swarm_version", "date", "generation_time", "aspectratio", "images"):
        known.pop(idle, None)
    if known:
        taking.note(f"not taken: {', '.join(key[:40] for key in list(known)[:12])}")
    return taking.done()


def _listed(value: Any) -> list[Any]:
    """A list; of one text with commas its parts."""
    if isinstance(value, str):
        return [each.strip() for each in value[:10_000].split(",") if each.strip()]
    return value[:1000] if isinstance(value, list) else []
