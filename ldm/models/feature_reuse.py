"""Reuse of features across steps (DeepCache, Ma et al. 2024, arXiv:2312.00858), of a U-Net: an approximation.

What the deep part of a U-Net says changes slowly from step to step. So it is computed at some steps only; at the others
the finest level alone is, on the features that the deep part gave before (eq. 9 there, with all levels below the finest
as what is reused). The features belong to whoever draws, never to the network, which other pictures use meanwhile.
"""

from dataclasses import dataclass

from torch import Tensor

from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork


@dataclass
class Features:
    """The features of B rows in one call of a network: what enters the last block of the way up.

    deep: (B, C, h, w). None, the network computes all of itself, and leaves them here; else it computes no more than
    what they don't say.
    """

    deep: Tensor | None = None


class FeatureReuse:
    """The features of one condition in one run.

    Attributes:
        due: whether the step is one of those that compute the whole network.
    """

    def __init__(self) -> None:
        self.due = True
        self._held: Tensor | None = None

    def held(self, rows: int) -> Tensor | None:
        """Return the features of a call's rows, the last of those of before; None where they are to be computed.

        They are computed at the steps that are due, and where a call has more rows than the one before had: guidance
        that begins on the way.
        """
        if self.due or self._held is None or len(self._held) < rows:
            return None
        return self._held[len(self._held) - rows :]

    def keep(self, deep: Tensor) -> None:
        """Hold the features of a call that computed them."""
        self._held = deep


def check(network: DenoisingNetwork) -> None:
    """Raise UserError for a network without features to reuse."""
    if not network.gives_features:
        raise UserError(
            f"feature_reuse is for U-Nets, and this model's network is a {type(network).__name__}: leave it out"
        )
