"""What people hand to a call, as Python's own values: out of lists, arrays, tensors and the columns of tables.

numpy, torch, pandas, polars and pyarrow are known by what their objects can do, so that none of them has to be there.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, SupportsIndex

from ldm.errors import UserError

_TEXT = "give a string, or a list of at least one"
_WHOLE = "give an int, or one an image"


def texts(value: Any, name: str, most: int | None = None, gaps: bool = False) -> list[Any]:
    """The strings of an argument, one or several, in their order. Raises UserError that names the place.

    most: of an iterator, which may have no end, read one more than so many at the most. gaps: None may be among
        them.
    """
    found = _members(value, name, _TEXT, most)
    if gaps:
        found = [None if _is_gap(each) else each for each in found]
    for place, each in enumerate(found):
        if not isinstance(each, str) and not (gaps and each is None):
            alone = _TEXT if is_single(value) else "give a string there, or leave it out"
            why = "decode it first" if isinstance(each, bytes) else alone
            raise UserError(f"{_place(value, name, place)} is {_shown(each)}, which is no text: {why}")
    # Plain strings of what only derives from them, such as numpy's.
    return [None if each is None else str.__str__(each) for each in found]


def whole_numbers(value: Any, name: str, most: int | None = None) -> list[int]:
    """The ints of an argument, one or several, in their order. Raises UserError that names the place."""
    return [
        _whole(each, _place(value, name, place), _WHOLE)
        for place, each in enumerate(_members(value, name, _WHOLE, most))
    ]


def whole_number(value: SupportsIndex, name: str) -> int:
    """One int, also numpy's or a tensor's. Raises UserError."""
    return _whole(plain(value), name, "give an int")


def numbers(value: Any, count: int, name: str, kind: str) -> list[float]:
    """One number for each of `count` things of a kind, from one for all of them, or one each. Raises UserError."""
    found = plain(value)
    several = list(found) if isinstance(found, list | tuple) else [found] * count
    if len(several) != count:
        raise UserError(f"{name} has {len(several)} numbers for {count} {kind}s: give one, or one each")
    for each in several:
        if isinstance(each, bool) or not isinstance(each, int | float) or not _finite(each):
            raise UserError(f"{name} is {_shown(each)}: give a number, or one for each {kind}")
    return [float(each) for each in several]


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float is as large as
        return False


def is_single(value: Any) -> bool:
    """Whether an argument is one value, not a list of them: a tensor or an array without dimensions is."""
    return isinstance(value, str | bytes) or getattr(value, "shape", None) == () or not _iterable(value)


def plain(value: Any) -> Any:
    """Scalars and arrays of numpy, torch and tables as Python's own, which JSON can hold; also inside lists."""
    if hasattr(value, "tolist") and not isinstance(value, type):
        value = value.tolist()
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def _members(value: Any, name: str, wanted: str, most: int | None) -> Sequence[Any]:
    if isinstance(value, Mapping | set | frozenset):
        raise UserError(f"{name} is a {type(value).__name__}: give a list, in the order that is meant")
    if getattr(value, "is_meta", False):
        raise UserError(f"{name} is a tensor of the device meta, which holds no numbers")
    if len(shape := tuple(getattr(value, "shape", ()))) > 1:
        raise UserError(
            f"{name} is a {type(value).__name__} of {' x '.join(map(str, shape))}: give one dimension, such as a "
            "column of a table"
        )
    if is_single(value):
        return [plain(value)]
    if isinstance(value, bytearray | memoryview):
        raise UserError(f"{name} is a {type(value).__name__}: {wanted}")
    listed = value.tolist() if hasattr(value, "tolist") else value
    if most is not None and not hasattr(listed, "__len__"):
        listed = islice(listed, most + 1)
    return [_own(each) for each in listed]


def _is_gap(member: Any) -> bool:
    """Whether a cell of a table is empty: tables write NaN, or pandas' NA, for what is not there."""
    return type(member).__name__ in ("NAType", "NaTType") or (isinstance(member, float) and member != member)


def _own(member: Any) -> Any:
    """A member as Python's own; pyarrow's scalars have a name of their own for it."""
    return member.as_py() if hasattr(member, "as_py") else plain(member)


def _whole(value: Any, place: str, wanted: str) -> int:
    if isinstance(value, bool):
        raise UserError(f"{place} is {value}: {wanted}")
    try:
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{place} is {_shown(value)}, which is no whole number: {wanted}") from error


def _place(value: Any, name: str, place: int) -> str:
    return name if is_single(value) else f"{name}[{place}]"


def _iterable(value: Any) -> bool:
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:40]}{'...' if len(text) > 40 else ''} ({type(value).__name__})"
