"""Rows of the tensors in a safetensors file, each read where it lies.

A mapped file that others cut short while it is in use ends the process (SIGBUS). What is read from for hours, such as
a cache, is not mapped, therefore: here a file that has become short costs an error.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.foreign import foreign

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredRows:
    """The tensors of one safetensors file that `read_metadata` could open; `rows.read(name, i)` is `tensor[i]`.

    names: those of its tensors.

    Raises UserError where the file can't be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        with foreign(path), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            for name, each in json.loads(file.read(size)).items():
                if name != "__metadata__":
                    dtype, shape = _DTYPES[each["dtype"]], each["shape"]
                    if not shape:
                        raise ValueError(f"{name!r} has no rows")
                    row = math.prod(shape[1:]) * dtype.itemsize
                    self._places[name] = dtype, shape, 8 + size + each["data_offsets"][0], row
        self.names = list(self._places)

    def read(self, name: str, row: int) -> Tensor:
        """Return one row, of the tensor's shape without its first dimension. Raises UserError."""
        dtype, shape, start, size = self._places[name]
        if not 0 <= row < shape[0]:
            raise UserError(f"{self.path} has {shape[0]} rows of {name!r} and none of number {row}")
        found = bytearray(size)
        with foreign(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(start + row * size)
            if file.readinto(found) < size:
                raise EOFError("it was cut short while it was in use")
        flat = torch.frombuffer(found, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return flat.view(shape[1:])
