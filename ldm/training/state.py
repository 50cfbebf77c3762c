"""The state of a run on disk: files that are whole or not there, of which the newest is gone on from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import a_few, check_finite, read_metadata, read_tensors, write_tensors
from ldm.errors import UserError
from ldm.files import writing
from ldm.foreign import one_line, parse_json
from ldm.training.distributed import like, whole
from ldm.training.optimization import odd_moments

_MOMENTS = "optimizer."
_NAME = re.compile(r"state-[0-9]{12,}\.safetensors")


def saved(folder: Path) -> list[Path]:
    """Return the states in a folder, the newest first. A file of another name, such as a copy of one's own, is none."""
    return sorted(
        (each for each in folder.glob("state-*.safetensors") if _NAME.fullmatch(each.name)), reverse=True
    )


def newest(folder: Path) -> Path | None:
    """Return the last state that was saved."""
    return next(iter(saved(folder)), None)


def seen_by(path: Path) -> int:
    """Return how many pictures a state has seen, by its name."""
    return int(path.stem.removeprefix("state-"))


def path_of(folder: Path, seen: int) -> Path:
    """Return the file of the state after `seen` pictures."""
    return folder / f"state-{seen:012d}.safetensors"


def collect(
    model: nn.Module, averages: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, keep: bool
) -> dict[str, Tensor]:
    """Return all that training changes, by name: weights, buffers, averaged weights, the optimizer's moments.

    What is frozen is not in it. Of sharded weights, which all processes must ask for together, those that `keep`
    get the whole, on the CPU; the others get nothing.
    """
    trained = trained_of(model)
    tensors = {f"model.{name}": each.detach() for name, each in trained.items()}
    tensors |= {f"model.{name}": each for name, each in _buffers(model).items()}
    tensors |= {f"ema.{name}": each for name, each in averages.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():  # none where nothing ever reached it
            tensors[f"{_MOMENTS}{name}.{key}"] = torch.as_tensor(value)
    whole_ones = ((name, whole(each, keep)) for name, each in tensors.items())
    return {name: each for name, each in whole_ones if keep}


def fault(tensors: Mapping[str, Tensor]) -> str:
    """Why a state must not be saved, "" if it may: a run can't go on from NaN or infinity."""
    try:
        check_finite(tensors, "the state")
    except UserError as error:
        return str(error)
    return ""


def write(
    folder: Path, seen: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], keep: int
) -> None:
    """Save a state, and then remove all but the `keep` newest.

    At least two stay: whether this one is any good shows with the next loss, as it did for the one before.
    """
    counted = {"seen": str(seen), "tensors": str(len(tensors)), **metadata}
    write_tensors(path_of(folder, seen), tensors, counted)
    for old in saved(folder)[max(keep, 2) :]:
        with writing(old):
            old.unlink(missing_ok=True)


@dataclass(frozen=True)
class Saved:
    """A state that was read and checked. tensors: weights, buffers and averages by name. moments: by parameter, by key.

    seen: pictures. best: the least loss. scaler: of float16's gradients, {} without one.
    """

    path: Path
    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    seen: int
    best: float
    scaler: dict[str, Any]


def read(
    path: Path,
    model: nn.Module,
    averages: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    frozen: str,
) -> Saved:
    """Read a state for this model and optimizer; nothing is changed.

    Every name, shape and dtype is compared first: an optimizer writes as far as a parameter goes, whatever the size of
    its moments is. frozen: the fingerprint of what is not trained.

    Raises:
        UserError: it is cut short or damaged, or of another model, or of other frozen weights.
    """
    tensors, metadata = read_tensors(path), read_metadata(path)
    seen, best, scaler = _counters(path, metadata)
    if metadata.get("frozen") != frozen:
        raise UserError(
            f"{path} was trained on top of other frozen weights: give another output, or delete {path.parent}"
        )
    if metadata.get("tensors", str(len(tensors))) != str(len(tensors)):
        raise UserError(f"{path} is damaged: it has {len(tensors)} tensors and says {metadata['tensors']}")
    trained = trained_of(model)
    own = _own(model, averages)
    moments: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith(_MOMENTS)]:
        owner, _, key = name.removeprefix(_MOMENTS).rpartition(".")
        moments.setdefault(owner, {})[key] = tensors.pop(name)
    differ = sorted((own.keys() ^ tensors.keys()) | (moments.keys() - trained.keys()))
    differ += [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if differ:
        raise UserError(
            f"{path} is of a model with other weights, or others of them were trained ({a_few(differ)}); this run "
            f"began otherwise: give another output, or delete {path.parent}"
        )
    odd = [f"{name} is {tensors[name].dtype}" for name in own if own[name].dtype != tensors[name].dtype]
    for name, state in moments.items():
        odd += [f"{_MOMENTS}{name}.{each}" for each in odd_moments(optimizer, trained[name], state, seen)]
    if odd:
        raise UserError(f"{path} is damaged, or of another loop.optimizer.kind: {a_few(odd)}")
    check_finite({**tensors, **{f"{n}.{k}": t for n, some in moments.items() for k, t in some.items()}}, path)
    return Saved(path, tensors, moments, seen, best, scaler)


def _counters(path: Path, metadata: Mapping[str, str]) -> tuple[int, float, dict[str, Any]]:
    """Pictures seen, best loss and scaler, as the file says. Raises UserError where they can't be."""
    try:
        seen, best = int(metadata["seen"]), float(metadata["best"])
        scaler = parse_json(metadata["scaler"], path)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged, or no state of a run: {one_line(error)}") from None
    if path != path_of(path.parent, seen) or best != best:
        raise UserError(
            f"{path} is damaged, or another state's copy: it says {seen} pictures, best loss {best}"
        )
    kinds = {"scale": float, "growth_factor": float, "backoff_factor": float}
    kinds |= {"growth_interval": int, "_growth_tracker": int}
    sane = isinstance(scaler, dict) and all(
        type(scaler.get(key)) is kind and 0 <= scaler[key] < 2.0**63 for key, kind in kinds.items()
    )
    if scaler != {} and not (sane and scaler.keys() == kinds.keys() and scaler["scale"] > 0):
        raise UserError(f"{path} is damaged: its gradient scaler can't be")
    return seen, best, scaler


def restore(
    state: Saved, model: nn.Module, averages: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put a state back that was `read` for this model."""
    trained = trained_of(model)
    with torch.no_grad():
        for name, tensor in _own(model, averages).items():
            tensor.copy_(like(tensor, state.tensors[name]))
    for name, moments in state.moments.items():
        parameter = trained[name]
        # A copy, out of the mapped file, where the parameter is: a fused optimizer wants its count of steps there, too.
        # Only what has the parameter's shape is laid out like it.
        optimizer.state[parameter] = {
            key: _as_it_was(
                key,
                like(parameter, each)
                if each.shape == parameter.shape
                else each.to(parameter.device, copy=True),
            )
            for key, each in moments.items()
        }


def _own(model: nn.Module, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a state puts back, under the names that it has there."""
    own = {f"model.{n}": p for n, p in (trained_of(model) | _buffers(model)).items()}
    return own | {f"ema.{n}": p for n, p in averages.items()}


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that belong to the weights."""
    kept: Sequence[str] = list(model.state_dict())
    return {name: each for name, each in model.named_buffers() if name in kept}


def _as_it_was(key: str, tensor: Tensor) -> Tensor | int:
    """bitsandbytes counts steps in a plain int, torch in a float tensor."""
    return int(tensor) if key == "step" and not tensor.is_floating_point() else tensor
