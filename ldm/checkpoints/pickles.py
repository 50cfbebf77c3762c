"""Pickles, the old way to keep weights: read without running the code that may lie in them."""

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from ldm.checkpoints.paths import must_be_file
from ldm.checkpoints.pickle_sizes import check_pickle, check_tensors
from ldm.errors import UserError
from ldm.foreign import foreign


def read_pickle(path: str | Path) -> Any:
    """Return what a `.pt` or the like holds, unpickled with `weights_only=True`, which runs no code of the file.

    Raises:
        UserError: no such file, cut short, corrupt, it asks to run code, or it would unpack to far more than it is.
    """
    path = Path(path)
    must_be_file(path)
    with foreign(path, "is cut short or corrupt, get it again"):
        check_pickle(path)
        found = _unpickled(path)
        check_tensors(found, path)
    return found


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of pickle protocols that it then refuses
            if path.suffix == ".safetensors":  # a name by which torch would take it for one
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except EOFError as error:
        raise ValueError("it ends too soon") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if wanted := named[1] if named else _called_for(path):
            raise UserError(
                f"{path} is a pickle with code in it (it calls for {wanted[:100]}), which was not run: get the "
                "model as .safetensors, or, if you trust who made it, load it once elsewhere with "
                "torch.load(..., weights_only=False) and write its state dict with "
                "safetensors.torch.save_file"
            ) from error
        raise UserError(f"{path} is corrupt or no PyTorch checkpoint; get it again") from error


def _called_for(path: Path) -> str:
    """Return what a pickle would call, as far as its opcodes tell ("" for nothing); none of it is run.

    Of several, one that is not torch's own; tensors too are put together by calls.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            found = list(_names_called(io.BytesIO(archive.read(inside)))) if inside else []
    else:
        with path.open("rb") as file:
            found = list(_names_called(file))
    foreign = [each for each in found if not each.startswith(("torch.", "collections."))]
    return (foreign or found or [""])[0]


def _names_called(stream: IO[bytes]) -> Iterator[str]:
    """Yield "module.name" for each thing that the pickles at the head of a stream look up."""
    words: list[str] = []
    try:
        for _ in range(4):  # torch's old layout has its number, its version and its system before the tensors
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(words[-2:])
                elif isinstance(argument, str):
                    words.append(argument)
    except (ValueError, OverflowError, MemoryError):
        return  # the end, or no pickle at all
