"""AUTOMATIC1111's text, `parameters`: the prompt, "Negative prompt: ...", and a last line of `key: value, ...`.

Forge, SD.Next, Fooocus and sites for pictures write and read it too.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from ldm.checkpoints.kinds import PICKLES
from ldm.conditioning.prompts.weighted import Syntax
from pipelines.infotext.values import Infotext, Taking, number_of
from pipelines.recipe import Recipe

OURS = "ldm-text-to-image"  # before the version: by it our own texts are known
NEGATIVE = "Negative prompt:"
_FEWEST = 3  # pairs that make a line the last one
_LONGEST_LINE = 100_000  # characters of the last line
SAMPLERS = {
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "Heun": "heun",
    "LMS": "lms",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2S": "dpmpp_2s",  # they have the ancestral one alone, which is another
    "UniPC": "unipc",
    "PLMS": "pndm",
    "LCM": "lcm",
}
SCHEDULES = {
    "Uniform": "linspace",
    "Normal": "linspace",
    "Simple": "trailing",
    "DDIM": "leading",
    "SGM Uniform": "sgm_uniform",
    "Karras": "karras",
    "Exponential": "exponential",
    "Align Your Steps": "align_your_steps",
}
# What "Automatic" is; all others of k-diffusion are uniform.
_AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2m_sde": "exponential"}
_OF_TIMESTEPS = ("ddim", "pndm", "unipc")
_LABELS = {name: label for label, name in SAMPLERS.items()}
_SPACED = {name: label for label, name in reversed(SCHEDULES.items())}
_LORA = re.compile(r"<lora:([^<>:]{1,300})((?::[^<>:]{0,60}){0,5})>")
_WORD = re.compile(r"\w")
# Keys that say nothing of how the picture is drawn, or that stand under another key too.
_IDLE = ("Version", "User", "Created Date", "Model hash", "Model", "Lora hashes", "Hashes", "Size", "RNG")


# Writing


def parameters(recipe: Recipe, model_hash: str | None = None) -> str:
    """Return a complete recipe as the text that AUTOMATIC1111 keeps in a PNG's chunk `parameters`.

    LoRAs stand in the prompt, by their files' stems. What the format has no word for, and no reader of it would use, is
    left out: the sizes that SDXL is told, pictures that are drawn from, the precision. White space at the ends of lines
    is lost, and a line of a prompt that begins with "Negative prompt:" is read as one.
    model_hash: the first ten hex digits of the SHA-256 of the model's file, where it is one; the recipe's own is of the
    weights, and goes under a name of its own.
    """
    named = (
        {name for name, _ in _LORA.findall(recipe.prompt)} if recipe.prompt_syntax == "a1111" else set[str]()
    )
    tags = "".join(
        f" <lora:{_stem(each.path)}:{_plain(each.weight)}>" for each in recipe.loras if each.name not in named
    )
    lines = [recipe.prompt + tags]
    if recipe.negative_prompt is not None:
        lines.append(f"{NEGATIVE} {recipe.negative_prompt}")
    interval = recipe.guidance_interval
    pairs: dict[str, Any] = {
        "Steps": recipe.num_inference_steps,
        "Sampler": _LABELS.get(recipe.sampler or ""),
        "Schedule type": _SPACED.get(recipe.schedule or ""),
        "CFG scale": recipe.guidance_scale,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}" if recipe.width and recipe.height else None,
        "Model hash": model_hash,
        "Model": _stem(recipe.model) if recipe.model else None,
        "Model fingerprint": recipe.model_hash,
        "Denoising strength": recipe.strength if recipe.hires_scale is None else recipe.hires_strength,
        "Hires upscale": recipe.hires_scale,
        "Hires steps": recipe.hires_steps,
        "Hires upscaler": _upscaler(recipe),
        "Prompt syntax": recipe.prompt_syntax if recipe.prompt_syntax != "a1111" else None,
        "Clip skip": recipe.clip_skip + 1 if recipe.clip_skip else None,
        "Eta DDIM": recipe.eta or None,
        "Guidance rescale": recipe.guidance_rescale or None,
        "CLIP guidance scale": recipe.clip_guidance_scale or None,
        "Token merging ratio": recipe.token_merging or None,
        "Feature reuse": recipe.feature_reuse if recipe.feature_reuse > 1 else None,
        "Guidance interval": " to ".join(map(_plain, interval)) if interval else None,
        "Lora hashes": _hashes({_stem(each.path): each.hash for each in recipe.loras}),
        "TI hashes": _hashes({each.token or _stem(each.path): each.hash for each in recipe.embeddings}),
        "RNG": "CPU",
        "Version": f"{OURS} {recipe.version or ''}".strip(),
    }
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines).strip()


def _upscaler(recipe: Recipe) -> str | None:
    if recipe.hires_scale is None:
        return None
    return "Latent" if recipe.hires_upscaler is None else _stem(recipe.hires_upscaler.path)


def _stem(path: str) -> str:
    """A file's name without its ending, and without what the format uses for itself."""
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    for ending in (".safetensors", *PICKLES):
        name = name.removesuffix(ending)
    return re.sub(r'[<>:,"\\\n]', "_", name) or "unnamed"


def _hashes(named: Mapping[str, str | None]) -> str | None:
    return ", ".join(f"{name}: {each}" for name, each in named.items() if each) or None


def _plain(value: float) -> str:
    """A number in as few digits as say it exactly."""
    return (
        str(int(value))
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        else repr(value)
    )


def _quoted(value: Any) -> str:
    text = _plain(value) if isinstance(value, int | float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(each in text for each in ',:\n"') else text


# Reading


def read_parameters(text: str) -> Infotext:
    """Return what a text says, by AUTOMATIC1111's own rules; anything that it can't be is a note."""
    *lines, last = text.strip().split("\n")
    pairs = dict(pairs_of(last))
    if len(pairs) < _FEWEST:
        lines, pairs = [*lines, last], {}
    is_ours = pairs.get("Version", "").startswith(OURS)
    said = pairs.get("Prompt syntax", "a1111") if is_ours else "a1111"
    syntax: Syntax = next((each for each in get_args(Syntax) if each == said), "a1111")
    taking = Taking(OURS if is_ours else "AUTOMATIC1111", syntax)
    prompt, negative = _prompts(lines)
    hashes: dict[str, str] = {}
    for each in pairs.get("Lora hashes", "").split(","):
        name, _, hashed = each.rpartition(":")
        hashes[name.strip()] = hashed.strip()
    for name, arguments in _LORA.findall(prompt):
        numbers = [each for each in arguments.split(":")[1:] if "=" not in each]
        taking.lora(name, numbers[0] if numbers else 1.0, hashes.get(name))
    taking.text("prompt", _LORA.sub("", prompt).strip())
    taking.text("negative_prompt", negative if negative is not None or is_ours else "")
    if not pairs:
        taking.note("the text holds a prompt and no settings")
        return taking.done()
    _take_settings(taking, pairs, is_ours)
    if not is_ours or "Hires upscale" in pairs:
        _take_passes(taking, pairs)
    if not is_ours:
        _tell_the_rest(taking, pairs)
    return taking.done()


def pairs_of(line: str) -> Iterator[tuple[str, str]]:
    """Yield each `key: value` of a line, in time that grows with its length.

    A key begins with a letter or a digit and goes on with these, blanks, hyphens and slashes. A value ends at a comma,
    unless it is quoted as JSON quotes.
    """
    line, place = line[:_LONGEST_LINE], 0
    while (colon := line.find(":", place)) >= 0:
        begin = colon
        while begin > place and (line[begin - 1] in " -/" or _WORD.match(line[begin - 1])):
            begin -= 1
        while begin < colon and not _WORD.match(line[begin]):
            begin += 1
        place = colon + 1
        if colon - begin < 2:
            continue
        value, place = _value_at(line, place)
        yield line[begin:colon], value


def _value_at(line: str, place: int) -> tuple[str, int]:
    """The value that begins here, and where the next pair may."""
    while place < len(line) and line[place].isspace():
        place += 1
    if line[place : place + 1] == '"':
        end = place + 1
        while end < len(line) and line[end] != '"':
            end += 2 if line[end] == "\\" else 1
        if line[end + 1 : end + 2] in ("", ",") and end > place + 1 and end < len(line):
            return _unquoted(line[place : end + 1]), end + 2
    end = line.find(",", place)
    end = len(line) if end < 0 else end
    return line[place:end].strip(), end + 1


def _unquoted(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, str) else text


def _prompts(lines: list[str]) -> tuple[str, str | None]:
    """The prompt and, where there is one, the negative prompt."""
    parts: tuple[list[str], list[str]] = ([], [])
    behind = False
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            behind, line = True, line.removeprefix(NEGATIVE).strip()
        parts[behind].append(line)
    prompt, negative = map("\n".join, parts)
    return prompt, negative if behind else None


def _take_settings(taking: Taking, pairs: Mapping[str, str], is_ours: bool) -> None:
    taking.number("num_inference_steps", pairs.get("Steps"))
    taking.number("guidance_scale", pairs.get("CFG scale"))
    taking.number("seed", pairs.get("Seed"))
    taking.size(pairs.get("Size"), "width", "height")
    skip = taking.number("clip_skip", pairs.get("Clip skip"))
    if skip is not None:  # theirs counts from 1, ours how many more are left out
        taking.settings["clip_skip"] = max(int(skip) - 1, 0)
    taking.number("eta", pairs.get("Eta DDIM"))
    taking.model = taking.name(pairs.get("Model"))
    taking.model_hash = taking.name(pairs.get("Model hash"))
    _take_sampler(taking, pairs, is_ours)
    if is_ours:
        taking.number("guidance_rescale", pairs.get("Guidance rescale"))
        taking.number("clip_guidance_scale", pairs.get("CLIP guidance scale"))
        taking.number("token_merging", pairs.get("Token merging ratio"))
        taking.number("feature_reuse", pairs.get("Feature reuse"))
        low, _, high = pairs.get("Guidance interval", "").partition(" to ")
        ends = number_of(low), math.inf if high == "inf" else number_of(high)
        if None not in ends:
            taking.settings["guidance_interval"] = ends
        if "Hires upscale" not in pairs:
            taking.number("strength", pairs.get("Denoising strength"), taking.beyond)
    elif pairs.get("RNG", "GPU") != "CPU":
        taking.note(
            "its noise was drawn on a GPU: here, where noise is the CPU's, the same seed draws another picture"
        )


def _take_sampler(taking: Taking, pairs: Mapping[str, str], is_ours: bool) -> None:
    """Take sampler and schedule; older texts have the schedule's name behind the sampler's."""
    name, kind = pairs.get("Sampler"), pairs.get("Schedule type")
    for suffix in ("Karras", "Exponential"):
        if name and name.endswith(f" {suffix}"):
            name, kind = name.removesuffix(f" {suffix}"), kind or suffix
    taking.sampler(name, SAMPLERS)
    found = taking.settings.get("sampler")
    if kind and kind != "Automatic":
        taking.schedule(kind, SCHEDULES)
    elif found and not is_ours:
        uniform = "leading" if found in _OF_TIMESTEPS else "linspace"
        taking.settings["schedule"] = _AUTOMATIC.get(found, uniform) if kind else uniform


def _take_passes(taking: Taking, pairs: Mapping[str, str]) -> None:
    """Take what is said of a second, larger pass, or of a picture that this one was drawn from."""
    larger = any(key.startswith("Hires ") for key in pairs)
    strength = "hr_denoising_strength" if larger else "strength"
    taken = taking.number(strength, pairs.get("Denoising strength"), taking.beyond)
    if not larger:
        if taken is not None:
            taking.note("it was drawn from another picture, which is not in the text")
        return
    taking.number("hr_scale", pairs.get("Hires upscale"), taking.beyond)
    taking.number("hr_second_pass_steps", pairs.get("Hires steps"), taking.beyond)
    taking.size(pairs.get("Hires resize"), "hr_resize_x", "hr_resize_y", taking.beyond)
    if upscaler := taking.name(pairs.get("Hires upscaler")):
        taking.beyond["hr_upscaler"] = upscaler


def _tell_the_rest(taking: Taking, pairs: Mapping[str, str]) -> None:
    """Name the keys of which nothing is taken."""
    taken = ("Steps", "CFG scale", "Seed", "Clip skip", "Eta DDIM", "Sampler", "Schedule type", *_IDLE)
    taken += ("Denoising strength", "Hires upscale", "Hires steps", "Hires resize", "Hires upscaler")
    if rest := [key for key in pairs if key not in taken]:
        more = f" and {len(rest) - 12} more" if len(rest) > 12 else ""
        taking.note(f"not taken: {', '.join(each[:40] for each in rest[:12])}{more}")
