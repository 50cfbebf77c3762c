"""Two sets of pictures compared: FID, Inception Score, KID, precision and recall, with what must be said of them."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ldm.errors import UserError, nearest
from ldm.evaluation.frechet import frechet_distance, gaussian_distance
from ldm.evaluation.inception_score import inception_score
from ldm.evaluation.kernel_distance import SUBSET, kernel_distance
from ldm.evaluation.precision_recall import precision_recall
from ldm.evaluation.statistics import INCEPTION, FeatureStatistics, Network

MeasureName = Literal["fid", "is", "kid", "pr", "clip"]
MEASURES: tuple[MeasureName, ...] = get_args(MeasureName)
# Only over Inception's features have they these names.
_TITLES = {
    "fid": ("FID", "Fréchet distance"),
    "is": ("Inception Score", "class score"),
    "kid": ("KID", "kernel distance"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
}
_KEYS = {"fid": "frechet_distance", "is": "class_score", "kid": "kernel_distance"}
_SPLITS = 10


@dataclass(frozen=True)
class Measure:
    """A figure. key: for programs; title: for people. spread: its deviation over parts or subsets, where it has any."""

    key: str
    title: str
    value: float
    spread: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Figures of `other` against `real`, each a name and a number of pictures; notes, a line each.

    features: the network in whose features they are compared, where they are.
    """

    real: tuple[str, int | None]
    other: tuple[str, int | None]
    features: str | None
    measures: Sequence[Measure]
    notes: Sequence[str]

    def table(self) -> str:
        """Return a table in Markdown."""
        rows = ["| measure | value | deviation |", "|---|---|---|"]
        for each in self.measures:
            spread = "" if each.spread is None else f"{each.spread:.4g}"
            rows.append(f"| {each.title} | {each.value:.6g} | {spread} |")
        sets = [
            f"{name} ({'?' if count is None else f'{count:,}'} pictures)"
            for name, count in (self.real, self.other)
        ]
        where = f", in the features of {self.features}" if self.features else ""
        return "\n".join([f"{sets[1]} against {sets[0]}{where}:", "", *rows])

    def to_json(self) -> str:
        """Return all of it as JSON: a measure's key with its value and deviation."""
        found: dict[str, Any] = {
            "real": {"name": self.real[0], "pictures": self.real[1]},
            "other": {"name": self.other[0], "pictures": self.other[1]},
            "features": self.features,
            "measures": {
                each.key: {"title": each.title, "value": each.value, "deviation": each.spread}
                for each in self.measures
            },
            "notes": list(self.notes),
        }
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def measures_named(text: str) -> tuple[MeasureName, ...]:
    """Return the measures of a list such as "fid,kid". Raises UserError for unknown ones."""
    names = [each.strip().lower() for each in text.split(",") if each.strip()]
    for each in names:
        if each not in MEASURES:
            raise UserError(
                f"no measure is called {each:.40}{nearest(each, MEASURES)} (known: {', '.join(MEASURES)})"
            )
    if not names:
        raise UserError(f"give one measure or more of {', '.join(MEASURES)}")
    return tuple(each for each in MEASURES if each in names)


def compare(
    real: FeatureStatistics, other: FeatureStatistics, wanted: Collection[MeasureName] | None = None
) -> tuple[list[Measure], list[str]]:
    """Return the figures of `other` against `real`, and notes on what they are worth.

    wanted: of them; None is all that can be had. The Inception Score is of `other` alone. Raises UserError for features
    of two networks, and for what is wanted and can't be had.
    """
    check_alike(real, other)
    network, notes = real.network, _notes(real, other, wanted is None or "fid" in wanted)
    found: list[Measure] = []
    for name in MEASURES if wanted is None else wanted:
        if not (why := _lack(name, real, other)):
            found += _measured(name, network, real, other, notes)
        elif wanted is None:
            notes.append(f"left out: {why}")
        else:
            raise UserError(why)
    return found, notes


def check_alike(real: FeatureStatistics, other: FeatureStatistics) -> None:
    """Raise UserError for statistics of two networks."""
    if real.network != other.network:
        raise UserError(
            f"one side has statistics of {real.network.title}'s features, the other of {other.network.title}'s: they "
            "can't be compared, make one of them anew"
        )


def _lack(name: MeasureName, real: FeatureStatistics, other: FeatureStatistics) -> str:
    """Why a measure can't be had, or ""."""
    if name == "is" and other.logits is None:
        return "is needs all pictures' class logits, which a file of statistics holds if made with --all"
    if name in ("kid", "pr") and (real.features is None or other.features is None):
        return f"{name} needs all pictures' features, which a file of statistics holds if made with --all"
    count = min(_rows(real), _rows(other)) if name in ("kid", "pr") else _rows(other)
    if (name == "is" and count < 2) or (name in ("kid", "pr") and count < 4):
        return f"{name} needs four pictures or more on either side"
    return ""


def _rows(side: FeatureStatistics) -> int:
    return 0 if side.features is None else len(side.features)


def _measured(
    name: MeasureName, network: Network, real: FeatureStatistics, other: FeatureStatistics, notes: list[str]
) -> list[Measure]:
    if name == "fid":
        return [_measure("fid", network, _frechet(real, other))]
    if name == "is" and other.logits is not None:
        splits = min(_SPLITS, len(other.logits) // 2)
        return [_measure("is", network, *inception_score(other.logits, splits))]
    if name == "kid" and real.features is not None and other.features is not None:
        few = min(len(real.features), len(other.features))
        size = SUBSET if few >= SUBSET else max(2, few // 2)
        if size < SUBSET:
            notes.append(
                f"the kernel distance's subsets are of {size} pictures here, where published ones are of {SUBSET:,}"
            )
        return [_measure("kid", network, *kernel_distance(real.features, other.features, size=size))]
    if name == "pr" and real.features is not None and other.features is not None:
        values = zip(("precision", "recall"), precision_recall(real.features, other.features), strict=True)
        return [_measure(key, network, value) for key, value in values]
    return []


def _frechet(real: FeatureStatistics, other: FeatureStatistics) -> float:
    one, two = real.features, other.features
    if one is not None and two is not None and min(len(one), len(two)) < one.shape[1]:
        return frechet_distance(one, two)  # the same, sooner than by a covariance of mostly zeros
    return gaussian_distance(real.mean, real.covariance, other.mean, other.covariance)


def _measure(key: str, network: Network, value: float, spread: float | None = None) -> Measure:
    ours, general = _TITLES[key]
    if network == INCEPTION:
        return Measure(key, ours, value, spread)
    return Measure(_KEYS.get(key, key), f"{general} ({network.title})", value, spread)


def _notes(real: FeatureStatistics, other: FeatureStatistics, frechet: bool) -> list[str]:
    """What the figures are worth; frechet: whether the Fréchet distance is among them."""
    notes: list[str] = []
    if real.unnamed or other.unnamed:
        notes.append(
            f"a file with mu and sigma alone was taken for statistics of {INCEPTION.title}'s features"
        )
    counts = [each.count for each in (real, other) if each.count is not None]
    width = len(real.mean)
    if frechet and counts and min(counts) <= width:
        notes.append(
            f"{min(counts):,} pictures are fewer than {width + 1:,}: the covariance of {width:,} features is singular "
            "and the Fréchet distance far too high; compare it only between sets of as many pictures (published FIDs "
            "are of 10,000 to 50,000)"
        )
    if len(set(counts)) > 1:
        notes.append(
            f"the sets have {counts[0]:,} and {counts[1]:,} pictures: all measures depend on these numbers"
        )
    return notes
