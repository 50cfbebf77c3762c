"""Running a sampler: the loop between a coroutine and a denoiser, and the noise of each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.samplers import Steps


@dataclass(frozen=True)
class Step:
    """One prediction on the way: its number from 0, the noise level, the state there, the estimate of x0."""

    index: int
    sigma: float
    x: Tensor
    x0: Tensor


def sample(denoise: Denoise, steps: Steps, callback: Callable[[Step], bool | None] | None = None) -> Tensor:
    """Run the coroutine `steps` with `denoise` to its end and return its last x (B, C, h, w).

    callback: called after every prediction; if it returns False the run stops there, and the estimate of
    x0 at that moment is returned.
    """
    index, estimate = 0, None
    while True:
        try:
            x, sigma = next(steps) if estimate is None else steps.send(estimate)
        except StopIteration as stop:
            return stop.value
        estimate = denoise(x, x.new_full((len(x),), sigma))
        x0 = estimate[:, : x.shape[1]]  # behind it may be a learned variance, which is the sampler's alone
        if callback is not None and callback(Step(index, sigma, x, x0)) is False:
            steps.close()
            return x0
        index += 1


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
