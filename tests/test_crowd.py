"""Unlike drawings in one call of the pipeline: each as alone, each error its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from random_lora import CASES, made
from tiny import tiny_pipeline_folder

from ldm.checkpoints.lora import write_lora
from ldm.errors import UserError
from pipelines import TextToImagePipeline
from pipelines.crowd import Drawn
from pipelines.recipe import Recipe
from pipelines.uses import PictureUse


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> TextToImagePipeline:
    folder = tmp_path_factory.mktemp("model")
    pipe = TextToImagePipeline.from_pretrained(tiny_pipeline_folder(folder, "sd1"), device="cpu")
    write_lora(folder / "ink.safetensors", made(pipe, CASES["sd1"]))
    pipe.adapters.load_lora(folder / "ink.safetensors")
    return pipe


def rows(folder: Path) -> list[Recipe]:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "one.png")
    picture: dict[str, Any] = {"image": PictureUse(str(folder / "one.png"))}
    told: list[dict[str, Any]] = [
        {"sampler": "euler", "num_inference_steps": 3, "guidance_scale": 1.0},
        {"sampler": "dpmpp_2m", "num_inference_steps": 7},
        {"prompt_syntax": "a1111", "prompt": "a cat <lora:ink:0.5>"},
        {"height": 48, "num_inference_steps": 2},
        {"hires_scale": 1.5, "hires_strength": 0.5},
        {**picture, "strength": 0.6},
        {"negative_prompt": "blurry", "guidance_rescale": 0.5},
        {"upscale": 2.0, "sampler": "euler_ancestral"},
        {"prompt": "a cat " * 60},
    ]
    common: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4}
    return [Recipe(**{**common, "seed": k, **each}) for k, each in enumerate(told)]


def test_unlike_rows_are_drawn_together_as_alone(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    recipes = rows(tmp_path)
    alone = [pipe.draw([each]).images[0] for each in recipes]
    found = list(pipe.draw_each(recipes, together=4))
    assert sorted(each.place for each in found) == list(range(len(recipes)))
    assert [each.place for each in found] != list(range(len(recipes)))  # the short ones are done first
    for each in found:
        assert each.error is None and each.image is not None
        pixels = [np.asarray(picture).astype(int) for picture in (each.image, alone[each.place])]
        assert pixels[0].shape == pixels[1].shape
        assert np.abs(pixels[0] - pixels[1]).max() <= 1, each.place
        assert each.recipe.seed == each.place and each.recipe.sampler is not None
    notes = {each.place: each.notes for each in found}
    assert any("windows" in note or "chunks" in note for note in notes[8]) and not notes[0]


def test_calls_are_shared(pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    network, called = pipe.system.network, list[int]()
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda x, *more: (called.append(len(x)), forward(x, *more))[1])
    recipes = [Recipe("a cat", seed=k, num_inference_steps=2 + k, guidance_scale=4.0) for k in range(4)]
    assert len(list(pipe.draw_each(recipes, together=4))) == 4
    assert called == [8, 8, 6, 4, 2]


def test_what_cannot_be_drawn_is_told_and_the_rest_goes_on(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    recipes = [
        Recipe("a cat", seed=0, num_inference_steps=2),
        Recipe("a cat", seed=1, num_inference_steps=0),
        Recipe("a cat", seed=2, image=PictureUse(str(tmp_path / "none.png"))),
        Recipe("a cat", seed=3, num_inference_steps=2),
    ]
    found: dict[int, Drawn] = {each.place: each for each in pipe.draw_each(iter(recipes), together=2)}
    assert {place: each.error is None for place, each in found.items()} == {
        0: True,
        1: False,
        2: False,
        3: True,
    }
    assert "num_inference_steps" in str(found[1].error) and "none.png" in str(found[2].error)
    assert isinstance(found[1].error, UserError) and found[1].recipe == recipes[1]
    with pytest.raises(UserError, match="together is 0"):
        list(pipe.draw_each([], together=0))


def test_one_that_is_closed_gives_the_pipeline_back(pipe: TextToImagePipeline) -> None:
    coming = pipe.draw_each([Recipe("a cat", seed=k, num_inference_steps=2) for k in range(4)], together=1)
    assert next(coming).place == 0
    with pytest.raises(UserError, match="busy"):
        pipe("a cat", num_inference_steps=1, progress=False)
    coming.close()
    assert pipe("a cat", num_inference_steps=1, progress=False).images


def test_one_that_takes_long_holds_few_up(pipe: TextToImagePipeline) -> None:
    """Who keeps the order of the rows holds no more than sixteen pictures for each that is drawn at a time."""
    recipes = [Recipe("a cat", seed=k, num_inference_steps=1) for k in range(50)]
    recipes[0] = Recipe("a cat", seed=0, num_inference_steps=40, sampler="euler")
    held, most, next_place = set[int](), 0, 0
    for each in pipe.draw_each(iter(recipes), together=2):
        held.add(each.place)
        while next_place in held:
            held.remove(next_place)
            next_place += 1
        most = max(most, len(held))
    assert next_place == 50 and 16 <= most <= 33


def test_of_a_sequence_those_alike_are_drawn_next_to_each_other(
    pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, called = pipe.system.network, list[tuple[int, int]]()
    forward = network.forward
    monkeypatch.setattr(
        network, "forward", lambda x, *more: (called.append((len(x), x.shape[-1])), forward(x, *more))[1]
    )
    recipes = [
        Recipe("a cat", seed=k, width=(32, 48)[k % 2], num_inference_steps=2, guidance_scale=4.0)
        for k in range(8)
    ]
    drawn = list(pipe.draw_each(recipes, together=4))
    assert called == [(8, 16)] * 2 + [(8, 24)] * 2 and len({each.place for each in drawn}) == 8
    called.clear()
    assert len(list(pipe.draw_each(iter(recipes), together=4))) == 8
    assert len(called) > 4 and called[:2] == [(4, 16), (4, 24)]  # of an iterator, as they come


def test_waves_begin_together(pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    network, called = pipe.system.network, list[int]()
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda x, *more: (called.append(len(x)), forward(x, *more))[1])
    recipes = [Recipe("a cat", seed=k, num_inference_steps=1 + k % 2, guidance_scale=4.0) for k in range(5)]
    recipes[1] = Recipe("a cat", seed=1, num_inference_steps=0)
    places = [each.place for each in pipe.draw_each(recipes, together=3, waves=True)]
    assert called == [4, 4, 2] and sorted(places) == list(range(5)) and set(places[:3]) == {0, 1, 2}


def test_equal_texts_are_embedded_once(pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    text, embedded = pipe.system.text, list[list[Any]]()
    encode = text.encode
    monkeypatch.setattr(
        text, "encode", lambda prompts, **how: (embedded.append(list(prompts)), encode(prompts, **how))[1]
    )
    prompts = ["a cat", "a dog", "a cat", "a cat <lora:ink:0.5>"]
    recipes = [
        Recipe(each, seed=k, num_inference_steps=1, prompt_syntax="a1111") for k, each in enumerate(prompts)
    ]
    assert all(each.error is None for each in pipe.draw_each(recipes, together=2))
    # The prompts and the empty negative one, and both once more under a LoRA, which may change the encoder.
    texts = sorted(each[0] if isinstance(each[0], str) else each[0].text for each in embedded)
    assert texts == ["", "", "a cat", "a cat ", "a dog"]
