"""Which steps of a run compute the whole network, and which reuse its deep features: see `ldm.models.feature_reuse`."""

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Asking, Denoise, awaited
from ldm.diffusion.plan import Plan
from ldm.models.feature_reuse import FeatureReuse


def reusing(denoise: Denoise, reuse: FeatureReuse, plan: Plan, interval: int) -> Denoise:
    """Return a denoiser whose network is computed whole at every `interval`-th step of a run, counted from its first.

    denoise: of a network that is bound with `reuse`. A step is counted by its noise level, as in `by_step`: all that a
    solver asks for between two levels is of the step that begins with the higher one.
    """
    # float32's rounding of a level must not make it the step before.
    levels = torch.tensor(plan.sigmas[:-1], dtype=torch.float64) * (1 + 1e-6)
    begin = plan.span.start if plan.span is not None else 0

    def denoised(x: Tensor, sigma: Tensor) -> Asking:
        step = int((sigma[0].double().cpu() <= levels).sum()) - 1
        reuse.due = (step - begin) % interval == 0
        return (yield from awaited(denoise(x, sigma)))

    return denoised
