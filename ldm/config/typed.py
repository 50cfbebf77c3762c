"""Strict typed configuration: plain mappings (YAML, JSON, command line) to dataclasses and back.

A configuration is a dataclass whose fields are bool, int, float, str, Path, Any, Literal, a nested
dataclass, a list, tuple or dict of these, or a union (`X | None`); of dataclasses that exclude each other the key
`kind` names one (see kinds.py). Nothing is guessed: an unknown key and a wrong type are errors that name the place. An
int stands for a float, a list for a tuple (YAML and JSON have no tuples), and a bool for the word that YAML took for
one (precision: no), where that is a choice; nothing else is converted. A class may say
what its old keys are called now, in `renamed: ClassVar[dict[str, str]]`.
"""

import copy
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from ldm.config.hints import unknown_key
from ldm.config.kinds import KIND, UNIONS, field_hints, is_open, kind_of, kinds_of, members_of
from ldm.config.yaml_files import load_mapping, read_yaml
from ldm.errors import UserError, nearest, printable

T = TypeVar("T")
_YAML_BOOLS = {"no": False, "off": False, "yes": True, "on": True}  # bare words that YAML 1.1 reads as a bool


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `mapping`; `where` names the file in the errors.

    Raises UserError for an unknown key, a missing key or a value of the wrong type.
    """
    return _value(cls, mapping, _Place(f"{where}: " if where else "", cls))


def to_dict(config: Any) -> Any:
    """Return the dataclass as plain dicts, lists and scalars, ready for YAML or JSON."""
    if is_dataclass(config):
        values = {each.name: to_dict(getattr(config, each.name)) for each in fields(config) if each.init}
        kind = kind_of(type(config))
        return values if kind is None else {KIND: kind, **values}
    if isinstance(config, Mapping):
        return {key: to_dict(each) for key, each in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(each) for each in config]
    return str(config) if isinstance(config, Path) else config


def load_yaml(path: str | Path, cls: type[T], overrides: Iterable[str] = ()) -> T:
    """Read the YAML file at `path` into the dataclass `cls`, with the overrides ("a.b=3") applied."""
    return from_dict(cls, override(load_mapping(path), overrides, cls), where=str(path))


def override(mapping: Mapping[str, Any], assignments: Iterable[str], cls: Any = None) -> dict[str, Any]:
    """Return a copy of `mapping` with each "a.b=value" set; the value is read as YAML.

    The keys allowed on a path are those that `mapping` has there and, where `cls` is given, the fields
    of the dataclass that stands there: so a field that the mapping leaves at its default can be set.
    """
    result = copy.deepcopy(dict(mapping))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise UserError(
                f"'{assignment}' is not an override, write key=value without spaces: loop.pictures=1000"
            )
        shown = printable(assignment if len(assignment) < 100 else f"{assignment[:100]}...")
        value = read_yaml(text, f"the value in '{shown}'")
        _assign(result, path.strip(), value, cls)
    return result


@dataclass(frozen=True)
class _Place:
    """Where a value stands, for messages: in which file, in a configuration of which class, under which keys."""

    where: str
    root: Any = None
    path: str = ""

    def under(self, key: Any) -> "_Place":
        return replace(self, path=f"{self.path}.{key}" if self.path else str(key))

    def item(self, index: int) -> "_Place":
        return replace(self, path=f"{self.path}[{index}]")


def _assign(node: dict[str, Any], path: str, value: Any, hint: Any) -> None:
    keys, root = path.split("."), hint
    for depth, key in enumerate(keys, start=1):
        hints, free = _keys_of(hint, node)
        if free is None and key not in {*map(str, node), *hints}:
            written = ".".join(keys[:depth])
            raise UserError(unknown_key(written, path, hint, {*map(str, node), *hints}, root))
        if depth == len(keys):
            node[key] = value
            return
        hint = hints.get(key, free)
        node[key] = {} if node.get(key) is None else node[key]
        if not isinstance(node[key], dict):
            raise UserError(f"'{'.'.join(keys[:depth])}' is a value, not a section: cannot set '{path}'")
        node = node[key]


def _keys_of(hint: Any, node: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The types of a section's values by key; and the type of all others, where the keys are the user's own.

    Of several kinds of section those of the one that `node` names, or of all where it names none.
    """
    if kinds := kinds_of(hint):
        named = kinds.get(str(node.get(KIND)))
        classes = [named] if named else list(kinds.values())
        return {KIND: str} | {name: each for cls in classes for name, each in field_hints(cls).items()}, None
    for member in members_of(hint):
        if is_dataclass(member):
            return field_hints(member), None
        if get_origin(member) is dict:
            return {}, get_args(member)[1]
    return {}, None


def _dataclass(cls: Any, mapping: Any, at: _Place, hint: Any) -> Any:
    """hint: the type of the section, of which `cls` is a member."""
    if not isinstance(mapping, Mapping):
        raise _wrong(cls, mapping, at)
    known = {field.name: field for field in fields(cls) if field.init}
    given = {key: each for key, each in mapping.items() if key != KIND or kind_of(cls) is None}
    for key in given:
        if key not in known:
            path = at.under(key).path
            raise UserError(f"{at.where}{unknown_key(path, path, hint, known, at.root)}")
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{at.where}missing key '{at.under(name).path}'")
    hints = field_hints(cls)
    return cls(**{key: _value(hints[key], each, at.under(key)) for key, each in given.items()})


def _tagged(kinds: Mapping[str, Any], mapping: Mapping[Any, Any], at: _Place, hint: Any) -> Any:
    """The section that the mapping's `kind` names."""
    kind = mapping.get(KIND)
    known = ", ".join(kinds)
    if kind is None:
        raise UserError(f"{at.where}'{at.path}' needs a kind: one of {known}")
    if not isinstance(kind, str) or kind not in kinds:
        close = nearest(str(kind), kinds)
        if isinstance(kind, str) and is_open(hint) and not close:
            close = " (is the module that brings it imported?)"
        raise UserError(f"{at.where}'{at.path}.{KIND}' is {kind!r:.60}, expected one of {known}{close}")
    return _dataclass(kinds[kind], mapping, at, hint)


def _value(hint: Any, value: Any, at: _Place) -> Any:
    """Check `value` against the type hint and return it, with dataclasses, tuples and floats built."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        for each in args:
            same = (type(value), value) == (type(each), each)
            if same or (type(value) is bool and _YAML_BOOLS.get(each) is value):
                return each
    if type(value) is int and value.bit_length() > 64 and {int, float} & {hint, *args}:
        raise UserError(f"{at.where}'{at.path}' is a number of more than 64 bits: give a smaller one")
    if isinstance(value, Mapping) and (kinds := kinds_of(hint)):
        return _tagged(kinds, value, at, hint)
    if origin in UNIONS:
        return _union(hint, value, at)
    if is_dataclass(hint):
        return _dataclass(hint, value, at, hint)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        types = args if origin is tuple and args[-1] is not ... else args[:1] * len(value)
        if len(types) == len(value):
            return origin(_value(types[i], each, at.item(i)) for i, each in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        pairs = ((_value(args[0], key, at), key, each) for key, each in value.items())
        return {name: _value(args[1], each, at.under(key)) for name, key, each in pairs}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(hint, value, at)


def _union(hint: Any, value: Any, at: _Place) -> Any:
    """The first member that takes `value`; its very type comes before one it could stand for."""
    for member in sorted(get_args(hint), key=lambda member: type(value) is not member):
        try:
            return _value(member, value, at)
        except UserError:
            if is_dataclass(member) and isinstance(value, Mapping):
                raise  # a section was meant: this message names the key inside it
    raise _wrong(hint, value, at)


def _wrong(hint: Any, value: Any, at: _Place) -> UserError:
    close = nearest(value, map(str, _choices(hint))) if isinstance(value, str) else ""
    place = f"'{at.path}'" if at.path else "the configuration"
    return UserError(f"{at.where}{place} is {_shown(value)}, expected {_named(hint)}{close}")


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)[:60]} ({type(value).__name__})"


def _choices(hint: Any) -> list[Any]:
    """The values that a Literal, or one in a union, lists."""
    if get_origin(hint) in UNIONS:
        return [each for member in get_args(hint) for each in _choices(member)]
    return list(get_args(hint)) if get_origin(hint) is Literal else []


def _named(hint: Any) -> str:
    """The type as a user reads it: int, list[float], int or none, one of 'a', 'b'."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) in UNIONS:
        return " or ".join(dict.fromkeys(map(_named, get_args(hint))))
    if is_dataclass(hint) or kinds_of(hint) or hint is dict:
        return "keys and values"
    return "none" if hint is type(None) else str(hint) if get_origin(hint) else hint.__name__
