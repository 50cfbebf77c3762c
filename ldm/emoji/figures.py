"""From verdicts to figures: the shares that are right, of each kind of prompt."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.emoji.detectors import Verdict

THINGS = ("thing", "part", "holder", "face")  # the attributes that name a thing
FIRST = 5


@dataclass(frozen=True)
class Shares:
    """Of some pictures, each share in [0, 1].

    top1, top5: of the things asked for, how many are the nearest of all, or among the five nearest. composed: of the
    pictures, how many have all right that the prompt tells. attributes: the share right of each attribute told, and of
    how many.
    """

    count: int
    top1: float
    top5: float
    composed: float
    attributes: dict[str, tuple[float, int]]


def shares(verdicts: Sequence[Sequence[Verdict]]) -> Shares:
    """Return the shares over each picture's verdicts."""
    told = [[each for each in some if each.question.told] for some in verdicts]
    things = [each for some in told for each in some if each.question.attribute in THINGS]
    by_attribute: dict[str, list[bool]] = defaultdict(list)
    for some in told:
        for each in some:
            by_attribute[each.question.attribute].append(each.right)
    return Shares(
        count=len(verdicts),
        top1=_mean([each.right for each in things]),
        top5=_mean([each.within(FIRST) for each in things]),
        composed=_mean([all(each.right for each in some) for some in told]),
        attributes={name: (_mean(right), len(right)) for name, right in sorted(by_attribute.items())},
    )


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")
