"""Configurations as YAML and JSON files: read as data alone, with what is too large, too deep or endless refused."""

import re
import reprlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import UserError
from ldm.foreign import DEEPEST, LONGEST_NUMBER, foreign, one_line, read_plain

_ENDINGS = (".yaml", ".yml", ".json")  # of files that hold a configuration
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
    content = read_yaml(text, f"the configuration {path}")
    if not isinstance(content, dict | None):
        shown = f"{reprlib.repr(content)[:60]} ({type(content).__name__})"
        raise UserError(f"{path}: the configuration is {shown}, expected keys and values")
    return content or {}


def read_yaml(text: str, where: str) -> Any:
    """Return what a YAML text holds. Raises UserError that names `where`, whatever PyYAML raises about it."""
    with foreign(where, "is not valid YAML", advice="; quote what is text"):
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError as error:  # of several lines
            raise ValueError(" ".join(str(error).split())) from error


def _files_like(path: Path) -> str:
    """A hint for a configuration that is not there: files of about that name, beside it and in configs/."""
    checkout = Path(__file__).resolve().parents[2] / _CONFIGS
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
    return [each for each in found.values() if each.suffix.lower() in _ENDINGS and each.is_file()]
