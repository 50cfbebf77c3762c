"""What an unknown key of a configuration may have meant."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from ldm.config.kinds import KIND, field_hints, kinds_of, sections_of
from ldm.errors import nearest


def unknown_key(place: str, path: str, hint: Any, keys: Iterable[str], root: Any) -> str:
    """Return a sentence about a key that is unknown, with a hint.

    place: the path of the key. path: all that was written, which may go on below it. hint: the type of its section.
    keys: what may stand there. root: the class of the whole configuration.
    """
    above, _, key = place.rpartition(".")
    for cls in sections_of(hint):
        if new := getattr(cls, "renamed", {}).get(key):
            return f"'{place}' is called {above and above + '.'}{new} now"
    if owners := [kind for kind, cls in kinds_of(hint).items() if key in field_hints(cls)]:
        return f"unknown key '{place}': it goes with {above}.{KIND} {' or '.join(owners)}"
    return f"unknown key '{place}'{_keys_like(key, path, set(keys), root)}"


def _keys_like(key: str, path: str, here: set[str], root: Any) -> str:
    """A hint for an unknown key: the same name at another level, a like one here, then a like one elsewhere.

    path: all that was written, in which `key` is unknown. here: what may stand in its place. root: the whole class.
    """
    found = dict.fromkeys(path for section in sections_of(root) for path in _paths(section))
    paths = sorted(found, key=lambda each: -_shared(each, path))  # the nearest levels first
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
    for name, hint in field_hints(cls).items():
        yield above + name
        for section in sections_of(hint):
            yield from _paths(section, f"{above}{name}.")


def _shared(one: str, other: str) -> int:
    """How many keys two paths have in common from the top."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((k for k, (a, b) in enumerate(pairs) if a != b), len(pairs))
