"""Pictures by class, or of a model that knows none: a pipeline for systems without text.

pipe = ClassToImagePipeline.from_pretrained("runs/lectures/ddpm-digits/export")
pipe(["7", 3], guidance_scale=2).images
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.driver import Callback
from ldm.errors import UserError
from ldm.pictures import to_numpy, to_pil, to_unit_range
from ldm.sampling import Guidance
from ldm.sampling.plain import Wrapper, draw, prepare
from ldm.system.plain import PlainSystem
from pipelines.limits import check_seed
from pipelines.placement import choose_device
from pipelines.rows import MOST_PICTURES

OutputType = Literal["pil", "np", "pt", "raw"]
STEPS = 50  # where nobody says otherwise


@dataclass(frozen=True)
class ClassToImageOutput:
    """What a call drew.

    images: PIL pictures ("pil"), (B, H, W, C) in [0, 1] ("np"), (B, C, H, W) in [0, 1] ("pt"), or what the network
    gave, (B, C, H, W), as it is ("raw"): points have no other form. classes: each one's number, None where the model
    knows none. seeds: each one's.
    """

    images: Any
    classes: list[int | None]
    seeds: list[int]


class ClassToImagePipeline:
    """Draws with a system without text; a picture depends on its own seed and class only."""

    def __init__(self, system: PlainSystem):
        self.system = system

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "ClassToImagePipeline":
        """Load a folder that training's `diffusion` wrote, or diffusers for its DDPMPipeline. Raises UserError."""
        return cls(PlainSystem.load(folder, torch_dtype=torch_dtype, device=choose_device(device)))

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by number."""
        return list(self.system.labels)

    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        condition: Condition | None = None,
        wrappers: Sequence[Wrapper] = (),
        output_type: OutputType = "pil",
        callback: Callback | None = None,
    ) -> ClassToImageOutput:
        """Draw pictures of these classes.

        classes: names or numbers, one picture each, times `num_images`; None is each class in turn, or of a model
            without classes just `num_images` pictures.
        seed: of the first; the others have those that follow, or one each is given.
        guidance_scale: of classifier-free guidance; 1 is none.
        sampler: None is the model's own.
        condition: of B rows, for a model that is told something else than classes, in their place.
        wrappers: what is put around the guided denoiser, such as a limit on x0 or a classifier's guidance.
        Raises UserError.
        """
        system, device = self.system, self.system.network.device
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale is {guidance_scale}: give a number, commonly 1 to 15")
        if output_type not in get_args(OutputType):
            known = ", ".join(get_args(OutputType))
            raise UserError(f"output_type {output_type!r:.60} is unknown; known: {known}")
        if not 1 <= num_images <= MOST_PICTURES:
            raise UserError(
                f"num_images is {num_images!s:.40}: make it 1 or more, and at most {MOST_PICTURES:,}"
            )
        numbers: list[int | None] = []
        if condition is None:
            numbers = self._numbers(classes, num_images)
            known = [each for each in numbers if each is not None]
            condition = Condition(labels=torch.tensor(known, device=device)) if known else Condition()
        elif classes is not None:
            raise UserError("give classes or a condition, not both")
        elif num_images != 1:
            raise UserError(
                "num_images is of classes: give a condition as many rows as there are to be pictures"
            )
        count = condition.rows or len(numbers)
        seeds = [seed + k for k in range(count)] if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} pictures: give one for each, or the first alone")
        for each in seeds:
            check_seed(each)
        drawing = system.process.plan(num_inference_steps, sampler)
        request = prepare(system, drawing, condition, seeds, Guidance(guidance_scale), wrappers)
        return ClassToImageOutput(
            _formed(draw(system, request, callback), output_type), numbers or [None] * count, seeds
        )

    def _numbers(self, classes: str | int | Sequence[str | int] | None, each: int) -> list[int | None]:
        known = self.system.wants.get("labels", 0)
        if classes is None and not known:
            return [None] * each
        if classes is None:
            given: list[str | int] = list(range(len(self.system.labels) or known))
        else:
            given = [classes] if isinstance(classes, str | int) else list(classes)
        if not given:
            raise UserError("give at least one class")
        return [self.system.label(name) for name in given for _ in range(each)]


def _formed(drawn: Tensor, output_type: str) -> Any:
    if output_type == "raw":
        return drawn
    if not bool(drawn.isfinite().all()):
        raise UserError(
            "the pictures came out as NaN: the guidance_scale is too high, or the weights are damaged"
        )
    if drawn.shape[1] not in (1, 3):
        raise UserError(f'what has {drawn.shape[1]} channels is no picture: take output_type "raw"')
    pictures = to_unit_range(drawn)
    if output_type == "pil":
        return to_pil(pictures)
    return to_numpy(pictures) if output_type == "np" else pictures
