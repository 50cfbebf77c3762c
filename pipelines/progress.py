"""How a call gets on: its progress bar, and what its callback sees and says."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.diffusion.driver import Step
from ldm.diffusion.plan import Plan
from ldm.errors import UserError
from pipelines.drawing import Drawing


class Previewing(Protocol):
    """What a pipeline can do here: cheap pictures of latents (B, C, h, w)."""

    def preview(self, latents: Tensor) -> Any: ...


# (pipe, index, timestep, state) -> False to end the call there. index: of the prediction, from 0 over the whole call; a
# solver of second order makes two a step. state: see `Progress`.
StepCallback = Callable[[Any, int, int, dict[str, Any]], object]


class Progress:
    """Watches the batches of one call, one after the other; shows a bar where standard error is a terminal.

    The callback's state: "latents" (B, C, h, w), of unit variance, that the network was just asked about; "denoised",
    its estimate of their end; "preview", a function that gives cheap PIL pictures of that estimate (the
    pipeline's `preview`); "images", which of the call's images these are. It may return the state, as diffusers'
    callbacks do, but it can't put other latents into it.

    stopped: whether the callback has ended the call; the estimate of that moment is then the result.
    """

    def __init__(
        self,
        pipe: Previewing,
        plans: Sequence[Plan],
        batches: int,
        callback: StepCallback | None,
        shown: bool,
    ):
        """plans: of the passes of every batch, one or two."""
        from tqdm.auto import tqdm

        self.pipe, self.plans, self.callback = pipe, plans, callback
        self.stopped, self._index = False, 0
        total = sum(plan.evaluations for plan in plans) * batches
        self._bar = tqdm(total=total, disable=None if shown else True, unit="step", leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def of(self, images: Sequence[int]) -> "Watch":
        """What watches these images of the call."""
        return Watch(self, images)

    def step(self, step: Step, plan: Plan, images: Sequence[int]) -> bool:
        """Tell of a prediction for images in a pass; False ends the call there."""
        self._bar.update()
        index, self._index = self._index, self._index + 1
        if self.callback is None:
            return True
        sigma = torch.tensor([step.sigma], dtype=torch.float64)
        latents = step.x / math.sqrt(1 + step.sigma**2)
        state = {
            "latents": latents,
            "denoised": step.x0,
            "preview": lambda: self.pipe.preview(step.x0),
            "images": list(images),
        }
        answer = self.callback(self.pipe, index, round(plan.schedule.timestep(sigma).item()), state)
        if isinstance(answer, dict) and answer.get("latents", latents) is not latents:
            raise UserError(
                "callback_on_step_end returned other latents: it can watch and stop a call, not change it"
            )
        self.stopped = answer is False
        return not self.stopped


@contextmanager
def counted(drawings: Iterable[object], shown: bool) -> Iterator[Callable[[], object]]:
    """Show a bar of predictions, where standard error is a terminal; what is given is called after each.

    drawings: those to come, whose plans tell how many these will be, where all of them are there.
    """
    from tqdm.auto import tqdm

    total = None
    if isinstance(drawings, Sequence):
        ready = [each for each in drawings if isinstance(each, Drawing)]
        plans = [plan for each in ready for plan in (each.plan, each.second) if plan is not None]
        counts = {id(plan): plan.evaluations for plan in {id(plan): plan for plan in plans}.values()}
        total = sum(counts[id(plan)] for plan in plans) if len(ready) == len(drawings) else None
    with tqdm(total=total, disable=None if shown else True, unit="step", leave=False) as bar:
        yield bar.update


class Watch:
    """Watches some images of a call through their passes: what the driver calls after each prediction."""

    def __init__(self, progress: Progress, images: Sequence[int]):
        self._progress, self._images = progress, images

    def first(self, step: Step) -> bool:
        """Of the first pass."""
        return self._progress.step(step, self._progress.plans[0], self._images)

    def second(self, step: Step) -> bool:
        """Of the second, larger one."""
        return self._progress.step(step, self._progress.plans[1], self._images)
