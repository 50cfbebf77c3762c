"""A denoising network under its condition, and the one way it is called."""

from dataclasses import dataclass

from torch import Tensor

from ldm.condition import Condition
from ldm.conditioning.control import Controls
from ldm.models.denoising import DenoisingNetwork, Residuals
from ldm.models.feature_reuse import FeatureReuse, Features
from ldm.models.token_merging import merged_tokens


@dataclass(frozen=True, eq=False)
class BoundNetwork:
    """A network with its condition bound, see `System.bind`: a `Network` of `ldm.diffusion`.

    reuse, merging: the approximations by which it is called, see `call`.
    """

    network: DenoisingNetwork
    condition: Condition
    controls: Controls | None = None
    reuse: FeatureReuse | None = None
    merging: float = 0.0

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        told, residuals = self.condition.last(len(x)), self.residuals(x, timestep)
        if self.reuse is None:
            return call(self.network, x, timestep, told, residuals, merging=self.merging)
        features = Features(self.held(len(x)))
        output = call(self.network, x, timestep, told, residuals, features, self.merging)
        self.keep(features.deep)
        return output

    def held(self, rows: int) -> Tensor | None:
        """Return the features that a call of so many rows reuses; None where it computes all of the network."""
        return None if self.reuse is None else self.reuse.held(rows)

    def keep(self, deep: Tensor | None) -> None:
        """Hold the features of a call, where they are reused."""
        if self.reuse is not None and deep is not None:
            self.reuse.keep(deep)

    def residuals(self, x: Tensor, timestep: Tensor) -> Residuals | None:
        """Return what the controls add to the network's maps, in its precision."""
        if self.controls is None:
            return None
        found = self.controls(x, timestep, self.condition.last(len(x)))
        return None if found is None else found.map(lambda _, each: each.to(self.network.dtype))


def call(
    network: DenoisingNetwork,
    x: Tensor,
    timestep: Tensor,
    told: Condition,
    residuals: Residuals | None,
    features: Features | None = None,
    merging: float = 0.0,
) -> Tensor:
    """Call a network in its precision; one that is not steered need not know of residuals, nor of features.

    features: those that are reused, or where they are put. merging: the share of tokens that are merged.
    """
    more = (residuals, features) if features is not None else () if residuals is None else (residuals,)
    with merged_tokens(network, merging):
        return network(x.to(network.dtype), timestep, told, *more)
