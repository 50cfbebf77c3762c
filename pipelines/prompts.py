"""The prompts of a recipe, read in its syntax."""

from dataclasses import dataclass

from ldm.conditioning.prompts.reading import read_prompt
from ldm.conditioning.prompts.weighted import Prompt, Text
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class Prompts:
    """The prompt of one picture, and its negative prompt, None for none."""

    prompt: Prompt
    negative: Prompt | None

    @property
    def texts(self) -> list[Text]:
        """The different texts of both."""
        return [*self.prompt.texts, *self.negative_texts]

    @property
    def negative_texts(self) -> list[Text]:
        """Of the negative prompt; none is an empty one."""
        return self.negative.texts if self.negative else [""]


def read_prompts(recipe: Recipe) -> Prompts:
    """Read the prompts of a complete recipe, for its number of steps. Raises UserError."""
    assert recipe.num_inference_steps
    how = (recipe.prompt_syntax, recipe.num_inference_steps, recipe.emphasis)
    negative = recipe.negative_prompt
    return Prompts(
        read_prompt(recipe.prompt, *how), None if negative is None else read_prompt(negative, *how)
    )
