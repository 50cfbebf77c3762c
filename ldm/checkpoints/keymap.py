"""Two names for the same weights: key maps as rows, expanded to a full one-to-one map, read both ways.

A row pairs a prefix of our names (diffusers') with a prefix of another layout's names; what follows the
prefix is the same on both sides. Rows are computed from a config, never found by replacing text in a name, so
a map covers exactly the names it was written for and says which names it does not know.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.checkpoints.files import a_few
from ldm.errors import UserError


@dataclass(frozen=True)
class Change:
    """A change of a tensor's shape between the layouts; `ours` undoes `theirs`, bit for bit."""

    theirs: Callable[[list[Tensor]], Tensor]
    ours: Callable[[Tensor, int], list[Tensor]]  # the second argument: into how many tensors


SAME = Change(lambda ours: ours[0], lambda theirs, n: [theirs])
# A linear layer (O, I) that the other layout keeps as a 1x1 convolution (O, I, 1, 1); its bias is the same in
# both.
CONV_1X1 = Change(
    lambda ours: ours[0][:, :, None, None] if ours[0].ndim == 2 else ours[0],
    lambda theirs, n: [theirs.flatten(1) if theirs.ndim > 2 else theirs],
)
# A linear layer's weight (O, I) that the other layout keeps as a matrix to multiply from the right (I, O).
TRANSPOSED = Change(lambda ours: ours[0].T.contiguous(), lambda theirs, n: [theirs.T.contiguous()])
# Several layers that the other layout stacks along the first axis, as torch's MultiheadAttention does with q,
# k, v.
STACKED = Change(lambda ours: torch.cat(ours), lambda theirs, n: list(theirs.chunk(n)))


@dataclass(frozen=True)
class Row:
    """A prefix of our names (several, if their layers are stacked) and the prefix on the other side."""

    ours: tuple[str, ...]
    theirs: str
    change: Change = SAME


def row(ours: str | tuple[str, ...], theirs: str, change: Change = SAME) -> Row:
    """Return a row; a prefix ending in a dot or an underscore stands for all below it, another for itself."""
    return Row((ours,) if isinstance(ours, str) else ours, theirs, change)


def below(prefix: str, rows: Iterable[Row], ours: str = "") -> list[Row]:
    """Return the rows with `prefix` before their names on the other side, and `ours` before our names."""
    return [Row(tuple(ours + each for each in row.ours), prefix + row.theirs, row.change) for row in rows]


@dataclass(frozen=True)
class KeyMap:
    """A full one-to-one map over actual names: `links` are rows whose prefixes have become whole names."""

    links: tuple[Row, ...]

    def __post_init__(self) -> None:
        ours = [name for link in self.links for name in link.ours]
        theirs = [link.theirs for link in self.links]
        if len(set(ours)) != len(ours) or len(set(theirs)) != len(theirs):
            raise ValueError("a key map must be one-to-one, and these rows give some name twice")

    @classmethod
    def over_ours(
        cls, rows: Iterable[Row], names: Iterable[str], where: object, layout: str = "the single-file layout"
    ) -> "KeyMap":
        """Expand rows over our names; UserError names those that the other `layout` has no place for."""
        names = list(names)
        by_prefix = {prefix: each for each in rows for prefix in each.ours}
        found = _matches(by_prefix, names, f"{where}: {layout} has no place for")
        links = {_link(by_prefix[prefix], name[len(prefix) :]): None for name, prefix in found.items()}
        mapping = cls(tuple(links))
        if absent := [name for link in links for name in link.ours if name not in found]:
            raise UserError(f"{where}: {len(absent)} tensors are missing: {a_few(absent)}")
        return mapping

    @classmethod
    def over_theirs(
        cls,
        rows: Iterable[Row],
        names: Iterable[str],
        where: object,
        complaint: str = "names that are unknown in this family's single-file layout:",
    ) -> "KeyMap":
        """Expand rows over the other layout's names; UserError names those that it is not known to have."""
        by_prefix = {each.theirs: each for each in rows}
        found = _matches(by_prefix, list(names), f"{where}: {complaint}")
        return cls(tuple(_link(by_prefix[prefix], name[len(prefix) :]) for name, prefix in found.items()))

    def names(self) -> dict[tuple[str, ...], str]:
        """Return the map as a dictionary, our name or names to theirs."""
        return {link.ours: link.theirs for link in self.links}

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our tensors under the other layout's names and in its shapes."""
        return {link.theirs: link.change.theirs([tensors[name] for name in link.ours]) for link in self.links}

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the other layout's tensors under our names and in our shapes."""
        return {
            name: tensor
            for link in self.links
            for name, tensor in zip(
                link.ours, link.change.ours(tensors[link.theirs], len(link.ours)), strict=True
            )
        }


def _link(row: Row, rest: str) -> Row:
    return Row(tuple(prefix + rest for prefix in row.ours), row.theirs + rest, row.change)


def _matches(prefixes: Mapping[str, Row], names: list[str], complaint: str) -> dict[str, str]:
    """Return each name's one prefix."""
    found: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        fits = [
            name[:i] for i in range(1, len(name) + 1) if name[:i] in prefixes and _may_end(name[:i], name)
        ]
        if len(fits) > 1:
            raise ValueError(f"two rows claim {name}: {fits}")
        if fits:
            found[name] = fits[0]
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{complaint} {len(unknown)} of {len(names)}: {a_few(unknown)}")
    return found


def _may_end(prefix: str, name: str) -> bool:
    return prefix == name or prefix[-1] in "._"
