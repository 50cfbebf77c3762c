"""What users of diffusers hand to a call: generators, latents, embeddings; and their names for LoRAs."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lora import CASES, made
from tiny import tiny_pipeline_folder

from ldm.checkpoints.lora import write_lora
from ldm.errors import UserError
from pipelines import TextToImagePipeline

SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_pipeline_folder(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def pipe(folder: Callable[[str], Path]) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")


def theirs(path: Path) -> Any:
    import diffusers

    found = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def far(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_same_arguments_draw_the_same_picture(folder: Callable[[str], Path], family: str) -> None:
    """One generator for two images, then latents and embeddings, handed to both; far below one step of 255."""
    reference, ours = (
        theirs(folder(family)),
        TextToImagePipeline.from_pretrained(folder(family), device="cpu"),
    )
    expected = reference("cat", num_images_per_prompt=2, generator=seeded(3), **SETTINGS).images
    drawn = ours("cat", num_images_per_prompt=2, generator=seeded(3), **SETTINGS)
    assert far(drawn.images, expected) < 1e-3
    assert expected.std() > 0.02
    assert "generator" in drawn.recipes[0].beside  # its neighbour draws on from the same one

    found = reference.encode_prompt(
        "the dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    embeds = dict(zip(EMBEDS, found, strict=False))
    latents = torch.randn(2, 4, 16, 16, generator=seeded(5))
    shared: dict[str, Any] = {"num_images_per_prompt": 2, "latents": latents, **embeds, **SETTINGS}
    expected = reference(height=32, width=32, **shared).images
    drawn = ours(height=32, width=32, **shared)
    assert far(drawn.images, expected) < 1e-3
    assert set(drawn.recipes[0].beside) == {"latents", "prompt_embeds", "negative_prompt_embeds"}


def test_embeddings_are_prompts(pipe: TextToImagePipeline) -> None:
    """With a prompt's own embeddings, its negative told or not, a picture is the prompt's."""
    own, _ = pipe.system.text.encode(["cat"])
    against, _ = pipe.system.text.encode(["dog"])
    plain = pipe("cat", seed=1, **SETTINGS).images
    assert far(pipe(prompt_embeds=own.hidden, seed=1, **SETTINGS).images, plain) < 1e-5
    both = pipe("cat", negative_prompt="dog", seed=1, **SETTINGS).images
    assert far(both, plain) > 1 / 255
    assert far(pipe(prompt_embeds=own.hidden, negative_prompt="dog", seed=1, **SETTINGS).images, both) < 1e-5
    told = pipe("cat", negative_prompt_embeds=against.hidden, seed=1, **SETTINGS)
    assert far(told.images, both) < 1e-5


def test_a_fresh_generator_is_its_seed(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    """Where a seed draws the same, the recipe has it; else it says what is missing, and is refused."""
    settings = {**SETTINGS, "output_type": "pil"}
    drawn = pipe(["cat", "dog"], generator=[seeded(7), seeded(9)], **settings)
    assert [(each.seed, each.beside) for each in drawn.recipes] == [(7, ()), (9, ())]
    again = pipe.draw(drawn.recipes[1:])
    assert np.array_equal(again.images[0], drawn.images[1])
    used = seeded(7)
    torch.randn(3, generator=used)
    drawn = pipe("cat", generator=used, **settings)
    assert drawn.recipes[0].beside == ("generator",)
    with pytest.raises(UserError, match="drawn from generator beside its recipe"):
        pipe.draw(drawn.recipes)


BAD = {
    "seed_and_generator": ({"seed": 1, "generator": seeded(1)}, "same thing twice"),
    "prompt_and_embeds": ({"prompt_embeds": torch.zeros(1, 8, 32)}, "same thing twice"),
    "generators": ({"generator": [seeded(1)] * 3}, "3 of them"),
    "no_generator": ({"generator": 7}, "a int"),
    "latents": ({"latents": torch.zeros(2, 4, 16, 16)}, "for 1 images"),
    "latents_of_another_size": ({"latents": torch.zeros(1, 4, 8, 8)}, "has"),
    "pooled_alone": ({"negative_pooled_prompt_embeds": torch.zeros(1, 8)}, "give both"),
    "other_features": ({"negative_prompt_embeds": torch.zeros(1, 77, 5)}, "features of hidden"),
    "other_length": ({"negative_prompt_embeds": torch.zeros(1, 5, 32)}, "length|windows|tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(pipe: TextToImagePipeline, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        pipe("cat", **{**SETTINGS, **arguments})
    assert "\n" not in str(caught.value)


def test_names_of_diffusers_for_loras(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The same calls, in the same order, on both: the same pictures after each."""
    pytest.importorskip("peft")
    reference, ours = theirs(folder("sd1")), TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    for k, name in enumerate(("a", "b")):
        write_lora(tmp_path / f"{name}.safetensors", made(ours, CASES["sd1"], rank=2 + k), "diffusers")

    def same() -> np.ndarray:
        expected = reference("cat", generator=seeded(0), **SETTINGS).images
        assert far(ours("cat", seed=0, **SETTINGS).images, expected) < 1e-3
        return expected

    plain = same()
    for pipe in (reference, ours):
        pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
        pipe.load_lora_weights(tmp_path / "b.safetensors", adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.5, 0.7])
    both = same()
    assert far(plain, both) > 1 / 255
    for pipe in (reference, ours):
        pipe.set_adapters("a")
        assert pipe.get_active_adapters() == ["a"]
    same()
    for pipe in (reference, ours):
        pipe.fuse_lora(adapter_names=["a"], lora_scale=0.5)
    same()
    for pipe in (reference, ours):
        pipe.unfuse_lora()
        pipe.delete_adapters("a")
        pipe.unload_lora_weights()
    assert far(same(), plain) < 1e-5
