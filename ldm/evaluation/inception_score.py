"""The Inception Score (Salimans et al. 2016): are pictures of one class each, and of many classes together?"""

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError

SEED = 2020  # torch-fidelity's: with it splits and subsets are the same, and so are the figures


def inception_score(logits: Tensor, splits: int = 10, seed: int = SEED) -> tuple[float, float]:
    """Return exp(E KL(p(y|x) || p(y))) of class logits (N, K): its mean over `splits` parts and their deviation.

    Pictures are shuffled first, as folders are often sorted. It lies in [1, K], and grows with the pictures of a part,
    of which a published figure has 5,000: 10 parts of 50,000. Raises UserError for fewer pictures than parts.
    """
    if not 1 <= splits <= len(logits):
        raise UserError(f"{len(logits)} pictures can't be {splits} parts: give more pictures, or fewer parts")
    order = np.random.RandomState(seed).permutation(len(logits))  # its numbers never change, NumPy promises
    shuffled = logits.double()[torch.from_numpy(order)]
    scores: list[float] = []
    for i in range(splits):
        log_p = shuffled[i * len(logits) // splits : (i + 1) * len(logits) // splits].log_softmax(1)
        p = log_p.exp()
        # Where p(y) is 0 to a float's precision, p(y|x) is too, and the term is 0.
        terms = p * (log_p - p.mean(0).clamp_min(torch.finfo(p.dtype).tiny).log())
        scores.append(float(torch.where(p > 0, terms, 0).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
