"""The prompts of a recipe, read in its syntax."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.checkpoints.files import a_few
from ldm.conditioning.prompts.reading import read_prompt
from ldm.conditioning.prompts.weighted import Lora, Prompt, Text
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class Prompts:
    """The prompt of one picture, and its negative prompt, None for none."""

    prompt: Prompt
    negative: Prompt | None

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The words of textual inversion that both name as such."""
        return (*self.prompt.embeddings, *(self.negative.embeddings if self.negative else ()))

    def with_loras(self, loras: Sequence[Lora]) -> "Prompts":
        """The same, whose prompt asks for more LoRAs."""
        return replace(self, prompt=replace(self.prompt, loras=(*self.prompt.loras, *loras)))

    @property
    def negative_texts(self) -> list[Text]:
        """Of the negative prompt; none is an empty one."""
        return self.negative.texts if self.negative else [""]


def read_prompts(recipe: Recipe) -> Prompts:
    """Read the prompts of a complete recipe, for its number of steps. Raises UserError."""
    assert recipe.num_inference_steps
    how = (recipe.prompt_syntax, recipe.num_inference_steps, recipe.emphasis)
    prompt = read_prompt(recipe.prompt, *how)
    if recipe.negative_prompt is None:
        return Prompts(prompt, None)
    negative = read_prompt(recipe.negative_prompt, *how)
    if negative.loras:  # in one picture a LoRA has one weight, with the prompt and without it
        names = a_few(list(dict.fromkeys(each.name for each in negative.loras)))
        note = f"the negative prompt asks for LoRAs ({names}), which are asked for by prompts alone: left out"
        negative = replace(negative, notes=(*negative.notes, note))
    return Prompts(prompt, negative)
