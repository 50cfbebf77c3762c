"""Prompts as templates in dynamicprompts' syntax: `a {red|blue} fox`, `a __colour__ fox`; the seed alone chooses.

The library reads the templates and chooses. Here it is held to give the same text for the same seed wherever it runs,
to say what it would pass over, and to come to an end.
"""

import hashlib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from ldm.config.yaml_files import read_yaml
from ldm.errors import UserError, nearest
from ldm.foreign import foreign, parse_json, read_plain

LONGEST = 20_000  # characters of a template, and of what it becomes
_LARGEST = 2**25  # bytes of a file of words
_MOST_STEPS = 10_000  # parts that are chosen for one text
_SYNTAX = re.compile(r"[{}]|__")
_WRAP = "__"
# A % or a $ that begins nothing is an error to the library, and can't be escaped: private characters stand for it.
_ALONE = re.compile(r"%(?!\{)|(?<!\$)\$(?![\${])")
_HIDDEN = {"%": "\U000f0025", "$": "\U000f0024"}
_SHOWN = str.maketrans({hidden: sign for sign, hidden in _HIDDEN.items()})


@cache
def _library() -> Any:
    """Return what is used of the library. Raises UserError where it isn't installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library, about names that pyparsing has changed
            from dynamicprompts.enums import SamplingMethod
            from dynamicprompts.parser.parse import parse
            from dynamicprompts.sampling_context import SamplingContext
            from dynamicprompts.wildcards.collection.structured import parse_structured_file
            from dynamicprompts.wildcards.values import WildcardValues

            parse("{a|b}")  # what makes the parser
    except ImportError as error:
        raise UserError(
            'wildcards are read by dynamicprompts: pip install "ldm-text-to-image[batch]"'
        ) from error

    logging.getLogger("dynamicprompts").addHandler(logging.NullHandler())

    parsed = lru_cache(4096)(parse)

    @dataclass(frozen=True)
    class Context(SamplingContext):
        """The library's, which counts what it chooses, and refuses what isn't chosen by the seed."""

        steps: Any = None  # an iterator, of which each part takes one

        def generator_from_command(self, command: Any) -> Any:
            if next(self.steps, None) is None:
                raise UserError("it doesn't come to an end, or has too many parts")
            if command.sampling_method not in (None, SamplingMethod.RANDOM):
                sign = "@" if command.sampling_method is SamplingMethod.CYCLICAL else "!"
                raise UserError(
                    f"{sign!r} chooses from one text to the next, but the seed does: leave it out"
                )
            return super().generator_from_command(command)

        def sample_prompts(self, prompt: Any, num_prompts: int | None = None) -> Any:
            """As the library's, which parses a word whenever it is chosen."""
            if not isinstance(prompt, str):
                return super().sample_prompts(prompt, num_prompts)
            return islice(self.generator_from_command(parsed(prompt)), num_prompts)

    return SimpleNamespace(
        start=lambda **more: Context(default_sampling_method=SamplingMethod.RANDOM, **more),
        values=WildcardValues.from_items,
        structured=parse_structured_file,
    )


class Wildcards:
    """Templates' expansion. folder: of files of words for `__name__`, `.txt` with one a line, `.yaml` or `.json`.

    Raises UserError where there is no such folder, for files in it that can't be read, and without the library.
    """

    def __init__(self, folder: Path | None = None):
        self._library, self._folder = _library(), folder
        self._words = _Words(folder)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the folder's files and their names, as hexadecimal digits. Raises UserError."""
        whole = hashlib.sha256()
        for name, path in _files(self._folder) if self._folder else ():
            whole.update(
                f"{name}\0{hashlib.sha256(_read(path)).hexdigest()}\n".encode(errors="surrogateescape")
            )
        return whole.hexdigest()

    def expand(self, template: str, seed: int) -> str:
        """Return one of the texts that a template stands for: the same for the same seed and words, wherever it runs.

        A text without brackets and `__` comes back as it is. In others, as the library has it, `#` and `/* */` are
        comments, and `{!a|b}` and `{@a|b}`, which choose from one text to the next, are refused. Raises UserError.
        """
        if not _SYNTAX.search(template):
            return template
        shown = f"the template {template[:60]!r}{'...' if len(template) > 60 else ''}"
        if len(template) > LONGEST:
            raise UserError(
                f"{shown} is longer than {LONGEST:,} characters: put words into a wildcard's file"
            )
        try:
            text = self._expanded(template, seed)
        except UserError as error:
            raise UserError(f"{shown}: {error}") from error
        if len(text) > LONGEST:
            raise UserError(f"{shown} becomes a text of more than {LONGEST:,} characters: make it shorter")
        return text

    def _expanded(self, template: str, seed: int) -> str:
        from pyparsing import ParseBaseException

        context = self._library.start(
            wildcard_manager=self._words,
            rand=Random(seed % 2**64),  # without a sign, which Random would drop
            steps=iter(range(1, _MOST_STEPS)),
        )
        with foreign("it", "can't be expanded"):
            try:
                return str(next(iter(context.sample_prompts(_hidden(template), 1)))).translate(_SHOWN)
            except ParseBaseException as error:
                rest = error.pstr[error.loc :].translate(_SHOWN)
                raise UserError(
                    f"it can't be read from {rest[:40]!r} on: is a bracket or a {_WRAP} left open?"
                ) from error
            except KeyError as error:  # of a variable
                raise UserError(
                    f"{error.args[0]}: give it a value, as in ${{name={{a|b}}}}, before it"
                ) from error
            except RecursionError as error:
                raise UserError("it leads back to itself without end, or is nested too deeply") from error
            except StopIteration as error:
                raise UserError("it has no result") from error


def _hidden(text: str) -> str:
    return _ALONE.sub(lambda match: _HIDDEN[match[0]], text)


def _hidden_word(word: Any) -> Any:
    """The same of a word, or of the library's WildcardItem, which has a weight too."""
    return _hidden(word) if isinstance(word, str) else replace(word, content=_hidden(word.content))


class _Words:
    """The words of a folder's files, in the part of the library's WildcardManager that its samplers use."""

    def __init__(self, folder: Path | None):
        self._folder, self._known = folder, {} if folder is None else _collections(folder)
        self._values: dict[str, Any] = {}

    def to_wildcard(self, name: str) -> str:
        return f"{_WRAP}{name}{_WRAP}"

    def get_values(self, wildcard: str) -> Any:
        """Return what `wildcard` stands for, where `*` and `?` match parts of names, each once, in one order.

        As in the library, a name that isn't there is looked for in all folders within. Raises UserError where there
        is none.
        """
        if wildcard not in self._values:
            self._values[wildcard] = self._found(wildcard)
        return self._values[wildcard]

    def _found(self, wildcard: str) -> Any:
        name = re.sub(r"[\\/]+", "/", wildcard.translate(_SHOWN)).strip("/")
        found = [each for each in self._known if fnmatchcase(each, name)]
        found = found or [each for each in self._known if fnmatchcase(each, f"**/{name}")]
        items = {
            (str(item), getattr(item, "weight", 1)): item for each in found for item in self._items(each)
        }
        if long := next((text for text, _ in items if len(text) > LONGEST), None):
            raise UserError(
                f"{self.to_wildcard(name[:60])} has a word of {len(long):,} characters, {long[:24]!r}...: shorten it"
            )
        if items:
            return _library().values(_hidden_word(items[key]) for key in sorted(items))
        named = f"the wildcard {self.to_wildcard(name[:60])}"
        if self._folder is None:
            raise UserError(f"{named} needs a folder of files of words")
        if found:
            raise UserError(f"{named} holds no words: write some into its file")
        raise UserError(f"{named} is not in {self._folder}{nearest(name[:60], self._known)}")

    def _items(self, name: str) -> Any:
        """The words of one file; those of a text are read when they are first asked for."""
        known = self._known[name]
        if isinstance(known, Path):
            lines = _text(known).replace("\r\n", "\n").replace("\r", "\n").split("\n")
            known = [each.strip() for each in lines if each.strip() and not each.strip().startswith("#")]
            self._known[name] = known
        return known


def _collections(folder: Path) -> dict[str, Any]:
    """Return a folder's wildcards by name: a text's path, or the words of a structured file. Raises UserError."""
    known: dict[str, Any] = {}
    for name, path in _files(folder):
        if path.suffix == ".txt":
            found = {name.removesuffix(".txt"): path}
        else:
            above = name.rpartition("/")[0]
            found = {f"{above}/{key}".strip("/"): words for key, words in _structured(path)}
        if twice := next((each for each in found if each in known), None):
            raise UserError(
                f"the wildcard {_WRAP}{twice}{_WRAP} is in {path} and in another file: rename one"
            )
        known |= found
    return known


def _structured(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the wildcards of a YAML or JSON file, as the library reads it. Raises UserError for what it passes over."""
    text = _text(path)
    data = parse_json(text, path) if path.suffix == ".json" else read_yaml(text, str(path))
    if isinstance(data, dict):
        _check_section(data, path)
    elif not isinstance(data, list) or not all(isinstance(each, str) for each in data):
        raise UserError(f"{path}: expected lists of words by name, such as colour: [red, blue]")
    with foreign(path):
        for name, words in _library().structured(path):
            yield name, words.get_values()


def _check_section(section: dict[Any, Any], path: Path) -> None:
    for name, value in section.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: the name {name!r:.60} is no text: write it in quotes")
        if isinstance(value, dict):
            _check_section(value, path)
            continue
        for word in value if isinstance(value, list) else [value]:
            if word is not None and not isinstance(word, str) and not _weighed(word):
                raise UserError(
                    f"{path}: {name} holds {word!r:.60}, which is no word: write it in quotes, or as "
                    "{text: red, weight: 2}"
                )


def _weighed(word: Any) -> bool:
    """Whether it is a word with a weight, such as {text: red, weight: 2}."""
    if not isinstance(word, dict) or not isinstance(word.get("text") or word.get("content"), str):
        return False
    weight = word.get("weight", 1)
    return type(weight) in (int, float) and 0 <= weight < math.inf


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of words in a folder, and in those within, by their names from it on, in one order."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of wildcards")
    for place, inside, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in map(os.path.realpath, Path(place).parents):
            inside.clear()  # a link to a folder that it lies in
            continue
        inside[:] = sorted(each for each in inside if not each.startswith("."))
        for path in sorted(Path(place) / name for name in names):
            if path.suffix in (".txt", ".yaml", ".json"):
                yield path.relative_to(folder).as_posix(), path


def _read(path: Path) -> bytes:
    try:
        return read_plain(path, _LARGEST)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


def _text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8: save it as UTF-8") from error
