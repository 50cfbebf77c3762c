"""Control pictures at work: ControlNets beside a U-Net, each with its picture, strength and part of the steps."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.data.pictures import rgb
from ldm.errors import UserError
from ldm.models.controlnet import ControlNet, check_fit
from ldm.models.denoising import DenoisingNetwork, Residuals

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Control:
    """One ControlNet and what it is shown (Zhang et al. 2023).

    image: (B, channels, H, W) in [0, 1], RGB, of the pictures' size; one row for all of them, or one each.
    scale: how strong, one number for all pictures or (B,) (diffusers' controlnet_conditioning_scale). start, end: the
    shares of the steps between which it works (control_guidance_start and _end), see `Plan.window`.
    guess_mode: it works on the rows with the prompt only, and weaker on the finer maps, so as to be understood without
    a prompt. A network that pools its residuals ("shuffle") works on the rows with the prompt only at any rate.
    """

    network: ControlNet
    image: Tensor
    scale: float | Tensor = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    def check(
        self,
        network: DenoisingNetwork,
        latent_channels: int,
        factor: int,
        rows: int,
        size: tuple[int, int],
        where: str = "the ControlNet",
    ) -> None:
        """Raise UserError unless it can steer `network` to `rows` pictures of this (height, width)."""
        check_fit(network, self.network, latent_channels, factor, where)
        wanted = (self.network.config.conditioning_channels, *size)
        if self.image.ndim != 4 or self.image.shape[1:] != wanted or len(self.image) not in (1, rows):
            raise UserError(
                f"{where}: its picture has the shape {tuple(self.image.shape)}, where {(rows, *wanted)} is needed, or "
                "one row for all"
            )
        if not bool(self.image.isfinite().all()) or self.image.min() < 0 or self.image.max() > 1:
            raise UserError(f"{where}: its picture has values outside of 0 to 1")
        if not 0 <= self.start < self.end <= 1:
            raise UserError(
                f"{where}: it is to work from {self.start} to {self.end} of the steps: give a start from 0 on, and an "
                "end after it, up to 1"
            )
        scale = torch.as_tensor(self.scale)
        if scale.ndim > 1 or scale.numel() not in (1, rows) or not bool(scale.isfinite().all()):
            raise UserError(
                f"{where}: its scale is {self.scale!r:.60}: give one finite number, or one a picture"
            )


class Bound:
    """A Control in one run. window: the timesteps that it works at, above the first and up to the second."""

    def __init__(self, control: Control, window: tuple[float, float], rows: int):
        self.control, self.window = control, window
        with torch.no_grad():
            # (B, C0, h, w), once for all steps
            self.hint = control.network.embed(control.image).expand(rows, -1, -1, -1)
        self.scale = torch.as_tensor(control.scale, dtype=torch.float32, device=self.hint.device).expand(rows)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Condition) -> Residuals | None:
        """Return the residuals for the rows of `x`, the last of which are those with the prompt; None for none."""
        network, guess = self.control.network, self.control.guess_mode
        pooled = network.config.global_pool_conditions
        low, high = self.window
        inside = (timestep > low) & (timestep <= high)
        if not bool(inside.any()):
            return None
        rows, images = len(x), len(self.hint)
        told = min(rows, images) if guess or pooled else rows
        found = network(
            x[rows - told :].to(network.dtype),
            timestep[rows - told :],
            condition.last(told).to(dtype=network.dtype),
            _last(self.hint, told),
        )
        strength = (_last(self.scale, told) * inside[rows - told :]).view(-1, 1, 1, 1)
        count = len(found.down) + 1
        shares = torch.logspace(-1, 0, count).tolist() if guess and not pooled else [1.0] * count

        def weighed(i: int, each: Tensor) -> Tensor:
            each = each * (strength * shares[i]).to(each)
            return each if told == rows else torch.cat([each.new_zeros(rows - told, *each.shape[1:]), each])

        return found.map(weighed)


class Controls:
    """Several Controls at one U-Net in one run: their residuals add up."""

    def __init__(self, controls: Sequence[Control], windows: Sequence[tuple[float, float]], rows: int):
        """windows: of each, see `Bound`. rows: the number of pictures."""
        self.bound = [Bound(control, window, rows) for control, window in zip(controls, windows, strict=True)]

    def __call__(self, x: Tensor, timestep: Tensor, condition: Condition) -> Residuals | None:
        """Return what is added to the U-Net's maps of `x` (R, C, h, w), timestep (R,); None for nothing."""
        found = [more for each in self.bound if (more := each(x, timestep, condition)) is not None]
        return reduce(operator.add, found) if found else None


def _last(values: Tensor, rows: int) -> Tensor:
    """The last `rows` of the values, which are said again as often as needed."""
    if rows > len(values):
        values = values.repeat(-(-rows // len(values)), *[1] * (values.ndim - 1))
    return values[len(values) - rows :]


def control_pictures(pictures: Sequence["Image | np.ndarray"], size: tuple[int, int]) -> Tensor:
    """Bring pictures to (B, 3, H, W) in [0, 1], of (height, width) `size`: stretched by Lanczos, as diffusers does.

    pictures: of PIL in any mode, or uint8 (H, W, 3). Raises UserError for what is neither.
    """
    from PIL import Image

    height, width = size
    resized: list[np.ndarray] = []
    for each in pictures:
        if isinstance(each, np.ndarray) and not (
            each.dtype == np.uint8 and each.ndim == 3 and each.shape[2] == 3
        ):
            raise UserError(
                f"a control picture is an array of {each.dtype} {each.shape}: give uint8 (H, W, 3), or one of PIL's"
            )
        if not isinstance(each, np.ndarray | Image.Image):
            raise UserError(f"a control picture is a {type(each).__name__}: give one of PIL's, or an array")
        picture = Image.fromarray(each if isinstance(each, np.ndarray) else rgb(each))
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        resized.append(np.asarray(picture))
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
