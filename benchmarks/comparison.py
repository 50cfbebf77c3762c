"""Measurements of parts: who takes part, in what order, and the file that keeps each once it is done."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import build
from benchmarks.costs import build_peak, build_profile, flops
from benchmarks.fresh import Fresh
from benchmarks.parts import DTYPES, NETWORKS, PARTS, Contender, Job, device, has_backend
from benchmarks.workers import FailedError, Figures, Runner, Worker, in_turns, reason
from ldm.console import note
from ldm.errors import UserError
from ldm.evaluation.timing import machine
from ldm.files import write_text

ALL_PARTS = (*PARTS, "start", "import")
DEFAULT = "diffusers, float32"
_PROCESS = 0.4e9  # bytes of one that holds nothing but its modules
_OPERATIONS = 1e12  # of what the peak's rounds are as long as, where no one counted them


@dataclass(frozen=True)
class Wanted:
    """What to measure of a model's folder. only: parts of contenders' names, of which one must be in theirs."""

    label: str
    model: Path
    parts: Sequence[str]
    pictures: Sequence[int]
    precisions: Sequence[str]
    rounds: int
    steps: int
    compiled: bool = False
    apart: bool = False
    profile: bool = False
    only: Sequence[str] = ()


def contenders(wanted: Wanted, part: str) -> list[Contender]:
    """Who takes part, diffusers' default first."""
    if part == "import":
        return [Contender("diffusers", "diffusers"), Contender("ours", "ours")]
    found = [Contender(DEFAULT, "diffusers", "float32")]
    cuda = device().type == "cuda"
    openvino = not cuda and importlib.util.find_spec("openvino") is not None
    ours = [Contender("ours, as loaded", "ours")]
    fresh, compiled = part == "start", wanted.compiled or cuda
    for dtype in dict.fromkeys(["float32", *(DTYPES[each] for each in wanted.precisions)]):
        ours.append(Contender(f"ours, {dtype}", "ours", dtype))
        if dtype != "float32":
            found.append(Contender(f"diffusers, {dtype}", "diffusers", dtype))
            if part != "text" and not fresh:
                tuned = Contender(f"diffusers, {dtype}, tuned", "diffusers", dtype, tuned=True)
                found.append(tuned)
                if compiled:
                    found.append(Contender(f"{tuned.name}, compiled", "diffusers", dtype, True, True))
        if openvino and part != "text" and not fresh and dtype != "float16":
            found.append(Contender(f"OpenVINO of diffusers, {dtype}", "openvino", dtype))
        if not cuda and has_backend(dtype):
            ours.append(Contender(f"ours, {dtype}, OpenVINO", "ours", dtype, backend="openvino"))
        if compiled and not fresh:
            ours.append(Contender(f"ours, {dtype}, compiled", "ours", dtype, compiled=True))
    chosen = [each for each in found + ours if not wanted.only or any(w in each.name for w in wanted.only)]
    if not chosen:
        raise UserError(f"no contender of {part} has a name like {', '.join(wanted.only)}")
    return chosen


# Measuring


def measure(wanted: Wanted, part: str, pictures: int) -> dict[str, Any]:
    """Measure a part once; return what the file keeps of it."""
    job = Job(str(wanted.model), part, pictures, wanted.steps)
    chosen, fresh = contenders(wanted, part), part in ("start", "import")
    makers: dict[str, Callable[[], Runner]] = {
        each.name: partial(Fresh, each, job) if fresh else partial(Worker, build, each, job)
        for each in chosen
    }
    counted = flops(job.model, part, pictures) if part in NETWORKS else None
    apart = wanted.apart or (not fresh and too_large(wanted.model, part, chosen))
    if apart:
        note("not all contenders fit into memory at once: each is loaded by itself, twice")
    peaks = dict.fromkeys(_peaks(wanted) if counted else ())
    for kind, dtype in peaks:
        makers[f"{kind} {dtype}"] = partial(Worker, build_peak, kind, dtype, int(counted or _OPERATIONS))
    figures = in_turns(makers, wanted.rounds, apart)
    reference = None if fresh else _reference(job, figures)
    found: dict[str, Any] = {"key": key(wanted, part, pictures), "apart": apart, "operations": counted}
    found["contenders"] = {each.name: _kept(figures[each.name], reference, part) for each in chosen}
    found["peaks"] = {
        f"{kind} {dtype}": [own.facts["operations"] / each for each in own.seconds]
        for kind, dtype in peaks
        if not (own := figures[f"{kind} {dtype}"]).failed
    }
    if wanted.profile and part in NETWORKS:
        found["profiles"] = dict(_profiles(chosen, job))
    return found


def _peaks(wanted: Wanted) -> Iterator[tuple[str, str]]:
    for dtype in dict.fromkeys(["float32", *(DTYPES[each] for each in wanted.precisions)]):
        yield "matrix", dtype
        yield "convolution", dtype


def _reference(job: Job, figures: dict[str, Figures]) -> np.ndarray | None:
    """diffusers' output in float32, computed alone where it doesn't take part."""
    if DEFAULT in figures:
        return figures[DEFAULT].output
    alone = in_turns({DEFAULT: partial(Worker, build, Contender(DEFAULT, "diffusers", "float32"), job)}, 0)
    return alone[DEFAULT].output


def _kept(own: Figures, reference: np.ndarray | None, part: str) -> dict[str, Any]:
    kept: dict[str, Any] = {**own.facts, "seconds": own.seconds}
    if own.failed:
        kept["failed"] = own.failed
    elif reference is not None and own.output is not None:
        kept["distance"] = distance(own.output, reference, part)
    return kept


def distance(out: np.ndarray, reference: np.ndarray, part: str) -> float:
    """Of pictures their PSNR in dB, at most 120; of the rest the relative L2 distance."""
    if out.shape != reference.shape or not np.isfinite(out).all():
        return float("nan")
    if part == "picture":
        return float(-10 * np.log10(max(np.square(out - reference).mean(), 1e-12)))
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


def _profiles(chosen: Sequence[Contender], job: Job) -> Iterator[tuple[str, dict[str, float]]]:
    for each in chosen:
        if each.maker == "openvino" or each.backend or each.compiled:
            continue  # torch's profiler sees nothing of their inside
        try:
            worker = Worker(build_profile, each, job)
        except FailedError:
            continue
        try:
            yield each.name, worker.once(0)[1]
        except FailedError as error:
            note(f"{each.name} could not be profiled: {error}")
        finally:
            worker.close()


def too_large(model: Path, part: str, chosen: Sequence[Contender]) -> bool:
    """Whether all contenders' weights at once would take more than 85 % of the memory that is free."""
    import psutil
    from safetensors import safe_open

    if device().type != "cpu":
        return False
    weights = 0
    for path in Path(model).glob(f"{NETWORKS.get(part, '*')}/*.safetensors"):
        with safe_open(path, "pt") as file:
            weights += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    needed = 0.0
    for each in chosen:
        size = 4 if each.dtype in (None, "float32") or each.maker == "openvino" else 2
        needed += size * weights + _PROCESS
    if any(each.maker == "openvino" or each.backend for each in chosen):
        needed += 6 * weights  # while one is converted
    return needed > 0.85 * psutil.virtual_memory().available


# What is kept


def key(wanted: Wanted, part: str, pictures: int) -> dict[str, Any]:
    """What makes a measurement the same one."""
    names = [each.name for each in contenders(wanted, part)]
    return {
        "model": wanted.label,
        "part": part,
        "pictures": pictures,
        "steps": wanted.steps if part in ("picture", "start") else None,
        "rounds": wanted.rounds,
        "contenders": names,
    }


def run(wanted: Wanted, output: Path) -> Iterator[dict[str, Any]]:
    """Measure what the file does not hold yet, and yield each measurement; it is in the file by then. UserError."""
    kept = opened(output)
    for part in wanted.parts:
        for pictures in wanted.pictures if part != "import" else wanted.pictures[:1]:
            asked = key(wanted, part, pictures)
            found = next((each for each in kept["measurements"] if each["key"] == asked), None)
            if found is None or (wanted.profile and part in NETWORKS and "profiles" not in found):
                new = measure(wanted, part, pictures)
                others = [each for each in kept["measurements"] if each["key"] != asked]
                found, kept["measurements"] = new, [*others, new]
                write_text(output, json.dumps(kept, indent=1) + "\n")
            yield found


def opened(output: Path) -> dict[str, Any]:
    """What a file of results holds, else an empty one of this machine. Raises UserError."""
    here = {"machine": machine(), "versions": versions()}
    if not output.exists():
        return {**here, "measurements": []}
    kept = read(output)
    if any(kept.get(name) != value for name, value in here.items()):
        raise UserError(
            f"{output} holds figures of another machine, or of other versions: name another --output"
        )
    return kept


def read(path: Path) -> dict[str, Any]:
    """Read a file of results. Raises UserError."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or not isinstance(kept["measurements"], list):
            raise ValueError("no measurements")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} holds no results of this benchmark ({reason(error)}): name another file"
        ) from None
    return kept


def versions() -> dict[str, str]:
    """Of what takes part, as far as it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in ("torch", "diffusers", "transformers", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
