"""Tensors and text on disk: read without running foreign code, written whole or not at all (see `ldm.files`)."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.kinds import weights_kind
from ldm.checkpoints.paths import must_be_file, readable
from ldm.checkpoints.pickles import read_pickle
from ldm.errors import UserError
from ldm.files import flush_to_disk as flush_to_disk  # these are known by this module's name too
from ldm.files import unwritable as unwritable
from ldm.files import whole_file as whole_file
from ldm.files import write_bytes as write_bytes
from ldm.files import write_text as write_text
from ldm.foreign import LARGEST_TEXT, foreign, json_object, one_line, read_plain

INDEX = ".index.json"
# What trainers put around the weights: Lightning, DeepSpeed, BasicSR, timm and plain habit.
_WRAPPINGS = ("state_dict", "model", "module", "params_ema", "params", "model_state_dict", "weights")


def a_few(names: list[str], n: int = 3) -> str:
    """Return the first `n` names, joined, and how many more there are."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more


# Reading


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of one checkpoint file by name, on the CPU, in the dtypes they were stored in.

    What the file is, its first bytes say and not its name. A safetensors file is memory-mapped: nothing is read
    before it is used. A pickle is unpickled with `weights_only=True`, which runs no code of the file, and a
    `{"state_dict": ...}` or the like around the tensors is taken off. A name that ends in `.json` is the index of a
    sharded checkpoint, whose shards lie beside it.

    Raises:
        UserError: no such file, cut short, corrupt, of another kind, a pickle that asks to run code, or no tensors
            inside.
    """
    path = Path(path)
    must_be_file(path)
    if path.name.endswith(".json"):
        return _read_shards(path)
    return _read_safetensors(path) if weights_kind(path) == "safetensors" else _read_pickle(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the text metadata in a safetensors file's header; {} for a pickle, which has none."""
    path = Path(path)
    must_be_file(path)
    if path.name.endswith(".json") or weights_kind(path) != "safetensors":
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_text(path: str | Path, most: int = LARGEST_TEXT) -> str:
    """Return a UTF-8 text file; UserError if it is not there, not text, or of more than `most` bytes."""
    path = Path(path)
    must_be_file(path)
    with foreign(path, "can't be read as text"):
        return read_plain(path, most).decode()


def file_in(path: str | Path, name: str) -> Path:
    """Return `path`, or where that is a folder the file of this name in it. Raises UserError for an odd path."""
    with readable(path):
        return Path(path) / name if Path(path).is_dir() else Path(path)


def file_hash(path: str | Path) -> str:
    """Return the first ten hex digits of a file's SHA-256: the name by which adapters are looked up elsewhere too."""
    path = Path(path)
    must_be_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    size = path.stat().st_size
    broken = f"is not a whole safetensors file ({size} bytes): it is cut short or corrupt, get it again"
    with foreign(path, broken), safe_open(path, framework="pt", device="cpu") as file:
        yield file


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    check_plain(tensors, path)
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    found = read_pickle(path)
    for _ in range(4):  # not for ever: a dictionary may hold itself
        if not isinstance(found, dict):
            break
        bare = any(isinstance(each, Tensor) for each in found.values())
        around = _WRAPPINGS[:1] if bare else _WRAPPINGS
        found = next((found[name] for name in around if isinstance(found.get(name), dict)), found)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors by name")
    tensors = {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors (its entries: {a_few(list(map(str, found))) or 'none'})")
    check_plain(tensors, path)
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    placed = json_object(read_text(index), index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(each, str) for each in placed.values()):
        raise UserError(
            f'{index} is no index of a sharded checkpoint: "weight_map" must give each tensor its file\'s name'
        )
    for shard in placed.values():
        _must_lie_beside(index, shard)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(placed.values())):
        tensors |= read_tensors(index.parent / shard)
    if absent := sorted(set(placed) - set(tensors)):
        raise UserError(f"{index} promises {len(absent)} tensors that its shards lack: {a_few(absent)}")
    return tensors


def _must_lie_beside(index: Path, shard: str) -> None:
    """Raise UserError for a shard outside of its index's folder, and for another index."""
    parts = shard.replace("\\", "/").split("/")  # Windows reads both as ends of folders' names
    if ".." in parts or parts[0] == "" or ":" in shard or "\0" in shard or shard.endswith(".json"):
        raise UserError(
            f"{index} names the shard {shard[:100]!r}: a shard is a file of weights in its folder"
        )


# Checking and loading


def check_plain(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise a UserError naming the first tensors that are no plain array of real numbers in memory."""
    odd = {name: what for name, each in tensors.items() if (what := _oddity(each))}
    if odd:
        kinds = ", ".join(sorted(set(odd.values())))
        raise UserError(f"{where}: {len(odd)} of {len(tensors)} tensors are {kinds} ({a_few(list(odd))})")


def _oddity(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_complex():
        return "complex"
    return "without numbers" if tensor.is_meta else ""


def check_finite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise a UserError naming the first tensors that hold NaN or infinity.

    One pass and no copies for healthy weights: a NaN or an infinity survives a sum. A sum that is not finite
    may still be an overflow, so only then is each number looked at.
    """
    bad = [name for name, each in tensors.items() if each.is_floating_point() and not _is_finite(each)]
    if bad:
        raise UserError(f"{where}: NaN or infinity in {len(bad)} of {len(tensors)} tensors ({a_few(bad)})")


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # the 8-bit floats know no sum
    return bool(wide.sum(dtype=torch.float32).isfinite()) or bool(wide.isfinite().all())


def load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path, finite: bool = True
) -> None:
    """Put `tensors` into `module`, every one of them and no other, without a copy.

    Build the module under `torch.device("meta")`: its parameters become the given tensors themselves
    (`assign`), in their own dtype and, for safetensors, still memory-mapped.

    Args:
        module: the network; its parameter names and shapes are what is demanded.
        tensors: the weights by name.
        where: the file or folder they came from, for the error.
        finite: also refuse NaN and infinity (reads every weight once).

    Raises:
        UserError: names missing or left over, other shapes, whole numbers for real ones, NaN: one line that
            counts them and names a few.
    """
    own = module.state_dict()
    wanted = {name: tuple(each.shape) for name, each in own.items()}
    given = {name: tuple(each.shape) for name, each in tensors.items()}
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    other = [
        f"{name} is {given[name]} for {shape}"
        for name, shape in wanted.items()
        if given.get(name, shape) != shape
    ]
    kinds = [
        f"{name} is {tensors[name].dtype}"
        for name, each in own.items()
        if name in given and tensors[name].is_floating_point() != each.is_floating_point()
    ]
    found = {
        "missing": missing,
        "not of this network": extra,
        "of another shape": other,
        "of another kind of number": kinds,
    }
    faults = [f"{len(names)} {what} ({a_few(names)})" for what, names in found.items() if names]
    if faults:
        network = type(module).__name__
        raise UserError(f"{where}: weights of another family, not of this {network}: {'; '.join(faults)}")
    if finite:
        check_finite(tensors, where)
    module.load_state_dict(dict(tensors), strict=True, assign=True)


# Writing


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    Tied tensors (two names, one storage) are each written in full, so that every name is in the file. The
    metadata always says `format: pt`, without which transformers refuses a file.

    Raises:
        UserError: the place can't be written to, or its name doesn't end in .safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"can't write {path}: weights are written as .safetensors only")
    with whole_file(path) as temporary:
        try:
            save_file(_untied(tensors), temporary, metadata={**(metadata or {}), "format": "pt"})
        except SafetensorError as error:  # safetensors' wrapping of the system's own error
            raise OSError(one_line(error)) from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort a safetensors file's metadata, which the library orders at random: equal models, equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share a storage."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        each = tensor.detach().cpu().contiguous()
        storage = each.untyped_storage()
        whole = storage.nbytes() == each.nbytes and storage.data_ptr() not in seen
        apart[name] = each if whole or each.numel() == 0 else each.clone()
        seen.add(storage.data_ptr())
    return apart
