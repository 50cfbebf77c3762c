"""Textual inversion: the same picture as diffusers, everybody's files, and an encoder that is left as it was."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lora import DRAW
from safetensors.torch import load_file, save_file
from test_pipeline import psnr
from tiny import WIDTH, tiny_bert_folder, tiny_clip_folder, tiny_pipeline_folder
from torch import Tensor

from ldm.conditioning.inversion import FILE, NewWords, read_inversion, write_inversion
from ldm.conditioning.load import export, load_text_encoder
from ldm.errors import UserError
from pipelines import TextToImagePipeline
from pipelines.cli import main
from pipelines.recipe import read_recipe
from pipelines.uses import EmbeddingUse

# In lower case, for of mixed case diffusers reads the first vector only where the tokenizer lowers it.
PROMPT = "a photo of <raccoon> the cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_pipeline_folder(tmp_path_factory.mktemp(family), family))


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def theirs_draw(pipe: Any, prompt: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    settings = {key: value for key, value in DRAW.items() if key != "seed"}
    return pipe(prompt, generator=torch.Generator().manual_seed(DRAW["seed"]), **settings).images


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["sd1", "bert"])
def test_the_picture_is_diffusers(
    folder: Callable[[str], Path], tmp_path: Path, family: str, count: int
) -> None:
    import diffusers

    pipe = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
    plain = pipe(PROMPT, **DRAW).images
    write_inversion(tmp_path / FILE, "<raccoon>", {"text_encoder": vectors(count)})
    assert pipe.load_textual_inversion(tmp_path) == ["<raccoon>"]
    drawn = pipe(PROMPT, **DRAW)
    assert drawn.recipes[0].embeddings[0].path == str(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder(family), local_files_only=True)
    theirs.load_textual_inversion(str(tmp_path), weight_name=FILE)
    assert psnr(drawn.images, theirs_draw(theirs, PROMPT)) > 60
    assert psnr(drawn.images, plain) < 45
    with pytest.warns(UserWarning, match="these words are not written.*<raccoon>"):
        pipe.save_pretrained(tmp_path / "saved")
    saved = TextToImagePipeline.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(saved(PROMPT, **DRAW).images, plain)
    pipe.unload_textual_inversion()
    np.testing.assert_array_equal(pipe(PROMPT, **DRAW).images, plain)


def test_sdxls_pair(folder: Callable[[str], Path], tmp_path: Path) -> None:
    import diffusers

    pipe = TextToImagePipeline.from_pretrained(folder("sdxl"), device="cpu")
    both = {"text_encoder": vectors(2), "text_encoder_2": vectors(2, seed=1)}
    write_inversion(tmp_path / "xl.safetensors", "<x>", both)
    stored = load_file(tmp_path / "xl.safetensors")
    assert set(stored) == {"clip_l", "clip_g"}
    pipe.load_textual_inversion(tmp_path / "xl.safetensors", token="<x>")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder("sdxl"), local_files_only=True)
    for name, part in (("clip_l", ""), ("clip_g", "_2")):
        parts = {each: getattr(theirs, each + part) for each in ("text_encoder", "tokenizer")}
        theirs.load_textual_inversion(stored[name], token="<x>", **parts)
    # With the old id in its config transformers would take the new token for the end of the text.
    theirs.text_encoder_2.text_model.eos_token_id = theirs.tokenizer_2.eos_token_id
    assert psnr(pipe("cat <x> dog", **DRAW).images, theirs_draw(theirs, "cat <x> dog")) > 60
    write_inversion(tmp_path / "one.safetensors", "<y>", {"text_encoder": vectors(1)})
    with pytest.raises(
        UserError, match=r"vectors for text_encoder, where this model reads prompts with .*_2"
    ):
        pipe.load_textual_inversion(tmp_path / "one.safetensors")


@pytest.mark.parametrize("build", [tiny_clip_folder, tiny_bert_folder])
def test_a_word_is_its_vectors(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    """Words of one and of several vectors come and go; the encoder that is saved never changes."""
    encoder = load_text_encoder(build(tmp_path))
    names = {name: each.clone() for name, each in export(encoder)["text_encoder"][1].items()}
    table = encoder.module.get_input_embeddings()
    words, plain = NewWords(encoder), encoder.encode(["cat <x> dog"])[0].hidden
    words.add("<y>", vectors(1))
    words.add("<x>", vectors(3, seed=1))
    ids = encoder.tokenize("cat <x> dog")
    assert [each for each in ids if each < 0] == [-2, -3, -4]
    assert [each for each in encoder.tokenize("<x>_2 <y>,<x>") if each < 0] == [-4, -1, -2, -3, -4]
    assert [each for each in encoder.tokenize("<X>") if each < 0] == [
        -2,
        -3,
        -4,
    ]  # as the tokenizer lowers the case
    assert encoder.length(["<x> " * 30]) > encoder.length(["<y> " * 3])
    assert torch.equal(words.embedding(torch.tensor([ids]))[0, 1:4], vectors(3, seed=1))
    words.remove("<y>")
    assert [each for each in encoder.tokenize("cat <x> dog") if each < 0] == [-1, -2, -3]
    assert torch.equal(words.vectors("<x>"), vectors(3, seed=1))
    after = export(encoder)["text_encoder"][1]
    assert after.keys() == names.keys() and all(torch.equal(after[name], names[name]) for name in names)
    assert "<x>" not in encoder.tokenizer.get_vocab()
    words.remove("<x>")
    assert encoder.module.get_input_embeddings() is table
    assert torch.equal(encoder.encode(["cat <x> dog"])[0].hidden, plain)


def test_only_the_new_rows_learn(tmp_path: Path) -> None:
    encoder = load_text_encoder(tiny_clip_folder(tmp_path))
    words = NewWords(encoder)
    words.add("<x>", vectors(2))
    words.embedding.rows.requires_grad_(True)
    trained = [name for name, each in encoder.module.named_parameters() if each.requires_grad]
    assert [name.rpartition(".")[2] for name in trained] == ["rows"]
    encoder.encode(["a <x>"])[0].hidden.square().sum().backward()
    assert all(each.grad is None for each in encoder.module.parameters() if not each.requires_grad)
    assert (words.embedding.rows.grad.norm(dim=1) > 0).all()


def test_everybodys_files(tmp_path: Path) -> None:
    both = {"text_encoder": vectors(2), "text_encoder_2": vectors(2, 1, 48)}
    save_file({"<x>": vectors(1)[0]}, tmp_path / "a.safetensors")
    torch.save({"<x>": vectors(1)[0]}, tmp_path / "b.bin")
    save_file({"emb_params": vectors(2)}, tmp_path / "style.safetensors")
    webui = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors(2)},
        "name": "style",
        "step": 500,
    }
    torch.save(webui, tmp_path / "c.pt")
    save_file({"clip_l": both["text_encoder"], "clip_g": both["text_encoder_2"]}, tmp_path / "xl.safetensors")
    for name, expected in {
        "a.safetensors": {"<x>": {"text_encoder": vectors(1)}},
        "b.bin": {"<x>": {"text_encoder": vectors(1)}},
        "style.safetensors": {"style": {"text_encoder": vectors(2)}},
        "c.pt": {"style": {"text_encoder": vectors(2)}},
        "xl.safetensors": {"xl": both},
    }.items():
        for token in (None, "<mine>"):
            (found,) = read_inversion(tmp_path / name, token).items()
            (word, by) = next(iter(expected.items()))
            assert found[0] == (token or word) and found[1].keys() == by.keys()
            assert all(torch.equal(found[1][each], by[each]) for each in by)


@pytest.mark.parametrize(
    ("content", "token", "words"),
    [
        ({"cat</w>": vectors(1)}, None, "text_encoder knows the word 'cat</w>' already"),
        ({"<a>_1": vectors(1)}, None, "'<a>_1' already"),
        ({"<x>": vectors(1, width=48)}, None, r"\(1, 48\), where text_encoder has vectors of 32"),
        ({"x": torch.ones(2, 3, 4)}, None, "is no embedding of textual inversion: x, text_encoder"),
        ({"<x>": torch.full((1, WIDTH), torch.nan)}, None, "NaN or infinity"),
        ({"<x>": vectors(1), "<y>": vectors(1)}, "<z>", "holds 2 words"),
        (
            {"clip_l": vectors(1), "clip_g": vectors(1, 1)},
            None,
            "vectors for text_encoder and text_encoder_2, where",
        ),
        ({"<x>": vectors(1)}, "two words", "without spaces"),
        ({"<x>": vectors(1)}, "\u0301", "can't be a new word"),
        ({"<x>": vectors(1)}, "x\ud800", "can't be a new word"),
    ],
)
def test_files_that_do_not_fit(
    folder: Callable[[str], Path], tmp_path: Path, content: dict[str, Tensor], token: str | None, words: str
) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    save_file({"<a>": vectors(2)}, tmp_path / "a.safetensors")
    pipe.load_textual_inversion(tmp_path / "a.safetensors")
    save_file(content, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=words):
        pipe.load_textual_inversion(tmp_path / "b.safetensors", token)
    assert pipe("<a>", **DRAW).recipes[0].embeddings[0].path == str(tmp_path / "a.safetensors")


def test_offloaded_and_on_the_command_line(folder: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_inversion(file, "<x>", {"text_encoder": vectors(2)})
    offloaded = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu", low_memory=True)
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    for each in (offloaded, pipe):
        each.load_textual_inversion(file)
    np.testing.assert_array_equal(offloaded("<x>", **DRAW).images, pipe("<x>", **DRAW).images)
    assert pipe.to("cpu", torch.bfloat16)("<x>", **DRAW).images.std() > 0
    out = tmp_path / "old.png"
    arguments = ["<x>", "--model", str(folder("sd1")), "--embedding", str(file), "--steps", "1", "--quiet"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert main(["--from-image", str(out), "--trust", "--out", str(tmp_path / "again.png"), "--quiet"]) == 0
    (use,) = read_recipe(tmp_path / "again.png").embeddings
    assert use == EmbeddingUse(str(file), None, use.hash) and use.hash
