"""The state of a run on disk: files that are whole or not there, of which the newest is gone on from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import a_few, check_finite, read_tensors, write_tensors
from ldm.errors import UserError
from ldm.training.share import like, whole

_MOMENTS = "optimizer."


def newest(folder: Path) -> Path | None:
    """The last state that was saved."""
    return max(folder.glob("state-*.safetensors"), default=None)


def path_of(folder: Path, seen: int) -> Path:
    """The file of the state after `seen` pictures."""
    return folder / f"state-{seen:012d}.safetensors"


def collect(
    model: nn.Module, averages: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, keep: bool
) -> dict[str, Tensor]:
    """All that training changes, by name: weights, buffers, averaged weights, the optimizer's moments.

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
    write_tensors(path_of(folder, seen), tensors, {"seen": str(seen), **metadata})
    for old in sorted(folder.glob("state-*.safetensors"))[: -max(keep, 2)]:
        old.unlink()


def restore(
    path: Path, model: nn.Module, averages: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put a state back. Raises UserError, before anything is changed, where it is of another model."""
    tensors, trained = read_tensors(path), trained_of(model)
    own = {f"model.{n}": p for n, p in (trained | _buffers(model)).items()}
    own |= {f"ema.{n}": p for n, p in averages.items()}
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
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(like(tensor, tensors[name]))
    for name, state in moments.items():
        parameter = trained[name]
        # A copy, out of the mapped file; only what has the parameter's shape is laid out like it.
        optimizer.state[parameter] = {
            key: _as_it_was(key, like(parameter, each) if each.shape == parameter.shape else each.clone())
            for key, each in state.items()
        }


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that belong to the weights."""
    kept: Sequence[str] = list(model.state_dict())
    return {name: each for name, each in model.named_buffers() if name in kept}


def _as_it_was(key: str, tensor: Tensor) -> Tensor | int:
    """bitsandbytes counts steps in a plain int, torch in a float tensor."""
    return int(tensor) if key == "step" and not tensor.is_floating_point() else tensor
