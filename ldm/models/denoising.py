"""What general code knows of a network that denoises: whoever brings another one gives it these, and no other place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models.resting import computed_in


class DenoisingConfig(Protocol):
    """A network's settings, named as in diffusers' config.json.

    sample_size: of the latents along a side that it was trained on. layers: see `diffusers_config.check_layers`.
    """

    @property
    def sample_size(self) -> int | None: ...

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def layers(self) -> int: ...

    def to_diffusers(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Residuals:
    """The tensors that are added to the feature maps of a U-Net's B rows, as a ControlNet makes it (Zhang et al. 2023).

    down: one for each map of the way down, the first convolution's first, (B, C_i, h_i, w_i). mid: of the middle
    block, (B, C, h, w). Those that are pooled have one position, which goes to all.
    """

    down: tuple[Tensor, ...]
    mid: Tensor

    def map(self, function: Callable[[int, Tensor], Tensor]) -> "Residuals":
        """Apply `function` to each, with its number; the middle block's is the last."""
        down = tuple(function(i, each) for i, each in enumerate(self.down))
        return Residuals(down, function(len(down), self.mid))

    @classmethod
    def joined(cls, parts: Sequence[tuple["Residuals | None", int]]) -> "Residuals | None":
        """Join residuals, each of so many rows, along the rows: zeros for None, and None where all are."""
        some = [found for found, _ in parts if found is not None]
        if not some:
            return None

        def join(i: int, like: Tensor) -> Tensor:
            own = [None if found is None else (*found.down, found.mid)[i] for found, _ in parts]
            height, width = (max(each.shape[k] for each in own if each is not None) for k in (2, 3))
            return torch.cat(
                [
                    like.new_zeros(rows, like.shape[1], height, width)
                    if each is None
                    else each.expand(-1, -1, height, width)
                    for each, (_, rows) in zip(own, parts, strict=True)
                ]
            )

        return some[0].map(join)

    def __add__(self, other: "Residuals") -> "Residuals":
        down = tuple(one + more for one, more in zip(self.down, other.down, strict=True))
        return Residuals(down, self.mid + other.mid)


class DenoisingNetwork(nn.Module):
    """A network that predicts noise, x0 or v of latents (B, C, h, w), under a condition.

    component: its folder in a diffusers pipeline. pipelines: diffusers' classes of pipelines that hold such a network.
    block_types: the modules whose activations are recomputed, and whose weights are gathered, one at a time.
    gives_features: whether `forward` takes `ldm.models.feature_reuse.Features` behind the residuals.
    """

    component: ClassVar[str] = "unet"
    pipelines: ClassVar[tuple[str, ...]] = ()
    block_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    gives_features: ClassVar[bool] = False
    config: Any  # a DenoisingConfig

    @classmethod
    def read_config(cls, mapping: Mapping[str, Any], where: str) -> DenoisingConfig:
        """Return the settings in a config.json; UserError, which names `where`, for what can't be honoured."""
        raise NotImplementedError

    def wants(self, latent_channels: int) -> dict[str, int]:
        """Return the parts that its condition consists of, and of how many features each is.

        latent_channels: of what is denoised; the network's input may have more ("channels").
        """
        raise NotImplementedError

    def wants_scored(self, latent_channels: int) -> dict[str, int]:
        """Return what it `wants` where it is told an aesthetic score in place of the target size; UserError if not."""
        raise UserError(f"a {type(self).__name__} is told no aesthetic score, as model_index.json has it")

    def take_channels(self, in_channels: int) -> None:
        """Take more channels, such as inpainting's; the new ones begin without a say. UserError where it can't."""
        raise UserError(f"a {type(self).__name__} can't be given more input channels")

    def take_guidance(self, dim: int) -> None:
        """Be told the guidance scale, by `dim` features, which begin without a say. UserError where it can't."""
        raise UserError(f"a {type(self).__name__} can't be told the guidance scale")

    @property
    def multiple(self) -> int:
        """What the latents' sides are best multiples of."""
        return 1

    def forward(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Return one prediction (B, out_channels, h, w). sample: (B, C, h, w) of unit variance. timestep: (B,)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it computes in."""
        return computed_in(self)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device


def extra_channels(in_channels: int, latent_channels: int) -> dict[str, int]:
    """Return, as `wants` does, the channels that a network takes beside those of the latents."""
    extra = in_channels - latent_channels
    return {"channels": extra} if extra else {}
