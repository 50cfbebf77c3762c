"""What was found in a picture, and how strangers' values are taken: those that can be, and a note for each other."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.conditioning.prompts.weighted import Syntax
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacing import SPACINGS
from ldm.errors import printable
from ldm.models.token_merging import MOST
from pipelines.limits import LARGEST, LONGEST
from pipelines.recipe import Recipe, shown

_LONGEST_NAME = 300  # of a model's or a LoRA's
_MOST_LORAS = 100
_MOST_NOTES = 30
_NUMBER = re.compile(r"\s*[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,3})?\s*", re.ASCII)
# name of a setting -> (whole, least, most)
_RANGES: dict[str, tuple[bool, float, float]] = {
    "seed": (True, -(2**63), 2**64 - 1),
    "num_inference_steps": (True, 1, 10_000),
    "guidance_scale": (False, -1000, 1000),
    "guidance_rescale": (False, 0, 1),
    "clip_guidance_scale": (False, 0, 1e6),
    "token_merging": (False, 0, MOST),
    "feature_reuse": (True, 1, 10_000),
    "height": (True, 1, LARGEST),
    "width": (True, 1, LARGEST),
    "eta": (False, 0, 1),
    "clip_skip": (True, 0, 1000),
    "strength": (False, 0, 1),
    "hr_scale": (False, 1, 100),
    "hr_second_pass_steps": (True, 0, 10_000),
    "hr_denoising_strength": (False, 0, 1),
    "hr_resize_x": (True, 1, LARGEST),
    "hr_resize_y": (True, 1, LARGEST),
}


@dataclass(frozen=True)
class NamedLoRA:
    """A LoRA that a picture names: as it is called there, how much of it, and a hash where one stands there."""

    name: str
    weight: float = 1.0
    hash: str | None = None


@dataclass(frozen=True)
class Infotext:
    """How a picture was made, as far as a text in it says so and we have words for it.

    program: that wrote it. settings: by the names of `Recipe`. beyond: what no recipe of one pass has: strength of a
    picture that was drawn from another one, and of a second, larger pass AUTOMATIC1111's names (hr_scale, hr_resize_x,
    hr_resize_y, hr_upscaler, hr_second_pass_steps, hr_denoising_strength). model, model_hash, loras: what was named;
    nothing of it is looked for. The hash is the program's own, of a file. prompt_syntax: how the program reads its
    prompts. notes: what can't be taken, and why the picture can't be drawn again as it is, a line each.
    """

    program: str
    settings: Mapping[str, Any]
    beyond: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    model_hash: str | None = None
    loras: tuple[NamedLoRA, ...] = ()
    prompt_syntax: Syntax = "a1111"
    notes: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        """The settings as a recipe, for the model of whoever draws it."""
        known: dict[str, Any] = {"prompt": "", **self.settings}
        return Recipe(**known)


class Taking:
    """Values of a stranger's text on their way into an Infotext; what is of another type or range leaves a note."""

    def __init__(self, program: str, syntax: Syntax):
        self.program = program
        self.syntax: Syntax = syntax
        self.settings: dict[str, Any] = {}
        self.beyond: dict[str, Any] = {}
        self.model: str | None = None
        self.model_hash: str | None = None
        self.loras: list[NamedLoRA] = []
        self.notes: list[str] = []

    def done(self) -> Infotext:
        """Return what was taken."""
        return Infotext(
            self.program,
            self.settings,
            self.beyond,
            self.model,
            self.model_hash,
            tuple(self.loras),
            self.syntax,
            tuple(self.notes),
        )

    def note(self, text: str) -> None:
        """Add a line, once; after many no more."""
        if len(self.notes) < _MOST_NOTES and (line := printable(text)) not in self.notes:
            self.notes.append(line)

    def number(self, name: str, value: Any, into: dict[str, Any] | None = None) -> float | None:
        """Take a number, also one that is written as a text, as the setting `name`; None is none."""
        if value is None:
            return None
        whole, least, most = _RANGES[name]
        found = number_of(value)
        if found is None or (whole and found != int(found)) or not least <= found <= most:
            kind = "whole number" if whole else "number"
            self.note(
                f"{name} is {_told(value)}, and no {kind} from {shown(least)} to {shown(most)}: left out"
            )
            return None
        taken = int(found) if whole else float(found)
        (self.settings if into is None else into)[name] = taken
        return taken

    def size(self, text: str | None, width: str, height: str, into: dict[str, Any] | None = None) -> None:
        """Take "WxH", both or none, as these two settings; None is none."""
        if text is None:
            return
        both: dict[str, Any] = {}
        wide, _, high = text.partition("x")
        self.number(width, wide, both)
        self.number(height, high, both)
        if len(both) == 2:
            (self.settings if into is None else into).update(both)

    def text(self, name: str, value: Any) -> None:
        """Take a text as the setting `name`; None is none."""
        if value is None:
            return
        if isinstance(value, str) and len(value) <= LONGEST and _encodes(value):
            self.settings[name] = value
        else:
            what = f"{len(value):,} characters long or no Unicode" if isinstance(value, str) else _told(value)
            self.note(f"{name} is {what}, and no text that can be taken: left out")

    def sampler(self, value: Any, known: Mapping[str, str]) -> None:
        """Take a sampler by another program's name."""
        if value is None:
            return
        name = known.get(value, value) if isinstance(value, str) else None
        if name in SAMPLERS:
            self.settings["sampler"] = name
        else:
            self.note(f"the sampler {_told(value)} is none of ours ({', '.join(SAMPLERS)}): left out")

    def schedule(self, value: Any, known: Mapping[str, str]) -> None:
        """Take a schedule by another program's name."""
        if value is None:
            return
        name = known.get(value, value) if isinstance(value, str) else None
        if name in SPACINGS:
            self.settings["schedule"] = name
        else:
            self.note(f"the schedule {_told(value)} is none of ours ({', '.join(SPACINGS)}): left out")

    def name(self, value: Any) -> str | None:
        """Return the name of a model or the like, None for what is none."""
        if isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and _encodes(value):
            return value
        if value is not None:
            self.note(f"{_told(value)} is no name of a file: left out")
        return None

    def lora(self, name: Any, weight: Any = 1.0, hashed: Any = None) -> None:
        """Take the name of a LoRA."""
        if (found := self.name(name)) is None:
            return
        much = number_of(weight)
        if much is None or not -1000 <= much <= 1000:
            self.note(f"the weight of the LoRA {found[:60]!r} is {_told(weight)}, and no number: left out")
        elif len(self.loras) < _MOST_LORAS:
            own = hashed if isinstance(hashed, str) and re.fullmatch(r"[0-9a-fA-F]{6,64}", hashed) else None
            self.loras.append(NamedLoRA(found, float(much), own))
        else:
            self.note(f"of more than {_MOST_LORAS} LoRAs the first are taken")


def number_of(value: Any) -> int | float | None:
    """Return the number that a value is or that a text says; None for none, NaN and infinities among them."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value, re.ASCII) else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        return None
    return value


def _finite(value: int | float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _told(value: Any) -> str:
    """A stranger's value in a message, in a few characters."""
    if isinstance(value, str):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return shown(value)
    return f"a {type(value).__name__}"
