"""The quality of a model that was trained on a mixture: what it draws, judged against what it was asked for.

Beside each figure stand its floor, pictures of the same compositions made from sprites and passed through the
autoencoder, and its ceiling of chance, drawn pictures judged by the prompts of others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.emoji.composition import Composition
from ldm.emoji.detectors import Detectors, Features, Verdict, fit_all
from ldm.emoji.figures import Shares, shares
from ldm.emoji.mixture import Mixture
from ldm.emoji.prompts import Asked
from ldm.emoji.questions import Question, questions, readings
from ldm.evaluation.frechet import frechet_distance
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.perceptual import PerceptualDistance
from ldm.pictures import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_AT_ONCE = 64
_BLOTCHES = 16  # of `worn`, along each side
_TESTED = 10**9  # compositions from this index on are in no pool that training sees
SIDES = ("drawn", "real", "floor", "chance")


@dataclass(frozen=True)
class Judged:
    """Verdicts on a picture for each prompt: drawn; real; real through the autoencoder; another prompt's."""

    asked: list[Asked]
    verdicts: dict[str, list[list[Verdict]]]

    def shares(self, side: str, part: str, group: str | None = None) -> Shares:
        chosen = [i for i, each in enumerate(self.asked) if each.part == part and group in (None, each.group)]
        return shares([self.verdicts[side][i] for i in chosen])

    def groups(self, part: str) -> list[str]:
        return list(dict.fromkeys(each.group for each in self.asked if each.part == part))


@dataclass(frozen=True)
class Reconstructed:
    """The autoencoder on real compositions: PSNR in dB, and the perceptual distance of `PerceptualDistance`."""

    psnr: float
    distance: float
    count: int


@dataclass(frozen=True)
class Likeness:
    """Of a part's pictures as a set. Distances are in EfficientNet-Lite0's pooled features.

    frechet: between those drawn and as many real ones of the same compositions; frechet_real: between the latter
    and others of the same compositions; frechet_floor: between others and the first through the autoencoder.
    nearest, nearest_real: the median distance, of unit vectors, from one drawn, or a real one, to the nearest training
    composition.
    """

    frechet: float
    frechet_real: float
    frechet_floor: float
    nearest: float
    nearest_real: float


def compositions(
    mixture: Mixture, count: int, first: int = 0
) -> Iterator[tuple[Tensor, list[list[Question]]]]:
    """Yield batches of a mixture's own compositions, each with all questions about it."""
    for start in range(first, first + count, _AT_ONCE):
        made = [mixture.sample(i) for i in range(start, min(start + _AT_ONCE, first + count))]
        yield (
            to_tensor([each.picture for each in made]),
            [questions(Composition(**each.parts)) for each in made],
        )


def fitted(features: Features, mixture: Mixture, count: int) -> Detectors:
    """Fit detectors on `count` compositions of a mixture, which should compose everything, also what is held out.

    Each composition is shown twice, once worn: what a picture shows is asked, not how sharp and clean it is.
    """

    def shown() -> Iterator[tuple[Tensor, list[list[Question]]]]:
        for number, (pictures, asked) in enumerate(compositions(mixture, count)):
            yield pictures, asked
            yield worn(pictures, number), asked

    return fit_all(features, shown())


def worn(pictures: Tensor, seed: int) -> Tensor:
    """Shrink each picture (B, 3, H, W) to between 1/4 and 3/4 of its side, enlarge it again, and add blotches.

    These are about a sixteenth of the side wide, with a standard deviation of up to 0.1, where colours are in [-1, 1]:
    as a model that has not learned to the end leaves them, on what should be plain.
    """
    size, rng = pictures.shape[-2:], np.random.default_rng([seed, 4])
    made = []
    for picture in pictures:
        share, depth = rng.uniform(0.25, 0.75), rng.uniform(0, 0.1)
        small = F.interpolate(picture[None], scale_factor=float(share), mode="bilinear", antialias=True)
        blotches = torch.from_numpy(rng.normal(0, depth, (1, 3, _BLOTCHES, _BLOTCHES))).float()
        soft, patches = (F.interpolate(each, size=size, mode="bicubic")[0] for each in (small, blotches))
        made.append((soft + patches).clamp(-1, 1))
    return torch.stack(made)


def tested(detectors: Detectors, mixture: Mixture, count: int) -> dict[str, tuple[float, int]]:
    """Return the share right of each attribute, and of how many, on compositions not fitted on."""
    verdicts = [
        [Verdict(_told(v.question), v.ranking) for v in some]
        for pictures, asked in compositions(mixture, count, _TESTED)
        for some in detectors.judge(pictures, asked)
    ]
    return shares(verdicts).attributes


def judge(detectors: Detectors, asked: Sequence[Asked], sides: dict[str, Tensor]) -> Judged:
    """Return verdicts on each side's pictures (B, 3, H, W), one a prompt; chance is made of those drawn."""
    moved = torch.roll(sides["drawn"], len(asked) // 2 + 1, 0)[_mixed(len(asked))]
    all_sides = sides | {"chance": moved}
    return Judged(list(asked), {name: _verdicts(detectors, asked, some) for name, some in all_sides.items()})


def _verdicts(detectors: Detectors, asked: Sequence[Asked], pictures: Tensor) -> list[list[Verdict]]:
    """Of each picture under the reading of its prompt that most speaks for."""
    ways = [readings(each.composition) for each in asked]
    first = detectors.judge(pictures, [each[0] for each in ways])
    turned = [i for i, each in enumerate(ways) if len(each) > 1]
    others = detectors.judge(pictures[turned], [ways[i][1] for i in turned]) if turned else []
    for i, other in zip(turned, others, strict=True):
        first[i] = max(first[i], other, key=lambda some: sum(v.right for v in some if v.question.told))
    return first


def real(mixture: Mixture, asked: Sequence[Asked], seed: int = 0) -> Tensor:
    """Return a picture of each prompt's composition, from its sprites."""
    return to_tensor(
        [mixture.draw(each.composition, seed * 10**6 + number).picture for number, each in enumerate(asked)]
    )


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pass pictures through the autoencoder, by the posterior's mean, rounded to 8 bits as files are."""
    parts = [autoencoder.decode(autoencoder.encode(some).mean) for some in pictures.split(_AT_ONCE)]
    return ((torch.cat(parts).float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def reconstructed(distance: PerceptualDistance, pictures: Tensor, decoded: Tensor) -> Reconstructed:
    """Return what the autoencoder loses, a mean over pictures."""
    error = ((pictures - decoded) / 2).square().flatten(1).mean(1)
    apart = [distance(a, b) for a, b in zip(pictures.split(_AT_ONCE), decoded.split(_AT_ONCE), strict=True)]
    return Reconstructed(
        float((-10 * error.clamp_min(1e-10).log10()).mean()), float(torch.cat(apart).mean()), len(pictures)
    )


def likeness(
    features: Features, training: Tensor, drawn: Tensor, one: Tensor, other: Tensor, floor: Tensor
) -> Likeness:
    """Compare sets of pictures.

    training: features of training compositions (N, 1280); floor: the first real ones through the autoencoder."""
    seen, a, b, c = (features.pooled(each) for each in (drawn, one, other, floor))
    return Likeness(
        frechet_distance(seen, a),
        frechet_distance(a, b),
        frechet_distance(b, c),
        float(nearest(seen, training)[0].median()),
        float(nearest(b, training)[0].median()),
    )


def nearest(rows: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each row (N, D) to the nearest of `training` (M, D), as unit vectors, and which it is."""
    found = torch.cdist(F.normalize(rows.float()), F.normalize(training.float())).min(dim=1)
    return found.values, found.indices


def as_tensor(pictures: "Sequence[Image]") -> Tensor:
    return to_tensor([np.asarray(picture) for picture in pictures])


def _mixed(count: int) -> list[int]:
    """A fixed shuffle."""
    return np.random.default_rng(0).permutation(count).tolist()


def _told(question: Question) -> Question:
    return Question(question.attribute, question.place, question.answer, True)
