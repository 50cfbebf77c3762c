"""CLIP score (Hessel et al. 2021): how well pictures go with their captions, by any network that knows both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.pictures import PictureSet
from ldm.errors import UserError, printable
from ldm.evaluation.features import batches


class ImageTextEncoder(Protocol):
    """Pictures and texts to features of one space; neither are normalised."""

    def image_features(self, pictures: Tensor) -> Tensor:
        """Return (B, D) of pictures (B, 3, H, W) in [0, 1]; resizing and normalising is the encoder's own."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return (B, D)."""
        ...


@dataclass(frozen=True)
class CLIPScore:
    """The mean over pictures, in [0, 100], and its standard error (nan for one picture)."""

    mean: float
    error: float
    count: int


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return max(100 cos, 0) of each picture (B, D) and its text (B, D): (B,).

    The paper's CLIP-S (its sec. 3) is 2.5 max(cos, 0): this, divided by 40.
    """
    return (100 * F.cosine_similarity(image_features.float(), text_features.float())).clamp_min(0)


@torch.no_grad()
def clip_score(
    encoder: ImageTextEncoder,
    pictures: PictureSet,
    *,
    limit: int | None = None,
    at_once: int = 32,
    verbose: bool = True,
) -> CLIPScore:
    """Score pictures against their own captions, the first where one has several; the first `limit` pictures.

    Raises UserError for a picture without a caption.
    """
    from tqdm import tqdm

    items = pictures.items[:limit]
    if bare := [item.name for item in items if not item.caption]:
        raise UserError(
            f"a CLIP score needs a caption for each picture, and {len(bare)} of {len(items)} have none; the first is "
            f"{printable(bare[0])}"
        )
    scores: list[Tensor] = []
    done = 0
    with tqdm(
        desc="CLIP score", total=len(items), disable=None if verbose else True, leave=False
    ) as progress:
        for some in batches(pictures, len(items), at_once):
            captions = [item.caption for item in items[done : done + len(some)]]
            scores.append(clip_scores(_seen(encoder, some), encoder.text_features(captions)).cpu())
            done += len(some)
            progress.update(len(some))
    found = torch.cat(scores).double()
    error = float(found.std() / len(found) ** 0.5) if len(found) > 1 else math.nan
    return CLIPScore(float(found.mean()), error, len(found))


def _seen(encoder: ImageTextEncoder, pictures: list[np.ndarray]) -> Tensor:
    """The features (B, D) of pictures of any sizes; neighbours of one size share a call."""
    parts: list[Tensor] = []
    for _, alike in groupby(pictures, key=lambda each: each.shape):
        stacked = torch.from_numpy(np.stack(list(alike))).permute(0, 3, 1, 2)
        parts.append(encoder.image_features(stacked.float() / 255))
    return torch.cat(parts)
