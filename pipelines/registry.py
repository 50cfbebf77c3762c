"""What a pipeline has loaded beside its system, by name and by the file that it came from."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ldm.errors import UserError, nearest
from pipelines.files import whole_path


class FromFile(Protocol):
    """Something loaded, or what a recipe says of it: the file or folder, and its hash where there is one."""

    @property
    def path(self) -> str: ...

    @property
    def hash(self) -> str | None: ...


Member = TypeVar("Member", bound=FromFile)
Used = TypeVar("Used", bound=FromFile)


class Registry(Generic[Member]):
    """Things of one kind by name, in the order in which they were loaded.

    kind: the word for one of them in messages. how: the method that loads one.
    """

    def __init__(self, kind: str, how: str):
        self.kind, self.how = kind, how
        self._members: dict[str, Member] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def new_name(self, path: str | Path, name: str | None) -> str:
        """The name for something new: None is the file's. Raises UserError where there is one of that name."""
        name = name or Path(path).resolve().stem
        if name in self._members:
            raise UserError(f"{name!r} is the name of another {self.kind}: give another name, or unload it")
        return name

    def free_name(self, path: str | Path) -> str:
        """The file's name, or where that is taken one with a number."""
        stem = Path(path).stem
        return next(each for n in count(1) if (each := f"{stem}-{n}" if n > 1 else stem) not in self._members)

    def add(self, name: str, member: Member) -> None:
        self._members[name] = member

    def named(self, name: str) -> Member:
        """Raises UserError where there is none of this name."""
        self.check([name])
        return self._members[name]

    def check(self, names: Iterable[str]) -> None:
        """Raise UserError for a name that there is not."""
        for name in names:
            if name not in self._members:
                loaded = ", ".join(self._members) or "none"
                raise UserError(
                    f"no {self.kind} is named {name!r}{nearest(str(name), self._members)} (loaded: {loaded})"
                )

    def take_out(self, names: Iterable[str] | None) -> list[Member]:
        """Take out all of these, or none where one is not there; None is everything. Raises UserError."""
        wanted = list(self._members if names is None else names)
        self.check(wanted)
        return [self._members.pop(name) for name in dict.fromkeys(wanted)]

    def find(self, path: str) -> Member | None:
        """What came from this file, or None."""
        return next((each for each in self if each.path in (path, whole_path(path))), None)

    def at(self, path: str) -> Member:
        """Raises UserError where nothing came from this file."""
        found = self.find(path)
        if found is None:
            raise UserError(f"the {self.kind} {path} is not loaded: load it first, with {self.how}")
        return found

    def load_again(self, uses: Iterable[Used], load: Callable[[Used, str], object]) -> list[str]:
        """Have `load` load what recipes name and isn't here, each under a free name; returns notes on changed files."""
        uses = list(uses)
        for use in uses:
            if self.find(use.path) is None:
                load(use, self.free_name(use.path))
        return changed((use, self.at(use.path)) for use in uses)


def changed(pairs: Iterable[tuple[FromFile, FromFile]]) -> list[str]:
    """Notes on files, each as a recipe names it and as it is now, that are not what they were."""
    return [
        f"{use.path} has changed since the picture was drawn ({use.hash}, now {found.hash})"
        for use, found in pairs
        if use.hash and found.hash and use.hash != found.hash
    ]
