"""The denoiser: from a network's prediction to the one thing samplers ask for, an estimate of x0."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion import parameterization
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError

# (x * c_in (B, C, h, w), timestep (B,) float32) -> output (B, C, h, w). The condition is bound.
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ask:
    """A network's output is asked for, at x * c_in (B, C, h, w) and timestep (B,), float32."""

    network: Network
    x: Tensor
    timestep: Tensor


# A coroutine that asks networks, is sent their outputs (B, C, h, w), and ends with what it was run for. Whoever runs it
# decides when a network is called, and with whose asks together: see `answered` and `ldm.sampling.engine`.
Asking = Generator[Ask, Tensor, Tensor]
# (x (B, C, h, w), sigma (B,)) -> x0 (B, C, h, w), where x = x0 + sigma * noise: a coroutine, or where no network is
# asked, the estimate itself; `awaited` takes both. The condition is bound. Where a sampler takes a learned variance, C
# more channels follow x0 and say where the variance lies; see `change_x0`.
Denoise = Callable[[Tensor, Tensor], Tensor | Asking]


def awaited(estimate: Tensor | Asking) -> Asking:
    """Give what a `Denoise` returned as a coroutine: `x0 = yield from awaited(denoise(x, sigma))`."""
    return estimate if isinstance(estimate, Tensor) else (yield from estimate)


def answered(asking: Asking) -> Tensor:
    """Run a coroutine to its end, calling every network as it is asked for."""
    try:
        ask = next(asking)
        while True:
            ask = asking.send(ask.network(ask.x, ask.timestep))
    except StopIteration as end:
        return end.value


Rounding = Literal["none", "round", "floor"]
_ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda timestep: timestep,
    "round": torch.round,
    "floor": torch.floor,
}


class Denoiser:
    """A `Denoise` made of a network; the state keeps its precision (float32).

    Guidance works between the two halves: `output`, the network's own prediction, and `x0_from`.
    rounding: what becomes of timesteps that fall between two integers: "round", "floor", or "none", which hands them
    to the network as they are; one for all images, or one each.
    learned_variance: of a network that learned its variance too (Nichol & Dhariwal 2021), and so gives twice the
    channels, hand on the second half behind x0; else it is left out.
    Raises UserError for a prediction type that the schedule does not allow.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        prediction_type: str = "epsilon",
        rounding: Rounding | Sequence[Rounding] = "none",
        learned_variance: bool = False,
    ) -> None:
        parameterization.check(prediction_type, schedule)
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.rounding = rounding
        self.learned_variance = learned_variance

    def __call__(self, x: Tensor, sigma: Tensor) -> Asking:
        """Estimate x0 from `x` (B, ...) at `sigma` (B,)."""
        output = yield from self.output(x, sigma)
        return self.x0_from(output, x, sigma)

    def output(self, x: Tensor, sigma: Tensor) -> Asking:
        """Ask for the network's own prediction at `x` (B, C, ...) and `sigma` (B,), in the dtype of `x`.

        C channels; with `learned_variance` 2C. Raises UserError where the network did not learn its variance.
        """
        timestep = self.timestep(sigma)
        scaled = x * per_image(parameterization.c_in(self.prediction_type, sigma), x)
        output = yield Ask(self.network, scaled, timestep)
        channels = x.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] < channels:
            raise UserError(
                f"variance_type learned_range is for a network that gives {channels} channels, this one gives "
                f"{output.shape[1]}: take variance_type fixed_small"
            )
        return output[:, :channels].to(x.dtype)

    def x0_from(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean picture that the prediction in `output` stands for; a variance behind it stays as it is."""
        return change_x0(
            lambda prediction: parameterization.x0_from(self.prediction_type, prediction, x, sigma), output, x
        )

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timesteps (B,), float32, that the network is told at noise levels `sigma` (B,)."""
        timestep = self.schedule.to(sigma.device).timestep(sigma)
        rounding = [self.rounding] if isinstance(self.rounding, str) else self.rounding
        if len(set(rounding)) == 1:
            return _ROUNDING[rounding[0]](timestep).to(torch.float32)
        # A network call may hold the rows several times: once under each condition.
        each = zip([*rounding] * (len(timestep) // len(rounding)), timestep, strict=True)
        return torch.stack([_ROUNDING[how](row) for how, row in each]).to(torch.float32)


def change_x0(function: Callable[[Tensor], Tensor], estimate: Tensor, x: Tensor) -> Tensor:
    """Apply `function` to the first C channels of an estimate for `x` (B, C, ...); what follows them stays as it is.

    What follows is a learned variance, on which no guidance, limit or mask acts.
    """
    channels = x.shape[1]
    if estimate.shape[1] == channels:
        return function(estimate)
    return torch.cat([function(estimate[:, :channels]), estimate[:, channels:]], dim=1)
