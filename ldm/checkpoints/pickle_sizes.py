"""What a pickle would cost, seen before it is read: zip members, opcodes; and after, what its tensors would take.

A few bytes can stand for gigabytes, or for work without end: deflated zeros, members that share their bytes, tuples of
tuples that are hashed as keys, tensors of stride 0. PyTorch's own files hold nothing of the kind: their zip members are
not compressed, their tuples are two or three deep, and a storage has the bytes of its tensors.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ldm.errors import UserError

_SMALL = 2**20  # bytes that any file may unpack to
_SHARED = 8  # how often the bytes of a file may stand in its tensors: averages share theirs with the weights
_OPCODES = 1_000_000  # some 30,000 tensors
_DEEPEST = 8  # tuples within tuples
_PICKLES = 5  # torch's old layout: its number, its version, its system, the tensors, their keys
_FILLING = ("builtins bytearray", "__builtin__ bytearray")  # it fills as many bytes as it is told


def check_pickle(path: Path) -> None:
    """Raise UserError for a pickle, in a zip archive or alone, that would unpack to more than its size is worth."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(_PICKLES):
                if not _check_opcodes(file, path):
                    return
        return
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (whole := sum(each.file_size for each in members)) > size + _SMALL:
            raise UserError(
                f"{path} would unpack its {size:,} bytes to {whole:,}: PyTorch compresses nothing, so it is no "
                "checkpoint of its making"
            )
        for each in members:
            if each.filename.endswith("data.pkl"):
                _check_opcodes(io.BytesIO(archive.read(each)), path)


def _check_opcodes(stream: IO[bytes], path: Path) -> bool:
    """Walk through one pickle as a reader would, with the depth of tuples in place of values; whether it was whole."""
    stack: list[int | None] = []  # None is a mark
    memo: dict[int, int] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > _OPCODES:
                raise UserError(f"{path} holds a pickle of more than {_OPCODES:,} steps, which is not read")
            if opcode.name == "GLOBAL" and argument in _FILLING:
                raise UserError(f"{path} is a pickle that calls for bytearray, as no checkpoint does")
            depth = _step(opcode, argument, stack, memo)
            if depth > _DEEPEST:
                raise UserError(f"{path} holds tuples within tuples, deeper than any checkpoint has them")
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
        return False  # no pickle, or a damaged one: its reader says what is wrong
    return True


def _step(opcode: Any, argument: Any, stack: list[int | None], memo: dict[int, int]) -> int:
    """Do to the stack and the memo what an opcode does; return the depth of what it puts on the stack."""
    if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if opcode.name == "MEMOIZE" else argument] = stack[-1] or 0
        return 0
    if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
        return 0
    if opcode.name == "DUP":
        stack.append(stack[-1])
        return 0
    taken: list[int] = []
    for kind in reversed(opcode.stack_before):
        if kind is pickletools.stackslice:
            while stack[-1] is not None:
                taken.append(stack.pop() or 0)
        else:
            taken.append(stack.pop() or 0)
    deepest = max(taken, default=0)
    # What a call returns may hold what it was given; a list or a mapping is never hashed.
    depth = deepest + 1 if opcode.name.startswith("TUPLE") else deepest if opcode.name == "REDUCE" else 0
    for kind in opcode.stack_after:
        stack.append(None if kind is pickletools.markobject else depth)
    return depth


def check_tensors(found: Any, path: Path) -> None:
    """Raise UserError for tensors, anywhere in what a pickle held, that would take far more bytes than the file has."""
    size = path.stat().st_size
    taken = sum(each.numel() * each.element_size() for each in _tensors_in(found))
    if taken > _SHARED * size + _SMALL:
        raise UserError(
            f"{path} has {size:,} bytes, and its tensors would take {taken:,}: they repeat a few numbers"
        )


def _tensors_in(found: Any) -> Iterator[Tensor]:
    """Each tensor once for every place that it stands in; a container that holds itself is entered once."""
    seen: set[int] = set()
    waiting = [found]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend(each.values() if isinstance(each, dict) else each)
