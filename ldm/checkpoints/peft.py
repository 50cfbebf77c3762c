"""What peft says of an adapter beside its tensors: `adapter_config.json`, or the metadata that diffusers writes.

Both give the alpha and the rank of layers by patterns, which are regular expressions for the end of a layer's name
(peft's `get_pattern_key`). A file may say any, and some take for ever: only those are tried that are done soon.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.checkpoints.files import read_metadata, read_text
from ldm.errors import UserError
from ldm.foreign import json_object

CONFIG = "adapter_config.json"  # beside peft's own files
METADATA = (
    "lora_adapter_metadata"  # diffusers' entry of peft's settings, as JSON: "unet.r", "unet.lora_alpha", ...
)
KINDS = ("LORA", "LOHA", "LOKR", "IA3")
_DEFAULT = 8  # peft's rank and alpha, where its config leaves them out
_BASES_CHANGED = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # ways to begin that change the model's own weights
_FLAGS = {"use_rslora", "use_dora", "use_effective_conv2d"}  # what is done, or plain to see in the tensors


@dataclass(frozen=True)
class Settings:
    """The settings that are said of one component's adapter.

    where: for errors. values: peft's settings, {} where nothing is said. complete: they are a whole config.
    """

    where: str
    values: Mapping[str, Any]
    complete: bool = False

    @property
    def kind(self) -> str:
        return str(self.values.get("peft_type") or "LORA")

    def alpha(self, name: str, rank: int) -> float:
        """Return a layer's alpha, such that the change is scaled by alpha / rank; `rank` where none is said."""
        alpha = self._alphas.of(name)
        if alpha is None:
            said = self.values.get("lora_alpha", self.values.get("alpha"))
            default = _DEFAULT if self.complete else rank
            alpha = self._number("lora_alpha", default if said is None else said)
        # Rank-stabilised LoRA (Kalajdzievski 2023) scales by alpha / sqrt(rank).
        return alpha * rank**0.5 if self.values.get("use_rslora") else alpha

    def rank(self, name: str) -> float | None:
        """Return a layer's rank, None where nothing is said."""
        found = self._ranks.of(name)
        said = self.values.get("r", _DEFAULT if self.complete else None)
        return found if found is not None or said is None else self._number("r", said)

    @cached_property
    def _alphas(self) -> "_Patterns":
        return self._patterns("alpha_pattern")

    @cached_property
    def _ranks(self) -> "_Patterns":
        return self._patterns("rank_pattern")

    def _patterns(self, key: str) -> "_Patterns":
        said = self.values.get(key) or {}
        if not isinstance(said, dict):
            raise UserError(f"{self.where} can't be read: {key} is no mapping of layers' names to numbers")
        return _Patterns(self.where, {str(each): self._number(key, value) for each, value in said.items()})

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{self.where} can't be read: {key} is {str(value)[:50]!r}, where a number belongs"
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise UserError(f"{self.where} can't be read: {key} is no finite number")
        return number


class _Patterns:
    """Numbers by patterns for the ends of names, of which the first that matches counts, as in peft."""

    def __init__(self, where: str, numbers: Mapping[str, float]):
        self._plain: dict[str, tuple[int, float]] = {}
        self._others: list[tuple[int, re.Pattern[str], float]] = []
        for place, (pattern, number) in enumerate(numbers.items()):
            if re.fullmatch(r"[\w.-]+", pattern):  # a dot stands for any character, which in names is a dot
                self._plain[pattern] = place, number
            else:
                self._others.append((place, _compiled(pattern, where), number))
        if len(self._others) > 8:
            raise UserError(
                f"{where} can't be read: it has {len(self._others)} regular expressions, where 8 are the most that "
                "are tried: give the layers' names instead"
            )

    def of(self, name: str) -> float | None:
        """Return the number for a layer's name, None where no pattern matches."""
        ends = [name] + [name[i + 1 :] for i, each in enumerate(name) if each == "."]
        found = [self._plain[each] for each in ends if each in self._plain]
        for place, pattern, number in self._others:
            anchored = ends[:1] if pattern.pattern.startswith("^") else ends
            if any(pattern.fullmatch(each) for each in anchored):
                found.append((place, number))
        return min(found)[1] if found else None


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a pattern whose match takes few steps: nothing nested to repeat, and few ways to go."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern[:201])
    ways = 100 ** len(re.findall(r"[*+?{]", bare.replace("(?:", "("))) * 2 ** bare.count("|")
    if len(pattern) > 200 or ways > 20_000 or re.search(r"\)[*+?{]|\(\?[^:]|\\[1-9]", pattern):
        raise UserError(
            f"{where} can't be read: its pattern {pattern[:60]!r} is too involved a regular expression: give the "
            "layers' names instead"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{where} can't be read: its pattern {pattern[:60]!r} is no regular expression: {error}"
        ) from error


# Where the settings are


def settings_of(path: Path, components: Iterable[str]) -> dict[str, Settings]:
    """Return what an adapter's file says by component, from its metadata. Raises UserError."""
    where = f"{path}: its metadata {METADATA}"
    text = read_metadata(path).get(METADATA)
    settings = json_object(text, where) if text else {}
    bare = {key: value for key, value in settings.items() if "." not in key}  # a U-Net's, saved alone
    said = {"unet": Settings(where, bare)} if bare else {}
    for component in components:
        prefix = f"{component}."
        own = {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}
        said |= {component: Settings(where, own)} if own else {}
    return said


def config_beside(path: Path) -> Settings | None:
    """Return what peft's config in an adapter's folder says; None where there is none.

    Raises UserError: it is broken, of a kind that can't be read, or for weights that peft changed at the start.
    """
    file = path.parent / CONFIG
    if not file.is_file():
        return None
    values = json_object(read_text(file), str(file))
    settings = Settings(str(file), values, complete=True)
    if settings.kind not in KINDS:
        raise UserError(
            f"{file}: its peft_type is {settings.kind[:50]!r}, and only {', '.join(KINDS)} can be read"
        )
    begun = str(values.get("init_lora_weights", "")).lower()
    if begun.startswith(_BASES_CHANGED):
        raise UserError(
            f"{file}: init_lora_weights is {begun[:50]!r}, which changed the model's own weights too: save it as "
            "a plain LoRA (peft's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    odd = [key for key, value in values.items() if key.startswith("use_") and value and key not in _FLAGS]
    odd += [
        key
        for key in ("layer_replication", "trainable_token_indices", "target_parameters")
        if values.get(key)
    ]
    if odd:
        raise UserError(f"{file}: it says {', '.join(odd)[:200]}, which can't be done here")
    return settings
