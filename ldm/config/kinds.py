"""Tagged unions: sections of a configuration that may be one of several dataclasses, as their `kind` says.

Closed ones are written `A | B`, each a dataclass with `kind: ClassVar[str] = "a"`. An open one is a base class with
`kinds: ClassVar[dict[str, type]] = {}`, of which a subclass becomes a kind by `add_kind` (in the base's
`__init_subclass__`): so a part of the house that the base does not know can bring its own.
"""

import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

KIND = "kind"  # the key that tells
UNIONS = (Union, types.UnionType)


def add_kind(kinds: dict[str, Any], cls: Any, kind: str) -> None:
    """Make `cls` known under `kind`. Raises ValueError for one that is taken."""
    if kind in kinds:
        raise ValueError(f"the kind {kind!r} is taken by {kinds[kind].__name__}")
    cls.kind, kinds[kind] = kind, cls


def kind_of(cls: Any) -> str | None:
    """Return the kind of a dataclass that is one of several; None for any other, also one with a field of that name."""
    kind = getattr(cls, KIND, None) if isinstance(cls, type) else None
    return kind if isinstance(kind, str) and is_dataclass(cls) and KIND not in field_hints(cls) else None


def kinds_of(hint: Any) -> dict[str, Any]:
    """Return the dataclasses that a section of this type may be, by their kinds; none where it has no kind."""
    found: dict[str, Any] = {}
    for member in members_of(hint):
        if is_open(member):
            found |= vars(member)["kinds"]
        elif kind := kind_of(member):
            found[kind] = member
    return found


def is_open(hint: Any) -> bool:
    """Return whether modules that are yet to be imported may bring more kinds of a section of this type."""
    return any(isinstance(member, type) and "kinds" in vars(member) for member in members_of(hint))


def members_of(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; a type that is none is its only one."""
    return get_args(hint) if get_origin(hint) in UNIONS else (hint,)


def sections_of(hint: Any) -> Iterator[Any]:
    """Yield the dataclasses that a value of this type may be."""
    yield from kinds_of(hint).values()
    yield from (each for each in members_of(hint) if is_dataclass(each) and kind_of(each) is None)


def field_hints(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's settings, by their names."""
    hints = get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.init}
