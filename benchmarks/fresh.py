"""Processes that start from nothing: to the first picture, or to the end of an import.

This module imports nothing heavy, since it is what such a process begins with: python -m benchmarks.fresh JSON
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.parts import Contender, Job

ROOT = Path(__file__).resolve().parents[1]
_IMPORTS = {
    "ours": "from pipelines import TextToImagePipeline",
    "diffusers": "from diffusers import StableDiffusionPipeline",
}


class Fresh:
    """A contender that is a new process each round. facts: lists of what each round's process said, by name."""

    def __init__(self, contender: "Contender", job: "Job"):
        from benchmarks.parts import Shapes, guidance_scale

        shapes = Shapes.read(job.model)
        shape = (job.pictures, shapes.channels, shapes.side, shapes.side)
        self._told = {"contender": asdict(contender), "job": asdict(job), "shape": shape}
        self._told |= {"prompts": job.prompts(), "scale": guidance_scale(job.model)}
        self.facts: dict[str, Any] = {}

    def once(self, turn: int) -> tuple[float, Any]:
        from benchmarks.workers import FailedError, ending

        command = [sys.executable, "-m", "benchmarks.fresh", json.dumps(self._told)]
        started = time.perf_counter()
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no word"])[-1]
            raise FailedError(f"{ending(ended.returncode)}: {last[:200]}")
        said = json.loads(ended.stdout.strip().splitlines()[-1])
        seconds = said.pop("seconds", None)
        if seconds is None:
            seconds = said.pop("ready") - started
        self.facts["dtype"] = said.pop("dtype", "")
        for name, value in said.items():
            if turn:  # the first call warms up the disk
                self.facts.setdefault(name, []).append(value)
        return seconds, None

    def close(self) -> None:
        """A process that has ended holds nothing."""


def main() -> None:
    told = json.loads(sys.argv[1])
    said = imported(told) if told["job"]["part"] == "import" else drawn(told)
    print(json.dumps(said), flush=True)


def imported(told: dict[str, Any]) -> dict[str, Any]:
    """Import torch and then what is measured; the first is a part of the second."""
    begun = time.perf_counter()
    import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

    after = time.perf_counter()
    exec(_IMPORTS[told["contender"]["maker"]], {})
    ended = time.perf_counter()
    return {"seconds": ended - begun, "beyond_torch": ended - after}


def drawn(told: dict[str, Any]) -> dict[str, Any]:
    """Load as a user does, draw, save one picture beside nothing; say when, and the memory that it took at most."""
    contender, job = told["contender"], told["job"]
    import torch

    cuda = torch.cuda.is_available()
    dtype = {"torch_dtype": getattr(torch, contender["dtype"])} if contender["dtype"] else {}
    noise = torch.randn(told["shape"], generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"num_inference_steps": job["steps"], "guidance_scale": told["scale"]}
    if contender["maker"] == "ours":
        from pipelines import TextToImagePipeline

        backend = {"backend": contender["backend"]} if contender["backend"] else {}
        ours: Any = TextToImagePipeline.from_pretrained(job["model"], **dtype, **backend)
        images, used = ours(told["prompts"], latents=noise, progress=False, **settings).images, ours.dtype
    else:
        import diffusers

        kind: Any = diffusers.DiffusionPipeline
        theirs = kind.from_pretrained(job["model"], **dtype)
        theirs = theirs.to("cuda") if cuda else theirs
        theirs.set_progress_bar_config(disable=True)
        images = theirs(told["prompts"], latents=noise.to(theirs.device, theirs.dtype), **settings).images
        used = theirs.unet.dtype
    images[0].save(os.devnull, format="png")
    ready = time.perf_counter()  # of Linux and macOS: the same clock in all processes
    said = {"ready": ready, "dtype": str(used).removeprefix("torch."), "peak_bytes": peak_memory()}
    return said | ({"peak_device_bytes": torch.cuda.max_memory_allocated()} if cuda else {})


def peak_memory() -> int:
    """The most main memory that this process held, in bytes, its mapped files included."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:  # `getrusage` would count the parent's too
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
