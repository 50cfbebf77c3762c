"""Strict typed configuration: plain mappings (YAML, JSON, command line) to dataclasses and back.

A configuration is a dataclass whose fields are bool, int, float, str, Path, Any, Literal, a nested
dataclass, a list, tuple or dict of these, or a union (`X | None`). Nothing is guessed: an unknown key
and a wrong type are errors that name the place. An int stands for a float and a list for a tuple (YAML
and JSON have no tuples); nothing else is converted.

A class with `kinds`, dataclasses by name, is a tagged union: the section's `kind` says which of them it is,
and the others' keys are unknown there. A dataclass may have `renamed`, new names of keys by the old ones.
"""

import copy
import re
import reprlib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ldm.errors import UserError, nearest, printable
from ldm.foreign import DEEPEST, LONGEST_NUMBER, foreign, one_line, read_plain

T = TypeVar("T")
UNIONS = (Union, types.UnionType)
_KINDS = (".yaml", ".yml", ".json")  # of files that hold a configuration
_CONFIGS = "configs"  # where a checkout has its own
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


_LARGEST = 2**18  # bytes of a configuration; PyYAML takes seconds for more
_MOST = 100_000  # values in one, those that aliases repeat counted as often as they stand there


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-4 as a number: YAML 1.1, and so PyYAML, takes it for a string.

    A few lines of aliases to aliases unfold to more values than any memory holds, and an alias to what it stands in
    never ends: so what is composed is counted before anything is made of it.
    """

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > DEEPEST:  # PyYAML looks through all open brackets at every token
            raise ValueError("it is nested too deeply")
        super().fetch_flow_collection_start(TokenClass)

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return self.construct_document(node)


def _check_nodes(root: yaml.Node) -> None:
    """Raise ValueError for too many or too deeply nested values, and for numbers that no float holds."""
    level, count = [root], 0
    for _ in range(DEEPEST):
        inner: list[yaml.Node] = []
        for node in level:
            if isinstance(node, yaml.MappingNode):
                inner.extend(each for pair in node.value for each in pair)
            elif isinstance(node, yaml.SequenceNode):
                inner.extend(node.value)
            elif node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
                raise ValueError(f"it holds a number of {len(node.value)} digits")
            if count + len(inner) > _MOST:
                raise ValueError(f"with its aliases unfolded it holds more than {_MOST:,} values")
        count += len(inner)
        level = inner
        if not level:
            return
    raise ValueError("it is nested too deeply, or an alias in it stands for what it is a part of")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `mapping`; `where` names the file in the errors.

    Raises UserError for an unknown key, a missing key or a value of the wrong type.
    """
    return _dataclass(cls, mapping, _Place(f"{where}: " if where else "", cls))


def to_dict(config: Any) -> Any:
    """Return the dataclass as plain dicts, lists and scalars, ready for YAML or JSON."""
    if is_dataclass(config):
        tag = {"kind": getattr(config, "kind")} if hasattr(config, "kinds") else {}  # noqa: B009 (a ClassVar)
        return tag | {
            field.name: to_dict(getattr(config, field.name)) for field in fields(config) if field.init
        }
    if isinstance(config, Mapping):
        return {key: to_dict(each) for key, each in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(each) for each in config]
    return str(config) if isinstance(config, Path) else config


def load_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file that holds one mapping; an empty file is an empty mapping.

    Raises UserError, which for a file that is not there names those of about that name.
    """
    try:
        text = read_plain(path, _LARGEST).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no configuration {path}{_files_like(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        if Path(path).is_dir():
            inside = ", ".join(map(str, _configurations([Path(path)]))) or "it holds none"
            raise UserError(
                f"{path} is a folder, not a configuration: give a file of it ({inside})"
            ) from None
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot read the configuration {path}: {reason}") from None
    content = _yaml(text, f"the configuration {path}")
    if not isinstance(content, dict | None):
        raise _wrong(dict, content, _Place(f"{path}: "))
    return content or {}


def _yaml(text: str, where: str) -> Any:
    """What a YAML text holds. Raises UserError that names `where`, whatever PyYAML raises about it."""
    with foreign(where, "is not valid YAML", advice="; quote what is text"):
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError as error:  # of several lines
            raise ValueError(" ".join(str(error).split())) from error


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
        value = _yaml(text, f"the value in '{shown}'")
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
        members = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
        tagged = any(hasattr(each, "kinds") for each in members)
        members = [_chosen(each, node) for each in members]
        hint = next((each for each in members if is_dataclass(each) or get_origin(each) is dict), None)
        hints = _hints(hint) if is_dataclass(hint) else {}
        known = {*map(str, node), *hints, *(["kind"] if tagged else [])}
        if key not in known and get_origin(hint) is not dict:  # a dict's keys are the user's own
            raise UserError(f"unknown key '{'.'.join(keys[:depth])}'{_keys_like(key, path, known, root)}")
        if depth == len(keys):
            node[key] = value
            return
        hint = get_args(hint)[1] if get_origin(hint) is dict else hints.get(key)
        node[key] = {} if node.get(key) is None else node[key]
        if not isinstance(node[key], dict):
            raise UserError(f"'{'.'.join(keys[:depth])}' is a value, not a section: cannot set '{path}'")
        node = node[key]


def _chosen(hint: Any, mapping: Any) -> Any:
    """The kind of a tagged union that a section is of; any other hint is itself."""
    kinds = getattr(hint, "kinds", None)
    if kinds is None or not isinstance(mapping, Mapping):
        return hint
    kind = mapping.get("kind")
    return kinds.get(kind, hint) if isinstance(kind, str) else hint


def _tagged(hint: Any, value: Any, at: _Place) -> Any:
    """A section of a tagged union. Raises UserError where its kind is not said, or unknown."""
    if not isinstance(value, Mapping):
        raise _wrong(dict, value, at)
    kind = value.get("kind")
    known = ", ".join(hint.kinds) or "those of modules that are imported, and none is that brings one"
    if kind is None:
        raise UserError(f"{at.where}'{at.path}' needs a kind: one of {known}")
    if not isinstance(kind, str) or kind not in hint.kinds:
        close = nearest(str(kind), hint.kinds)
        raise UserError(f"{at.where}'{at.path}.kind' is {kind!r:.60}, expected one of {known}{close}")
    rest = {key: each for key, each in value.items() if key != "kind"}
    return _dataclass(hint.kinds[kind], rest, at)


def _hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _dataclass(cls: Any, mapping: Any, at: _Place) -> Any:
    if not isinstance(mapping, Mapping):
        raise _wrong(cls, mapping, at)
    known = {field.name: field for field in fields(cls) if field.init}
    for key in mapping:
        if key not in known:
            path = at.under(key).path
            if now := getattr(cls, "renamed", {}).get(key):
                raise UserError(f"{at.where}'{path}' is called {at.under(now).path} now")
            raise UserError(
                f"{at.where}unknown key '{path}'{_keys_like(str(key), path, set(known), at.root)}"
            )
    for name, field in known.items():
        if name not in mapping and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{at.where}missing key '{at.under(name).path}'")
    hints = _hints(cls)
    return cls(**{key: _value(hints[key], mapping[key], at.under(key)) for key in mapping})


def _value(hint: Any, value: Any, at: _Place) -> Any:
    """Check `value` against the type hint and return it, with dataclasses, tuples and floats built."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (origin is Literal and (type(value), value) in [(type(a), a) for a in args]):
        return value
    if type(value) is int and value.bit_length() > 64 and {int, float} & {hint, *args}:
        raise UserError(f"{at.where}'{at.path}' is a number of more than 64 bits: give a smaller one")
    if origin in UNIONS:
        return _union(hint, value, at)
    if hasattr(hint, "kinds"):
        return _tagged(hint, value, at)
    if is_dataclass(hint):
        return _dataclass(hint, value, at)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        kinds = args if origin is tuple and args[-1] is not ... else args[:1] * len(value)
        if len(kinds) == len(value):
            return origin(_value(kinds[i], each, at.item(i)) for i, each in enumerate(value))
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
            if (is_dataclass(member) or hasattr(member, "kinds")) and isinstance(value, Mapping):
                raise  # a section was meant: this message names the key inside it
    raise _wrong(hint, value, at)


def _wrong(hint: Any, value: Any, at: _Place) -> UserError:
    close = nearest(value, map(str, _choices(hint))) if isinstance(value, str) else ""
    shown = f"{reprlib.repr(value)[:60]} ({type(value).__name__})"
    place = f"'{at.path}'" if at.path else "the configuration"
    return UserError(f"{at.where}{place} is {shown}, expected {_named(hint)}{close}")


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
        return " or ".join(map(_named, get_args(hint)))
    if is_dataclass(hint) or hasattr(hint, "kinds") or hint is dict:
        return "keys and values"
    return "none" if hint is type(None) else str(hint) if get_origin(hint) else hint.__name__


# What an unknown name may have meant


def _keys_like(key: str, path: str, here: set[str], root: Any) -> str:
    """A hint for an unknown key: the same name at another level, a like one here, then a like one elsewhere.

    path: all that was written, in which `key` is unknown. here: what may stand in its place. root: the whole class.
    """
    paths = sorted(_paths(root), key=lambda each: -_shared(each, path))  # the nearest levels first
    last = {each: each.rpartition(".")[2].lower() for each in paths}
    name = key.lower()

    def ending(written: str) -> list[str]:
        return [each for each in paths if f".{each}".lower().replace("_", ".").endswith(written)]

    same = ending(f".{path.lower().replace('_', '.')}") if "." in path else []
    same = same or [each for each in paths if last[each] == name]
    if not same and (close := nearest(key, here)):
        return close
    same = same or ending(f".{name.replace('_', '.')}")
    same = same or [each for each in paths if name == "".join(word[:1] for word in last[each].split("_"))]
    same = same or [each for each in paths if len(name) > 2 and last[each].startswith(name)]
    like = get_close_matches(name, set(last.values()), cutoff=0.65) if not same else []
    same = same or [each for match in like for each in paths if last[each] == match]
    return f", did you mean {' or '.join(same[:3])}?" if same else ""


def _paths(cls: Any, above: str = "") -> Iterator[str]:
    """All keys of a dataclass and of the sections in it, by their whole paths."""
    for kind in getattr(cls, "kinds", {}).values() if not is_dataclass(cls) else ():
        yield from _paths(kind, above)
    if not is_dataclass(cls):
        return
    hints = _hints(cls)
    for name in hints:
        yield above + name
        members = get_args(hints[name]) if get_origin(hints[name]) in UNIONS else (hints[name],)
        for member in members:
            yield from _paths(member, f"{above}{name}.")


def _shared(one: str, other: str) -> int:
    """How many keys two paths have in common from the top."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((k for k, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _files_like(path: Path) -> str:
    """A hint for a configuration that is not there: files of about that name, beside it and in configs/."""
    checkout = Path(__file__).resolve().parents[1] / _CONFIGS
    files = _configurations([path.parent, path.parent / _CONFIGS, Path(_CONFIGS)])
    files = files or _configurations([checkout])
    close = [each for each in files if each.stem.lower() == path.stem.lower()] or [
        each
        for match in get_close_matches(path.stem.lower(), {each.stem.lower() for each in files})
        for each in files
        if each.stem.lower() == match
    ]
    if close:
        return f", did you mean {' or '.join(map(str, close[:3]))}?"
    return f" (there are {', '.join(map(str, files[:12]))})" if files else ""


def _configurations(folders: list[Path]) -> list[Path]:
    found = {each.resolve(): each for folder in folders for each in sorted(folder.glob("*"))}
    return [each for each in found.values() if each.suffix.lower() in _KINDS and each.is_file()]
