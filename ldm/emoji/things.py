"""What the bundled model knows: things, their code points and how people name them."""

from collections.abc import Iterable
from dataclasses import dataclass

from ldm.emoji.things_table import CATEGORIES
from ldm.errors import UserError, nearest


@dataclass(frozen=True)
class Thing:
    """One thing that can be asked for.

    `code` is the emoji's code points in hex, joined by "-". `number` is "one" (a thing that is counted), "mass" or
    "many" (no article, never counted) or "the" (there is one). `colour` is the thing's own colour where one dominates,
    or "". `wearer` names who wears the hat when this is a face that can wear one, or "". A `core` thing is drawn by
    small models too.
    """

    name: str
    code: str
    category: str
    plural: str
    synonyms: tuple[str, ...] = ()
    colour: str = ""
    number: str = "one"
    recolourable: bool = False
    wearer: str = ""
    core: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.synonyms)


def plural(name: str) -> str:
    """Return the regular English plural of `name`."""
    if name.endswith(("s", "x", "sh", "ch")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def parse(line: str, category: str) -> Thing:
    """Read one line of the table."""
    name, code, synonyms, colour, flags = (cell.strip() for cell in line.split("|"))
    rest, _, wearer = flags.partition("wears=")
    _, _, irregular = rest.partition("plural=")
    words = flags.split()
    number = next((word for word in ("mass", "many", "the") if word in words), "one")
    return Thing(
        name,
        code,
        category,
        plural=irregular.strip() or plural(name),
        synonyms=tuple(each.strip() for each in synonyms.split(",") if each.strip()),
        colour=colour,
        number=number,
        recolourable="recolour" in words,
        wearer=wearer.strip(),
        core="extra" not in words,
    )


def _read() -> dict[str, Thing]:
    things: dict[str, Thing] = {}
    for category, table in CATEGORIES.items():
        for line in table.strip().splitlines():
            thing = parse(line, category)
            things[thing.name] = thing
    return things


THINGS: dict[str, Thing] = _read()


def choose(names: Iterable[str]) -> list[Thing]:
    """Return the things of these names or categories; "all" is every one, "core" what a small model learns.

    Raises UserError for an unknown name.
    """
    chosen: dict[str, Thing] = {}
    for name in names:
        found = [
            thing
            for thing in THINGS.values()
            if name in ("all", thing.name, thing.category) or (name == "core" and thing.core)
        ]
        if not found:
            raise UserError(
                f"no thing is called {name!r}{nearest(name, [*THINGS, *CATEGORIES, 'all', 'core'])}"
            )
        chosen.update((thing.name, thing) for thing in found)
    return list(chosen.values())
