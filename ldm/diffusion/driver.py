"""Running a sampler: the loop between a coroutine and a denoiser, and the noise of each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Asking, Denoise, answered, awaited
from ldm.diffusion.samplers import Steps


@dataclass(frozen=True)
class Step:
    """One prediction on the way: its number from 0, the noise level, the state there, the estimate of x0."""

    index: int
    sigma: float
    x: Tensor
    x0: Tensor


Callback = Callable[[Step], bool | None]


def run(denoise: Denoise, steps: Steps, callback: Callback | None = None) -> Asking:
    """Run the sampler `steps` with `denoise` to its end, the last x (B, C, h, w), as a coroutine of asks.

    callback: called after every prediction; if it returns False the run stops there, and the estimate of
    x0 at that moment is its end.
    """
    index, estimate = 0, None
    while True:
        try:
            x, sigma = next(steps) if estimate is None else steps.send(estimate)
        except StopIteration as stop:
            return stop.value
        estimate = yield from awaited(denoise(x, x.new_full((len(x),), sigma)))
        x0 = estimate[:, : x.shape[1]]  # behind it may be a learned variance, which is the sampler's alone
        if callback is not None and callback(Step(index, sigma, x, x0)) is False:
            steps.close()
            return x0
        index += 1


def sample(denoise: Denoise, steps: Steps, callback: Callback | None = None) -> Tensor:
    """Do the same at once, and return its end."""
    return answered(run(denoise, steps, callback))


class Noise:
    """Standard normal noise, each image's from a generator of its own.

    Image k draws float32 on the CPU from `torch.Generator("cpu").manual_seed(seeds[k])`, then moves to
    `device`: on every device, alone or at any place in a batch, a seed gives the same noise, at the start
    and at every stochastic step. A list of such generators gives diffusers the same noise.
    """

    def __init__(
        self,
        seeds: Sequence[int | torch.Generator],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
    ) -> None:
        """seeds: one an image (a generator stands for itself); shape: (C, h, w) of one image."""
        self.generators = [
            seed if isinstance(seed, torch.Generator) else torch.Generator("cpu").manual_seed(seed)
            for seed in seeds
        ]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """Draw the next noise, (B, C, h, w)."""
        return torch.stack(
            [torch.randn(self.shape, generator=each, device=each.device) for each in self.generators]
        ).to(self.device)
