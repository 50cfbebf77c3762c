"""A picture that can be drawn."""

from dataclasses import dataclass, field

from ldm.diffusion.plan import Plan
from pipelines.canvas import Canvas
from pipelines.given import Given
from pipelines.prompts import Prompts
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class Drawing:
    """A picture that can be drawn: its complete recipe, how it is sampled, and what it is given beside the recipe.

    prompts: as they were read. lora_weights: of every LoRA that is loaded, by name. batch: equal for those that may
    share a batch, whose conditions are the same together as alone. canvas: what it is drawn on; made anew, by
    `pipe.draw`, where it was let go. second: how its second, larger pass is sampled, where it has one.
    guided: whether every step also asks the network without the prompt.
    """

    recipe: Recipe
    plan: Plan
    prompts: Prompts
    given: Given = field(default_factory=Given)
    lora_weights: dict[str, float] = field(default_factory=dict)
    batch: tuple[object, ...] = ()
    canvas: Canvas | None = None
    second: Plan | None = None
    guided: bool = True
