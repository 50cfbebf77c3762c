"""A contender of `benchmark.py parts`, loaded: diffusers, OpenVINO with diffusers' modules, or ours."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.openvino_parts import openvino
from benchmarks.parts import Contender, Job, ours, quiet, theirs, timed


def build(contender: Contender, job: Job) -> tuple[Callable[[int], tuple[float, Any]], dict[str, Any]]:
    """Load what a contender needs and return its work, as `benchmarks.workers` takes it, and what is known of it."""
    torch.set_grad_enabled(False)
    if contender.maker != "ours":
        quiet()
    facts: dict[str, Any] = {}
    if contender.maker == "ours":
        draw, facts["dtype"] = ours(contender, job)
    elif contender.maker == "openvino":
        draw, facts["dtype"] = openvino(contender, job), contender.torch_dtype
    else:
        draw, facts["dtype"] = theirs(contender, job), contender.torch_dtype
    facts["dtype"] = str(facts["dtype"]).removeprefix("torch.")
    return timed(draw), facts
