"""Detectors for the parts of a composition: each names the class whose mean is the nearest, over whitened features.

That is linear discriminant analysis (Fisher 1936), on features of EfficientNet-Lite0, which was trained on
photographs, with a coarse map of colours beside them. The detectors are fitted on real compositions and tested on
others before they judge a drawn one.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import read_metadata, read_tensors, write_tensors
from ldm.emoji.questions import WHOLE, Place, Question
from ldm.errors import UserError
from ldm.foreign import foreign, json_object
from ldm.models.perceptual import EfficientNetLite0

_MAP = 8  # the map of colours has so many cells along each side
_AT_ONCE = 16
_SHRINKAGE = 0.02  # towards a diagonal, of the covariance within the classes


@torch.no_grad()
def views(pictures: Tensor, places: Sequence[Place]) -> Tensor:
    """Return a square of each picture (B, 3, H, W), enlarged to the picture's own size."""
    side, cut = pictures.shape[-1], list[Tensor]()
    for picture, (x, y, share) in zip(pictures, places, strict=True):
        if (x, y, share) == WHOLE:
            cut.append(picture)
            continue
        left, top = (max(0, round((each - share / 2) * side)) for each in (x, y))
        square = picture[:, top : top + round(share * side), left : left + round(share * side)]
        cut.append(F.interpolate(square[None], size=(side, side), mode="bilinear", antialias=True)[0])
    return torch.stack(cut)


class Features:
    """The features of pictures that detectors see: (B, 3, H, W) in [-1, 1] to (B, 1280 + 192).

    The first are the network's, the others a map of colours.
    """

    def __init__(self, network: EfficientNetLite0):
        # Three times as fast on CPUs.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        parts = list[Tensor]()
        for some in pictures.to(memory_format=torch.channels_last).split(_AT_ONCE):
            colours = F.adaptive_avg_pool2d(some.float(), _MAP).flatten(1)
            parts.append(torch.cat([self.network.pooled(some).float(), colours], dim=1))
        return torch.cat(parts)

    def pooled(self, pictures: Tensor) -> Tensor:
        """Return the network's features alone (B, 1280): for distances between pictures."""
        return self(pictures)[:, : self.network.fc.in_features]


@dataclass(frozen=True)
class Detector:
    """`classes` by the nearest of `means` (K, R) after `project` (D, R), which whitens what differs within a class."""

    classes: list[str]
    project: Tensor
    means: Tensor

    def nearest(self, features: Tensor) -> list[list[str]]:
        """Return all classes for each row of features (N, D), the nearest first."""
        distances = torch.cdist(features.double() @ self.project, self.means)
        return [[self.classes[k] for k in row] for row in distances.argsort(dim=1).tolist()]


def fit(features: Tensor, labels: Sequence[str]) -> Detector:
    """Fit one to features (N, D) and their classes. Raises UserError for a class seen once, or a single class."""
    counts = Counter(labels)
    classes = sorted(counts)
    if len(classes) < 2 or min(counts.values()) < 2:
        raise UserError("a detector needs two classes or more, each seen twice or more")
    x = features.double()
    index = torch.tensor([classes.index(label) for label in labels])
    means = torch.stack([x[index == k].mean(0) for k in range(len(classes))])
    within = x - means[index]
    scale = within.std(0).clamp_min(1e-6)
    within = within / scale
    covariance = within.T @ within / (len(x) - len(classes))
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * torch.eye(len(covariance), dtype=x.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = (vectors / values.clamp_min(1e-9).sqrt()) / scale[:, None]
    # Only what tells the means apart is of use: at most K - 1 directions.
    centred = (means - means.mean(0)) @ whiten
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = directions[strengths > 1e-6 * strengths[0]]
    project = whiten @ kept.T
    return Detector(classes, project, means @ project)


@dataclass(frozen=True)
class Verdict:
    """A detector's answer to a question: all classes, the nearest first; none where no detector knows the answer."""

    question: Question
    ranking: list[str]

    @property
    def right(self) -> bool:
        return self.ranking[:1] == [self.question.answer]

    def within(self, first: int) -> bool:
        """Return whether the answer is among the `first` nearest."""
        return self.question.answer in self.ranking[:first]


class Detectors:
    """One for each attribute, fitted on pictures whose answers are known."""

    def __init__(self, features: Features, detectors: Mapping[str, Detector]):
        self.features, self.detectors = features, dict(detectors)

    def judge(self, pictures: Tensor, asked: Sequence[Sequence[Question]]) -> list[list[Verdict]]:
        """Return verdicts on each picture's questions. What no detector knows the answer of counts as wrong."""
        rows = _rows(self.features, pictures, [(i, each) for i, some in enumerate(asked) for each in some])

        def verdict(i: int, question: Question) -> Verdict:
            detector = self.detectors.get(question.attribute)
            if detector is None or question.answer not in detector.classes:
                return Verdict(question, [])
            return Verdict(question, detector.nearest(rows[i, question.place][None])[0])

        return [[verdict(i, question) for question in some] for i, some in enumerate(asked)]


def fit_all(features: Features, batches: Iterable[tuple[Tensor, list[list[Question]]]]) -> Detectors:
    """Fit detectors to batches of real pictures, with all questions about each. Classes seen once are left out."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    labels: dict[str, list[str]] = defaultdict(list)
    for pictures, asked in batches:
        known = [(i, question) for i, some in enumerate(asked) for question in some]
        seen = _rows(features, pictures, known)
        for i, question in known:
            rows[question.attribute].append(seen[i, question.place])
            labels[question.attribute].append(question.answer)
    fitted = {}
    for attribute, answers in labels.items():
        counts = Counter(answers)
        kept = [k for k, answer in enumerate(answers) if counts[answer] > 1]
        if len({answers[k] for k in kept}) > 1:
            stacked = torch.stack([rows[attribute][k] for k in kept])
            fitted[attribute] = fit(stacked, [answers[k] for k in kept])
    return Detectors(features, fitted)


def _rows(
    features: Features, pictures: Tensor, known: Sequence[tuple[int, Question]]
) -> dict[tuple[int, Place], Tensor]:
    """The features of each place that is asked about, by the picture's number and the place."""
    wanted = list(dict.fromkeys((i, question.place) for i, question in known))
    if not wanted:
        return {}
    cut = views(pictures[[i for i, _ in wanted]], [place for _, place in wanted])
    return dict(zip(wanted, features(cut), strict=True))


def save_detectors(path: Path, detectors: Detectors, tested: Mapping[str, tuple[float, int]]) -> None:
    """Write them, with what their test said, to a .safetensors. Raises UserError."""
    tensors = dict[str, Tensor]()
    for name, each in detectors.detectors.items():
        tensors |= {f"{name}/project": each.project, f"{name}/means": each.means}
    classes = {name: each.classes for name, each in detectors.detectors.items()}
    write_tensors(path, tensors, {"classes": json.dumps(classes), "tested": json.dumps(dict(tested))})


def load_detectors(path: Path, features: Features) -> tuple[Detectors, dict[str, tuple[float, int]]]:
    """Read what `save_detectors` wrote. Raises UserError."""
    tensors, metadata = read_tensors(path), read_metadata(path)
    with foreign(path, "holds no detectors", ": delete it, and they are fitted again"):
        found = {
            name: Detector(classes, tensors[f"{name}/project"], tensors[f"{name}/means"])
            for name, classes in json_object(metadata["classes"], path).items()
        }
        tested = {
            name: (share, count) for name, (share, count) in json_object(metadata["tested"], path).items()
        }
    return Detectors(features, found), tested
