"""Strict typed configuration: plain mappings (YAML, JSON, command line) to dataclasses and back.

A configuration is a dataclass whose fields are bool, int, float, str, Path, Any, Literal, a nested
dataclass, a list, tuple or dict of these, or a union (`X | None`). Nothing is guessed: an unknown key
and a wrong type are errors that name the place. An int stands for a float and a list for a tuple (YAML
and JSON have no tuples); nothing else is converted.
"""

import copy
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ldm.errors import UserError, nearest

T = TypeVar("T")
UNIONS = (Union, types.UnionType)


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-4 as a number: YAML 1.1, and so PyYAML, takes it for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `mapping`; `where` names the file in the errors.

    Raises UserError for an unknown key, a missing key or a value of the wrong type.
    """
    return _dataclass(cls, mapping, f"{where}: " if where else "", "")


def to_dict(config: Any) -> Any:
    """Return the dataclass as plain dicts, lists and scalars, ready for YAML or JSON."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config) if field.init}
    if isinstance(config, Mapping):
        return {key: to_dict(each) for key, each in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(each) for each in config]
    return str(config) if isinstance(config, Path) else config


def load_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file that holds one mapping; an empty file is an empty mapping."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise _wrong(dict, content, f"{path}: ", "")
    return content or {}


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
        if not equals:
            raise UserError(f"'{assignment}' is not an override, write key=value: train.lr=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UserError(f"the value in '{assignment}' is not valid YAML: quote it") from None
        _assign(result, path.strip(), value, cls)
    return result


def _assign(node: dict[str, Any], path: str, value: Any, hint: Any) -> None:
    keys = path.split(".")
    for depth, key in enumerate(keys, start=1):
        members = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
        hint = next((each for each in members if is_dataclass(each) or get_origin(each) is dict), None)
        hints = get_type_hints(hint) if is_dataclass(hint) else {}
        known = {*map(str, node), *hints}
        if key not in known and get_origin(hint) is not dict:  # a dict's keys are the user's own
            raise UserError(f"unknown key '{'.'.join(keys[:depth])}'{nearest(key, known)}")
        if depth == len(keys):
            node[key] = value
            return
        hint = get_args(hint)[1] if get_origin(hint) is dict else hints.get(key)
        node[key] = {} if node.get(key) is None else node[key]
        if not isinstance(node[key], dict):
            raise UserError(f"'{'.'.join(keys[:depth])}' is a value, not a section: cannot set '{path}'")
        node = node[key]


def _dataclass(cls: Any, mapping: Any, where: str, path: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise _wrong(cls, mapping, where, path)
    known = {field.name: field for field in fields(cls) if field.init}
    for key in mapping:
        if key not in known:
            raise UserError(f"{where}unknown key '{_join(path, key)}'{nearest(str(key), known)}")
    for name, field in known.items():
        if name not in mapping and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{where}missing key '{_join(path, name)}'")
    hints = get_type_hints(cls)
    return cls(**{key: _value(hints[key], mapping[key], where, _join(path, key)) for key in mapping})


def _value(hint: Any, value: Any, where: str, path: str) -> Any:
    """Check `value` against the type hint and return it, with dataclasses, tuples and floats built."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (origin is Literal and (type(value), value) in [(type(a), a) for a in args]):
        return value
    if origin in UNIONS:
        return _union(hint, value, where, path)
    if is_dataclass(hint):
        return _dataclass(hint, value, where, path)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        kinds = args if origin is tuple and args[-1] is not ... else args[:1] * len(value)
        if len(kinds) == len(value):
            return origin(_value(kinds[i], each, where, f"{path}[{i}]") for i, each in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        pairs = ((_value(args[0], key, where, path), key, each) for key, each in value.items())
        return {name: _value(args[1], each, where, _join(path, key)) for name, key, each in pairs}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(hint, value, where, path)


def _union(hint: Any, value: Any, where: str, path: str) -> Any:
    """The first member that takes `value`; its very type comes before one it could stand for."""
    for member in sorted(get_args(hint), key=lambda member: type(value) is not member):
        try:
            return _value(member, value, where, path)
        except UserError:
            if is_dataclass(member) and isinstance(value, Mapping):
                raise  # a section was meant: this message names the key inside it
    raise _wrong(hint, value, where, path)


def _wrong(hint: Any, value: Any, where: str, path: str) -> UserError:
    close = nearest(value, map(str, get_args(hint))) if isinstance(value, str) else ""
    shown = f"{repr(value)[:60]} ({type(value).__name__})"
    place = f"'{path}'" if path else "the configuration"
    return UserError(f"{where}{place} is {shown}, expected {_named(hint)}{close}")


def _named(hint: Any) -> str:
    """The type as a user reads it: int, list[float], int or none, one of 'a', 'b'."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) in UNIONS:
        return " or ".join(map(_named, get_args(hint)))
    if is_dataclass(hint) or hint is dict:
        return "keys and values"
    return "none" if hint is type(None) else str(hint) if get_origin(hint) else hint.__name__


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
