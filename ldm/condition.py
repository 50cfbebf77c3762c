"""What a denoising network is told of its pictures, beside the noisy latents and the timestep, in one type."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

AESTHETIC_SCORES = (6.0, 2.5)  # that diffusers tells SDXL's refiner with the prompt, and without it


@dataclass(frozen=True)
class Condition:
    """The condition of B rows. Every part that is there has B rows; a new kind of condition is a new part.

    hidden: (B, L, D), hidden states of the text. pooled: (B, P), a vector of the whole text.
    time_ids: (B, 6), SDXL's sizes in pixels: original height and width, crop top and left, target height and width;
    (B, 5) for its refiner, to which an aesthetic score is told in place of the target's size.
    labels: (B,) int64, classes. channels: (B, c, h, w), what is joined to the noisy latents, such as inpainting's mask
    and masked latents. guidance: (B,), the guidance scale (diffusers' guidance_scale, 1 is none), for a network that
    learned to draw as if guided (Meng et al. 2023). images: of image prompts, for each adapter that takes part by a key
    of its own: KEY.tokens (B, T, D), and KEY.scale (B,), how much of it.
    """

    hidden: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    labels: Tensor | None = None
    channels: Tensor | None = None
    guidance: Tensor | None = None
    images: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({len(part) for part in self.parts().values()}) > 1:
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in self.parts().items())
            raise ValueError(f"the parts of a condition have other numbers of rows ({shapes})")

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> "Condition":
        """Build one of named parts, as `parts` gives them: a dot is in the names of images' alone."""
        own = {name: part for name, part in parts.items() if "." not in name}
        known: dict[str, Any] = {**own, "images": {name: parts[name] for name in parts if name not in own}}
        return cls(**known)

    def parts(self) -> dict[str, Tensor]:
        """Return the parts that are there, by name."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "images"}
        return {name: part for name, part in found.items() if part is not None} | dict(self.images)

    @property
    def text(self) -> Tensor:
        """The hidden states of the text, for whoever can't do without. Raises ValueError where there are none."""
        if self.hidden is None:
            raise ValueError("the condition has no hidden states of a text")
        return self.hidden

    @property
    def rows(self) -> int:
        """B."""
        return max((len(part) for part in self.parts().values()), default=0)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply `function`, which may change the number of rows, to every part."""
        return Condition.of({name: function(part) for name, part in self.parts().items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Condition":
        """Move it; parts of real numbers are cast to `dtype`, but for sizes and scales, which bfloat16 would round."""
        exact = ("time_ids", "guidance", ".scale")
        moved = {
            name: part.to(device, dtype if part.is_floating_point() and not name.endswith(exact) else None)
            for name, part in self.parts().items()
        }
        return Condition.of(moved)

    def zeros(self) -> "Condition":
        """Return a condition of zeros in the same shapes."""
        return self.map(torch.zeros_like)

    def last(self, rows: int) -> "Condition":
        """Return the last `rows` rows."""
        return self if rows == self.rows else self.map(lambda part: part[len(part) - rows :])

    def require(self, wanted: Collection[str], network: str) -> None:
        """Raise UserError, which names the part, where one that `network` wants is missing or it is given more."""
        here = self.parts()
        if absent := [name for name in wanted if name not in here]:
            raise UserError(f"{network} wants {absent[0]} in its condition, and it has {_listed(here)}")
        if more := [name for name in here if name not in wanted]:
            raise UserError(f"{network} takes no {more[0]} in its condition, only {_listed(wanted)}")


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Join conditions, of the same parts in the same shapes, along the rows."""
    names = list(conditions[0].parts())
    if odd := {name for each in conditions for name in set(names) ^ set(each.parts())}:
        raise ValueError(f"either all conditions have {', '.join(sorted(odd))} or none has")
    joined = {name: torch.cat([each.parts()[name] for each in conditions]) for name in names}
    return Condition.of(joined)


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "nothing"
