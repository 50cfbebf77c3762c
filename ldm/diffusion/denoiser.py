"""The denoiser: from a network's prediction to the one thing samplers ask for, an estimate of x0."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion import parameterization
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.schedule import NoiseSchedule

# (x (B, C, h, w), sigma (B,)) -> x0 (B, C, h, w), where x = x0 + sigma * noise. The condition is bound.
Denoise = Callable[[Tensor, Tensor], Tensor]
# (x * c_in (B, C, h, w), timestep (B,) float32) -> output (B, C, h, w). The condition is bound.
Network = Callable[[Tensor, Tensor], Tensor]


class Denoiser:
    """A `Denoise` made of a variance-preserving network; the state keeps its precision (float32).

    Guidance works between the two halves: `output`, the network's own prediction, and `x0_from`.
    rounding: what becomes of timesteps that fall between two integers (`torch.round`, `torch.floor`);
    None hands them to the network as they are.
    Raises UserError for a prediction type that the schedule does not allow.
    """

    def __init__(
        self,
        network: Network,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        rounding: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parameterization.check(prediction_type, schedule)
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.rounding = rounding

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from `x` (B, ...) at `sigma` (B,)."""
        return self.x0_from(self.output(x, sigma), x, sigma)

    def output(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's own prediction at `x` (B, ...) and `sigma` (B,), in the dtype of `x`.

        Of a network that learned its variance too, and gives twice the channels, the first half.
        """
        timestep = self.timestep(sigma)
        output = self.network(x * per_image(parameterization.c_in(sigma), x), timestep)
        return output[:, : x.shape[1]].to(x.dtype)

    def x0_from(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean picture that the prediction `output` stands for."""
        return parameterization.x0_from(self.prediction_type, output, x, sigma)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timesteps (B,), float32, that the network is told at noise levels `sigma` (B,)."""
        timestep = self.schedule.to(sigma.device).timestep(sigma)
        return (self.rounding(timestep) if self.rounding else timestep).to(torch.float32)
