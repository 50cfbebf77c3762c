"""Prompts in the syntaxes of other programs, chosen by name: see docs/prompts.md."""

from typing import get_args

from ldm.conditioning.prompts import a1111, comfyui, compel
from ldm.conditioning.prompts.weighted import Emphasis, Prompt, Syntax, plain
from ldm.errors import UserError, nearest

SYNTAXES: tuple[str, ...] = get_args(Syntax)
EMPHASES: tuple[str, ...] = get_args(Emphasis)


def read_prompt(prompt: str, syntax: str = "plain", steps: int = 1, emphasis: str = "original") -> Prompt:
    """Read a prompt.

    syntax: one of `SYNTAXES`; "plain" takes the text as it is. steps: of the whole plan, 1 or more; AUTOMATIC1111's
    prompts may change between them. emphasis: one of `EMPHASES`, for AUTOMATIC1111's weights.
    What has no meaning in a syntax stays text. Raises UserError for unknown names, for numbers that can't be used, and
    for what a syntax means and is not to be had here.
    """
    for name, value, known in (("prompt syntax", syntax, SYNTAXES), ("emphasis", emphasis, EMPHASES)):
        if value not in known:
            raise UserError(
                f"there is no {name} {value!r}{nearest(str(value), known)} (known: {', '.join(known)})"
            )
    if steps < 1:
        raise UserError(f"a prompt is read for {steps} steps: give 1 or more")
    if syntax == "a1111":
        return a1111.read(prompt, steps, "no_norm" if emphasis == "no_norm" else "original")
    if syntax == "comfyui":
        return comfyui.read(prompt)
    return compel.read(prompt) if syntax == "compel" else plain(prompt)
