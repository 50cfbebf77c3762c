"""Imports point downward only between the floors of the house; the towers of one floor never meet.

The rule is checked on the syntax trees, so an import inside a function, under TYPE_CHECKING or through
importlib counts like any other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "ldm": 0,  # the package itself: its version
    "ldm.errors": 0,
    "ldm.console": 1,
    "ldm.figures": 1,
    "ldm.processor": 1,
    "ldm.files": 1,
    "ldm.foreign": 1,
    "ldm.config": 2,
    "ldm.pictures": 2,
    "ldm.preprocess": 2,
    "ldm.condition": 2,
    "ldm.diffusion": 3,
    "ldm.models": 3,
    "ldm.data": 3,
    "ldm.checkpoints": 3,
    "ldm.conditioning": 4,
    "ldm.system": 5,
    "ldm.sampling": 6,
    "ldm.backends": 6,
    "ldm.training": 7,
    "ldm.evaluation": 7,
    "pipelines": 7,
    "ldm.emoji": 8,
    "benchmarks": 9,
    "scripts": 10,
    "tests": 11,
}
OURS = {name.partition(".")[0] for name in PARTS}


def part_of(module: str) -> str | None:
    """The part that `module` belongs to, or None if it stands on no floor."""
    pieces = module.split(".")
    name = ".".join(pieces[:2]) if pieces[0] == "ldm" else pieces[0]
    return name if name in PARTS else None


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, full name) of every module that `source`, the text of `module`, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            levels = max(node.level - is_package, 0)  # "." is the package itself
            above = module.rsplit(".", levels)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            # `from ldm import system` imports a part, `from ldm import __version__` does not.
            if base == "ldm":
                names = (alias.name for alias in node.names)
                yield from ((node.lineno, base if name.startswith("__") else f"ldm.{name}") for name in names)
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of `source` that the floors forbid, one readable line each."""
    here = part_of(module)
    if here is None:
        return [f"{module} stands on no floor: give it one in {Path(__file__).name}"]
    found: list[str] = []
    for line, target in imports(source, module, is_package):
        if here.startswith(("ldm", "pipelines")) and target.partition(".")[0] == "diffusers":
            found.append(f"{module}:{line} imports diffusers: only benchmarks, scripts and tests may")
        if target.partition(".")[0] not in OURS:
            continue
        there = part_of(target)
        if there is None:
            found.append(f"{module}:{line} imports {target}, which stands on no floor")
        elif there != here and PARTS[there] >= PARTS[here]:
            found.append(f"{module}:{line} imports {target}: {here} must not know {there}")
    return found


def sources() -> list[Path]:
    return sorted(path for top in OURS for path in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_of(path), path.stem == "__init__") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.models.unet", "from ldm.diffusion.schedule import NoiseSchedule"),
        ("ldm.models.unet", "import ldm.data.order as order"),
        ("ldm.models.unet", "from ldm import checkpoints"),
        ("ldm.models.unet", "from ..diffusion import schedule"),
        ("ldm.models.unet", "from .. import system"),
        ("ldm.models.unet", "def f():\n    if True:\n        from ldm.system import System"),
        ("ldm.models.unet", "import importlib\nimportlib.import_module('ldm.training.loop')"),
        ("ldm.models.unet", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pipelines"),
        ("ldm.models.unet", "import diffusers"),
        ("ldm.conditioning.text", "import ldm.system"),
        ("ldm.training.loop", "from ldm.evaluation import frechet"),
        ("ldm.training.loop", "from ldm.emoji import pools"),
        ("pipelines.cli", "import ldm.emoji.mixture"),
        ("ldm.training.loop", "from pipelines import TextToImagePipeline"),
        ("pipelines.text_to_image", "from ldm.training import loop"),
        ("pipelines.cli", "from scripts import generate"),
        ("benchmarks.training", "from scripts import benchmark"),
        ("ldm.errors", "from ldm.config import from_dict"),
        ("ldm.system", "from tests import conftest"),
        ("ldm.gadgets", "import math"),
        ("ldm.system", "from ldm.gadgets import x"),
    ],
)
def test_the_checker_catches(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.models.unet", "import torch\nfrom ldm.errors import UserError\nfrom ldm import __version__"),
        (
            "ldm.models.unet",
            "from ldm.models.layers import Attention\nfrom .layers import Block\nfrom . import vae",
        ),
        ("ldm.system", "from ldm import models, conditioning\nfrom ldm.checkpoints.folder import load"),
        ("pipelines.cli", "from pipelines.text_to_image import TextToImagePipeline\nimport ldm.system"),
        ("scripts.train", "from ldm.training.loop import train\nimport diffusers"),
        ("benchmarks.parts", "import diffusers\nfrom pipelines import TextToImagePipeline"),
        ("scripts.benchmark", "from benchmarks import training, rows"),
        ("tests.test_x", "import diffusers, scripts, pipelines, ldm.data.order"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imports("from .unet import UNet", "ldm.models", is_package=True)) == [(1, "ldm.models.unet")]
    assert list(imports("from ..data import x", "ldm.models", is_package=True)) == [(1, "ldm.data")]


# Circles inside a part, and words of the example inside the system


def inside(part: str) -> dict[str, set[str]]:
    """The modules of a part, and which others of the same part each imports."""
    paths = [path for path in sources() if part_of(module_of(path)) == part]
    names = {module_of(path): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        text = path.read_text(encoding="utf-8")
        found: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                # `from ldm.training import state` is of a module, `from ldm.training.state import read` too.
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & set(names)) - {name}
    return graph


def module_of(path: Path) -> str:
    pieces = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that, through others, import themselves."""
    left = dict(graph)
    while ends := [name for name, found in left.items() if not found & set(left)]:
        for name in ends:
            del left[name]
    return {name for name in left if name in _reached(left, name)}


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for each in graph.get(todo.pop(), set()) - seen:
            seen.add(each)
            todo.append(each)
    return seen


@pytest.mark.parametrize("part", [part for part in PARTS if not part.startswith("test") and part != "ldm"])
def test_no_file_imports_itself_through_others(part: str) -> None:
    graph = inside(part)
    packages = {name for name in graph if any(each.startswith(f"{name}.") for each in graph)}
    # A package's own file may offer what is in it; what is in it reads siblings by their names.
    assert circles({name: found - packages for name, found in graph.items() if name not in packages}) == set()


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == {"b", "c"} and circles({"a": {"b"}, "b": set()}) == set()


WORDS = ("emoji", "sprite", "costume", "fluent", "noto ", "minilm")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_general_code_knows_nothing_of_the_emoji(path: Path) -> None:
    part = part_of(module_of(path)) or ""
    if part.startswith(("ldm", "pipelines")) and part != "ldm.emoji":
        text = path.read_text(encoding="utf-8").lower()
        assert [word for word in WORDS if word in text] == []
