"""Text conditioning against diffusers and transformers, on tiny encoders with random weights."""

import hashlib
import importlib.util
import json
import shutil
import socket
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints import read_checkpoint, write_single_file
from ldm.checkpoints.files import read_tensors, write_tensors
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.layouts import canonical_clip, open_clip_rows
from ldm.condition import Condition, concatenate
from ldm.conditioning.cleaning import clean
from ldm.conditioning.inversion import NewWords
from ldm.conditioning.load import build_text_encoder, export, load_text_encoder, write_tokenizers
from ldm.conditioning.prompts.chunks import chunks_of
from ldm.conditioning.sdxl import JoinedEncoder, parts_of
from ldm.conditioning.system import build_conditioning
from ldm.conditioning.text import Window, encode_pair
from ldm.conditioning.tokenizer import (
    EOS,
    clip_tokenizer,
    clip_vocabulary,
    load_tokenizer,
    text_ids,
    window_of,
)
from ldm.emoji import minilm
from ldm.errors import UserError
from ldm.system import System
from tests import tiny

tiny.let_torchvision_import()
OPEN_CLIP = importlib.util.find_spec("open_clip") and importlib.util.find_spec("torchvision")
PROMPTS = ["the cat and a dog!", "a photo"]
LONG = "the cat, " * 50  # 3 tokens each: 150, two chunks of 75


def conditioning(folder: Path) -> Any:
    return build_conditioning(read_checkpoint(folder), folder)


def close(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# Parity with diffusers


@pytest.mark.parametrize("family", ["sd1", "sd2", "bert"])
@pytest.mark.parametrize("negative", [None, ["", "a dog"]])
def test_agrees_with_stable_diffusion(tmp_path: Path, family: tiny.Family, negative: list[str] | None):
    import diffusers

    folder = tiny.tiny_pipeline_folder(tmp_path, family)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        theirs, against = pipeline.encode_prompt(PROMPTS, "cpu", 2, True, negative)
    positive, negatives, notes = encode_pair(conditioning(folder), PROMPTS, negative)
    close(positive.hidden.repeat_interleave(2, dim=0), theirs)
    close(negatives.hidden.repeat_interleave(2, dim=0), against)
    assert positive.pooled is None and notes == []


@pytest.mark.parametrize(
    ("negative", "zeros", "skip"),
    [
        (None, True, 0),
        (None, False, 1),
        (["", ""], True, 0),
        (["a dog", "the"], True, 1),
    ],
)
def test_agrees_with_sdxl(tmp_path: Path, negative: list[str] | None, zeros: bool, skip: int):
    import diffusers

    folder = tiny.tiny_pipeline_folder(tmp_path, "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPTS, device="cpu", negative_prompt=negative, clip_skip=skip)
    positive, negatives, _ = encode_pair(conditioning(folder), PROMPTS, negative, clip_skip=skip)
    ours = positive.hidden, negatives.hidden, positive.pooled, negatives.pooled
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)
    assert bool((negatives.hidden == 0).all()) == (negative is None and zeros)


def test_sdxl_refiner_has_the_second_encoder_alone(tmp_path: Path):
    folder = tiny.tiny_pipeline_folder(tmp_path, "sdxl")
    checkpoint = read_checkpoint(folder)
    whole, _ = build_conditioning(checkpoint, folder).encode(PROMPTS)
    del checkpoint.tensors["text_encoder"]
    refiner = build_conditioning(checkpoint, folder)
    assert isinstance(refiner, JoinedEncoder) and list(refiner.modules) == ["text_encoder_2"]
    alone, _ = refiner.encode(PROMPTS)
    close(alone.hidden, whole.hidden[..., tiny.WIDTH :])
    close(alone.pooled, whole.pooled)  # type: ignore[arg-type]


def test_clip_skip_leaves_out_layers_and_keeps_the_norm(tmp_path: Path):
    encoder = load_text_encoder(tiny.tiny_clip_folder(tmp_path))
    ids = encoder.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    layers = encoder.module(ids, output_hidden_states=True).hidden_states
    tower: Any = getattr(encoder.module, "text_model", encoder.module)
    for skip in (1, 2):
        close(encoder.encode(PROMPTS, clip_skip=skip)[0].hidden, tower.final_layer_norm(layers[-1 - skip]))
    for skip in (-1, 3):
        with pytest.raises(UserError, match="allows 0 to 2"):
            encoder.encode(PROMPTS, clip_skip=skip)


# The mask


def test_bert_masks_padding_only_where_its_config_says_so(tmp_path: Path):
    from transformers import BertModel

    for masked in (True, False):
        folder = tiny.tiny_bert_folder(tmp_path / str(masked), masked)
        encoder = load_text_encoder(folder)
        told = encoder.tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
        theirs = BertModel.from_pretrained(folder / "text_encoder")
        with torch.no_grad():
            wanted = theirs(told.input_ids, attention_mask=told.attention_mask if masked else None)[0]
            other = theirs(told.input_ids, attention_mask=None if masked else told.attention_mask)[0]
        hidden = encoder.encode(PROMPTS)[0].hidden
        close(hidden, wanted)
        assert (hidden - other).abs().max() > 1e-2


@pytest.mark.parametrize("spelling", ["BertTokenizer", "BertTokenizerFast"])
def test_diffusers_draws_with_bert(tmp_path: Path, spelling: str):
    import diffusers

    folder = tiny.tiny_pipeline_folder(tmp_path, "bert")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", spelling]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_standardised_states_have_zero_mean_and_unit_variance(tmp_path: Path) -> None:
    """Folded into the last norm: any loader of the folder sees it, and nothing else of the states is lost."""
    folder = tiny.tiny_bert_folder(tmp_path)
    before = load_text_encoder(folder).encode(PROMPTS)[0].hidden
    minilm.standardise(folder, PROMPTS)
    after = load_text_encoder(folder).encode(PROMPTS)[0].hidden
    torch.testing.assert_close(after.mean((0, 1)), torch.zeros(after.shape[-1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std((0, 1)), torch.ones(after.shape[-1]), atol=1e-3, rtol=0)
    restored = after * before.std((0, 1)) + before.mean((0, 1))
    torch.testing.assert_close(restored, before, atol=1e-4, rtol=1e-4)


def test_minilm_is_prepared_for_both_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import BertModel, BertTokenizerFast

    source = tiny.tiny_bert_folder(tmp_path / "made") / "text_encoder"
    BertTokenizerFast.from_pretrained(tmp_path / "made/tokenizer").save_pretrained(source)
    tiny.bert_tokenizer_folder(source)
    (source / "special_tokens_map.json").write_text("{}")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not the published"):
        minilm.minilm_from_package(out / "text_encoder", out / "tokenizer", source=source)
    with pytest.raises(UserError, match="layers is 0"):
        minilm.minilm_from_package(out / "text_encoder", out / "tokenizer", source=source, layers=0)
    with pytest.raises(UserError, match="there is no"):
        minilm.minilm_from_package(out / "text_encoder", out / "tokenizer", source=tmp_path)
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(minilm, "WEIGHTS_SHA256", digest)
    minilm.minilm_from_package(out / "text_encoder", out / "tokenizer", max_length=12, source=source)
    assert {each.dtype for each in read_tensors(out / "text_encoder/model.safetensors").values()} == {
        torch.float16
    }
    encoder = load_text_encoder(out)
    theirs, report = BertModel.from_pretrained(out / "text_encoder", output_loading_info=True)
    assert not any(report.values()) and theirs.dtype == torch.float32
    told = encoder.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    assert told.input_ids.shape == (2, 12) and encoder.window.size == 12
    with torch.no_grad():
        wanted = theirs(told.input_ids, attention_mask=told.attention_mask)[0]
    close(encoder.encode(PROMPTS)[0].hidden, wanted)
    minilm.minilm_from_package(
        tmp_path / "first/text_encoder", tmp_path / "first/tokenizer", 12, source, layers=1
    )
    first = BertModel.from_pretrained(tmp_path / "first/text_encoder")
    with torch.no_grad():
        inside = theirs(
            told.input_ids, attention_mask=told.attention_mask, output_hidden_states=True
        ).hidden_states[1]
        short = first(told.input_ids, attention_mask=told.attention_mask)[0]
    torch.testing.assert_close(short, inside)


# Prompts longer than the window


def test_a_long_clip_prompt_becomes_chunks(tmp_path: Path):
    encoder = load_text_encoder(tiny.tiny_clip_folder(tmp_path, projection=True))
    tokens = encoder.tokenize(LONG)
    assert len(tokens) > 75 and 77 * -(-len(tokens) // 75) == encoder.length([LONG])
    embedding, notes = encoder.encode([LONG, "a photo"])
    start, stop, pad = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id, encoder.window.pad
    chunks = [tokens[i : i + 75] for i in range(0, len(tokens), 75)]
    rows = [([start, *each, stop] + [pad] * 77)[:77] for each in chunks]
    output = encoder.module(torch.tensor(rows))
    close(embedding.hidden[0], output.last_hidden_state.flatten(0, 1))
    close(embedding.pooled[0], output.text_embeds[0])  # type: ignore[index]
    short = encoder.encode(["a photo", ""])[0]
    close(embedding.hidden[1, :77], short.hidden[0])
    close(embedding.hidden[1, 77:154], short.hidden[1])  # filled with the empty prompt
    start_of_note = f'prompt "the cat, the cat, the ca..." of {len(tokens)} tokens'
    assert notes == [f"{start_of_note} was encoded in {len(chunks)} chunks of 75"]


def test_the_window_is_full_at_75_tokens(tmp_path: Path):
    encoder = load_text_encoder(tiny.tiny_clip_folder(tmp_path))
    full = " ".join(["the"] * 75)
    assert len(encoder.tokenize(full)) == 75
    assert encoder.length([full]) == 77 and encoder.encode([full])[1] == []
    assert encoder.length([full + " the"]) == 154 and len(encoder.encode([full + " the"])[1]) == 1


@pytest.mark.parametrize("family", ["sd1", "sdxl", "bert"])
def test_prompt_and_negative_come_at_one_length(tmp_path: Path, family: tiny.Family):
    encoder = conditioning(tiny.tiny_pipeline_folder(tmp_path, family))
    for prompts, negatives in ((["a photo"], [LONG]), ([LONG], ["a photo"]), ([LONG], None)):
        positive, negative, notes = encode_pair(encoder, prompts, negatives)
        assert positive.hidden.shape == negative.hidden.shape
        assert positive.hidden.shape[1] == encoder.length([LONG])
        assert len(notes) == 1  # once, though both of SDXL's encoders cut it


def test_t5_reads_a_long_prompt_whole(tmp_path: Path):
    from transformers import T5EncoderModel

    folder = tiny.tiny_t5_folder(tmp_path)
    encoder = load_text_encoder(folder)
    theirs = T5EncoderModel.from_pretrained(folder / "text_encoder")
    for prompts, size in ((["a cat", "a photo of"], 16), (["a cat", "the raccoon and the dog"], 25)):
        told = encoder.tokenizer(prompts, padding="max_length", max_length=size, return_tensors="pt")
        with torch.no_grad():
            wanted = theirs(told.input_ids, attention_mask=told.attention_mask)[0]
        embedding, notes = encoder.encode(prompts)
        close(embedding.hidden, wanted)
        assert [note.partition(" of ")[2] for note in notes] == (
            [] if size == 16 else ["24 tokens was encoded whole, beyond the usual 15"]
        )
    with pytest.raises(UserError, match="clip_skip"):
        encoder.encode(["a"], clip_skip=1)


def test_a_prompt_given_twice_is_run_once(tmp_path: Path):
    encoder = load_text_encoder(tiny.tiny_clip_folder(tmp_path, projection=True))
    batches: list[int] = []
    encoder.module.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    embedding, _ = encoder.encode(["a cat", "", "a cat", ""])
    assert batches == [2]
    assert torch.equal(embedding.hidden[0], embedding.hidden[2])
    assert embedding.pooled is not None and embedding.pooled.shape[0] == 4
    assert torch.equal(embedding.pooled[1], embedding.pooled[3])


def test_windows():
    window = Window(5, (1,), (2,), 0)
    assert window.capacity == 3
    assert window.fill([7]) == ([1, 7, 2, 0, 0], [1, 1, 1, 0, 0])
    parts = {
        text: chunks_of(text, lambda text: [*text.encode()], 3) for text in ("", "abc", "abcd", "abcdefg")
    }
    assert [len(each) for each in parts.values()] == [1, 1, 2, 3] and parts["abcd"][1].ids == (ord("d"),)
    assert window.stretched(2) == window and window.stretched(8).size == 10


def test_embeddings():
    one = Condition(torch.arange(6.0).view(2, 1, 3), torch.arange(2.0).view(2, 1))
    both = concatenate([one, one.zeros()]).to(dtype=torch.float64)
    assert both.hidden.shape == (4, 1, 3) and both.pooled is not None and both.pooled.dtype == torch.float64
    with pytest.raises(ValueError, match="pooled"):
        concatenate([one, Condition(one.hidden)])


# Loading and saving


def test_loading_needs_no_network_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    folder = tiny.tiny_pipeline_folder(tmp_path, "sdxl")
    tiny.tiny_bert_folder(tmp_path / "bert")
    capfd.readouterr()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    conditioning(folder).encode([LONG])
    load_text_encoder(tmp_path / "bert").encode([LONG])
    assert capfd.readouterr() == ("", "")


def test_weights_are_frozen_in_the_asked_precision(tmp_path: Path):
    encoder = load_text_encoder(tiny.tiny_clip_folder(tmp_path), torch_dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.module.parameters()) and not encoder.module.training
    assert encoder.encode(["a"])[0].hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("skip", [0, 1])
def test_offloaded_weights_give_the_same(tmp_path: Path, skip: int):
    from accelerate import cpu_offload

    encoder = load_text_encoder(tiny.tiny_clip_folder(tmp_path, projection=True))
    wanted = encoder.encode(PROMPTS, clip_skip=skip)[0]
    cpu_offload(encoder.module, execution_device=torch.device("cpu"))
    assert next(encoder.module.parameters()).is_meta  # the weights come only while a layer runs
    found = encoder.encode(PROMPTS, clip_skip=skip)[0]
    assert torch.equal(found.hidden, wanted.hidden)
    close(found.pooled, wanted.pooled)  # type: ignore[arg-type]


def test_published_names_are_written_and_both_are_read(tmp_path: Path):
    from transformers import CLIPTextModel

    folder = tiny.tiny_clip_folder(tmp_path / "made")
    encoder = load_text_encoder(folder)
    config, tensors = export(encoder)["text_encoder"]
    assert all(name.startswith("text_model.") for name in tensors)
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # as in older folders
    write_tensors(tmp_path / "text_encoder/model.safetensors", tensors | positions)
    (tmp_path / "text_encoder/config.json").write_text(json.dumps(config))
    write_tokenizers(encoder, tmp_path)
    wanted = encoder.encode(PROMPTS)[0].hidden
    assert torch.equal(load_text_encoder(tmp_path).encode(PROMPTS)[0].hidden, wanted)
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    ids = encoder.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    close(wanted, theirs(ids)[0])


def test_a_t5_folder_comes_back(tmp_path: Path):
    encoder = load_text_encoder(tiny.tiny_t5_folder(tmp_path))
    config, tensors = export(encoder)["text_encoder"]
    assert set(tensors) == set(read_tensors(tmp_path / "text_encoder/model.safetensors"))
    assert config["use_attention_mask"] is True  # what was done, for readers that ask the config
    again = build_text_encoder(config, tensors, encoder.tokenizer)
    assert torch.equal(again.encode(PROMPTS)[0].hidden, encoder.encode(PROMPTS)[0].hidden)


def test_a_whole_clip_gives_its_text_half(tmp_path: Path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    text = tiny.clip_model().config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    whole = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    )
    whole.eval().save_pretrained(tmp_path)
    tiny.clip_tokenizer_folder(tmp_path)
    encoder = load_text_encoder(tmp_path, component="", tokenizer="")
    ids = encoder.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    close(encoder.encode(PROMPTS)[0].hidden, whole.text_model(ids)[0])


# CLIP's own vocabulary


def test_clip_vocabulary_has_clips_size():
    assert len(clip_vocabulary([f"{n} x" for n in range(48_894)])) == 49_408


def test_clip_tokenizer_gives_the_published_ids():
    tokenizer = clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Photo, of a CAT").input_ids == [49406, 320, 1125, 267, 539, 320, 2368, 49407]
    assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (77, 49407)
    padded = clip_tokenizer(pad_token="!")("a cat", padding="max_length").input_ids
    assert padded == [49406, 320, 2368, 49407] + [0] * 73


# The token ids of OpenAI's own simple_tokenizer.py, run once on these; see docs/prompts.md.
AS_CLIP_READS: list[tuple[str, list[int]]] = [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("DON’T look", [847, 713, 1012]),
    ("it's we're I'LL", [585, 568, 649, 982, 328, 1342]),
    ("“quoted” ‘text’", [257, 27706, 257, 713, 20072, 262]),
    ("ﬁre and ﬂame", [1769, 537, 13484]),
    ("\uff26\uff35\uff2c\uff2c\u3000\uff57\uff49\uff44\uff54\uff48 \uff11\uff12", [1476, 23571, 272, 273]),
    ("salt &amp; pepper", [6611, 261, 8253]),
    ("salt &amp;amp; pepper", [6611, 261, 8253]),
    ("&lt;b&gt;bold&lt;/b&gt; caf&eacute;", [283, 321, 285, 8911, 34308, 321, 285, 15304]),
    ("<b>salt &amp; pepper</b>", [283, 321, 285, 6611, 261, 8253, 34308, 321, 285]),
    ("itâ€™s broken", [585, 568, 5107]),
    ("cafÃ©", [15304]),
    ("\N{BYTE ORDER MARK}a cat", [320, 2368]),
    (
        "zero\u200bwidth \U0001f468\u200d\U0001f469\u200d\U0001f467",
        [5848, 9844, 23571, 25023, 26304, 964, 356],
    ),
    ("soft\xadhyphen", [3773, 22618, 1441, 745, 576]),
    ("a\tb\r\nc\xa0d\u3000e", [320, 321, 322, 323, 324]),
    ("red\x1b[31m car\x07", [736, 1615]),
    ("&nbsp;a&#8217;s &#x1F600;", [320, 568, 7334]),
    ("cafe\u0301 \u212b", [15304, 127, 354]),
    ("Straße ΟΔΟΣ İ", [1894, 127, 253, 324, 138, 123, 138, 112, 138, 123, 139, 480, 328, 16384]),
    (
        "北京的猫 ｶﾀｶﾅ",
        [161, 234, 245, 21078, 105, 163, 248, 226, 163, 234, 360, 37367, 34941, 37367, 2429, 488],
    ),
    ("고양이 КОТ", [36216, 254, 31625, 239, 34746, 27152, 13506, 141, 480]),
    ("½ Ⅷ ²³ ٣", [33613, 158, 227, 371, 41175, 126, 367, 149, 352]),
    (
        "2019-01-01, 100% (1.5)",
        [273, 271, 272, 280, 268, 271, 272, 268, 271, 272, 267, 272, 271, 271, 260, 263, 272, 269, 276, 264],
    ),
    ("😀❤️ 🇩🇪", [12832, 1752, 21531]),
    ("a — b – c … d", [320, 2005, 321, 1224, 322, 959, 323]),
    ("cat<|endoftext|>dog", [2368, 49407, 1929]),
    ("<|ENDOFTEXT|>", [49407]),
    ("<start_of_text>", [283, 1572, 318, 539, 318, 4160, 285]),
    ("!!! ?! 'tis rock 'n' roll", [995, 2835, 713, 533, 2172, 262, 333, 262, 3341]),
    (
        "https://example.com/?a=b&c=d",
        [30901, 12441, 6228, 269, 2464, 14, 286, 320, 284, 321, 261, 322, 284, 323],
    ),
    ("", []),
    ("   ", []),
]


@pytest.mark.parametrize(("text", "ids"), AS_CLIP_READS, ids=lambda each: ascii(each)[:24])
def test_clip_reads_a_text_as_the_original_does(text: str, ids: list[int]):
    assert text_ids(clip_tokenizer(), text) == ids


def test_clip_reads_all_blocks_as_open_clip_does():
    """One character of every 16 of the plane that people type in, alone and in a word."""
    theirs = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    tokenizer = clip_tokenizer()
    # Unassigned and rare letters, of which the two libraries' Unicode tables have different views, are left out.
    points = [c for c in range(0x20, 0x3000, 16) if unicodedata.category(chr(c))[0] in "LNPSZ"]
    texts = [f"a{chr(c)}b {chr(c)} {chr(c)}’s" for c in points]
    assert len(texts) > 500 and [text_ids(tokenizer, each) for each in texts] == list(
        map(theirs.encode, texts)
    )


def test_new_words_are_not_cleaned_away(tmp_path: Path):
    """Where the signs of a word mean something in HTML, are mended or lowered, it is the word all the same."""
    encoder = load_text_encoder(tiny.tiny_clip_folder(tmp_path))
    words = NewWords(encoder)
    for k, word in enumerate(["<Cat-Toy>", "&lt;s&gt;", "sks…", "don’t", "&amp;"]):
        words.add(word, torch.ones(tiny.WIDTH))
        assert encoder.tokenize(word) == [-1 - k]
    the, dog = encoder.tokenize("the"), encoder.tokenize("dog’s")
    assert dog == encoder.tokenize("dog's")
    assert encoder.tokenize("the <Cat-Toy> the") == [*the, -1, *the]
    assert encoder.tokenize("the &lt;s&gt; dog’s") == [*the, -2, *dog]
    assert encoder.tokenize("the sks… the don’t the &amp; dog’s") == [*the, -3, *the, -4, *the, -5, *dog]
    assert encoder.tokenize("<cat-toy>") == [-1]  # as transformers looks for added words: in any case


def test_only_clip_is_cleaned(tmp_path: Path):
    encoder = load_text_encoder(tiny.tiny_bert_folder(tmp_path))
    raw = encoder.tokenizer("a &amp; b", add_special_tokens=False).input_ids
    assert encoder.tokenize("a &amp; b") == raw != encoder.tokenize("a & b")


def test_cleaning_takes_no_time_that_grows_with_the_square():
    for text in ("don’t &amp; ", "&amp;", "&", "â€™", "&#", "<", " "):
        assert len(clean((text * 100_000)[:100_000])) <= 100_000  # a square would take minutes


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_has_clips_tokenizer(
    tmp_path: Path, family: tiny.Family, monkeypatch: pytest.MonkeyPatch
):
    """Nothing but this package is needed for it, and SD 2.x and SDXL's second encoder pad with "!"."""
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    monkeypatch.setattr(tiny, "CLIP_VOCABULARY", 49408)
    checkpoint = read_checkpoint(tiny.tiny_pipeline_folder(tmp_path, family))
    write_single_file(tmp_path / "one.safetensors", checkpoint)
    encoder = build_conditioning(read_checkpoint(tmp_path / "one.safetensors"), None)
    windows = [part.window for part in parts_of(encoder)]
    pads = {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}[family]
    assert windows == [Window(77, (49406,), (49407,), pad) for pad in pads]
    assert [part.tokenize("a photo of a cat") for part in parts_of(encoder)] == [
        [320, 1125, 539, 320, 2368]
    ] * len(pads)
    assert bool(encoder.encode(PROMPTS)[0].hidden.isfinite().all())


def test_tokenizer_folder_is_read(tmp_path: Path):
    tokenizer = load_tokenizer(tiny.clip_tokenizer_folder(tmp_path), "clip")
    assert tokenizer.pad_token == EOS
    assert tokenizer.decode(tokenizer("the cat").input_ids, skip_special_tokens=True) == "the cat"


def tiny_folder(tmp_path: Path, family: str) -> Path:
    made = {"clip": tiny.tiny_clip_folder, "bert": tiny.tiny_bert_folder, "t5": tiny.tiny_t5_folder}
    return made[family](tmp_path / family)


@pytest.mark.parametrize("family", ["clip", "bert", "t5"])
def test_a_tokenizer_without_its_files_is_refused(tmp_path: Path, family: str):
    """transformers would build an empty vocabulary, and take another window, and say nothing."""
    folder = tiny_folder(tmp_path, family)
    settings = folder / "tokenizer/tokenizer_config.json"
    text = settings.read_text()
    settings.unlink()
    with pytest.raises(UserError, match=r"tokenizer holds no tokenizer_config\.json"):
        load_text_encoder(folder)
    for each in (folder / "tokenizer").iterdir():
        each.unlink()
    for contents in ({}, {settings: text}):
        for path, content in contents.items():
            path.write_text(content)
        with pytest.raises(UserError, match=r"tokenizer holds no vocabulary: a .* has tokenizer\.json, or "):
            load_text_encoder(folder)


@pytest.mark.parametrize("named", ["vocabulary", "json"])
@pytest.mark.parametrize("encoder", ["clip", "bert", "t5"])
@pytest.mark.parametrize("tokenizer", ["clip", "bert", "t5"])
def test_a_tokenizer_of_another_family_is_refused(tmp_path: Path, encoder: str, tokenizer: str, named: str):
    if encoder == tokenizer:
        return
    folder, other = tiny_folder(tmp_path, encoder), tiny_folder(tmp_path, tokenizer) / "tokenizer"
    if named == "json":  # the name that all families share
        load_tokenizer(other, tokenizer).save_pretrained(other)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(other, folder / "tokenizer")
    with pytest.raises(UserError) as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value)
    assert any(
        words in str(caught.value)
        for words in ("belong to different models", "cannot read the", "holds no vocabulary")
    )


def test_a_tokenizer_that_fails_at_an_unknown_word_is_refused(tmp_path: Path):
    """It is read without a complaint; the tokenizers library then raises a bare Exception in the midst of a prompt."""
    path = tiny.clip_tokenizer_folder(tmp_path) / "vocab.json"
    words = {word: number for word, number in json.loads(path.read_text()).items() if word.isascii()}
    del words[EOS]  # which stands for unknown words
    path.write_text(json.dumps(words))
    with pytest.raises(
        UserError, match=r"cannot read the clip tokenizer .*lacks its unk_token '<\|endoftext\|>'"
    ):
        load_tokenizer(tmp_path, "clip")


@pytest.mark.parametrize(("key", "value"), [("model_max_length", "long"), ("pad_token", None)])
def test_settings_that_make_no_window_are_refused(tmp_path: Path, key: str, value: Any):
    tokenizer = load_tokenizer(tiny.clip_tokenizer_folder(tmp_path), "clip")
    setattr(tokenizer, key, value)
    with pytest.raises(UserError, match="needs a pad_token and a model_max_length"):
        window_of(tokenizer, 77)


# OpenCLIP


def open_clip_folder(
    tmp: Path, prefix: str = "", weights: str = "open_clip_model.safetensors"
) -> tuple[Path, Any]:
    """A `text_encoder` folder as a hub repository of OpenCLIP is, and the transformers CLIP that it was made from."""
    model = tiny.clip_model(projection=True, act="gelu", layers=3)
    ours = canonical_clip(model.state_dict())
    theirs = KeyMap.over_ours(open_clip_rows(layers=3), ours, "test").to_theirs(ours)
    theirs = {prefix + name: each for name, each in theirs.items()} | {"visual.x": torch.zeros(1)}
    path = tmp / "text_encoder" / weights
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, theirs) if path.suffix == ".safetensors" else torch.save(theirs, path)
    text = {"vocab_size": 49408, "width": tiny.WIDTH, "heads": 4, "layers": 3, "mlp_ratio": 2.0}
    config = {"model_cfg": {"embed_dim": 24, "text_cfg": text, "vision_cfg": {}}}
    (path.parent / "open_clip_config.json").write_text(json.dumps(config))
    return tmp, model


needs_open_clip = pytest.mark.skipif(not OPEN_CLIP, reason="needs the open_clip package and its torchvision")


@needs_open_clip
@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip_agrees_with_transformers(
    tmp_path: Path, prefix: str, weights: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny, "CLIP_VOCABULARY", 49408)
    folder, theirs = open_clip_folder(tmp_path, prefix, weights)
    prompts = ["a photo of a cat", "a cat, " * 30]
    long = clip_tokenizer()(prompts[1], add_special_tokens=False, verbose=False).input_ids
    rows = [[49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70, [49406, *long[:75], 49407]]
    output = theirs(torch.tensor(rows), output_hidden_states=True)
    norm = theirs.text_model.final_layer_norm
    for penultimate in (False, True):
        encoder = load_text_encoder(folder, penultimate=penultimate)
        assert encoder.window == Window(77, (49406,), (49407,), 0)
        embedding, notes = encoder.encode(prompts)
        hidden = output.hidden_states[-1 - penultimate]
        torch.testing.assert_close(
            embedding.hidden[:, :77], hidden if penultimate else norm(hidden), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(embedding.pooled, output.text_embeds, rtol=1e-5, atol=1e-5)
        assert "2 chunks" in notes[0]
    with pytest.raises(UserError, match="allows 0 to 1"):
        encoder.encode(prompts, clip_skip=2)
    with pytest.raises(UserError, match="takes no new words"):
        NewWords(encoder).add("<toy>", torch.zeros(tiny.WIDTH))


@needs_open_clip
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_system_with_an_open_clip_encoder_is_drawn_and_saved(
    tmp_path: Path, family: tiny.Family, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny, "CLIP_VOCABULARY", 49408)
    folder = tiny.tiny_pipeline_folder(tmp_path, family)
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    name = "text_encoder_2" if family == "sdxl" else "text_encoder"
    made, _ = open_clip_folder(tmp_path / "made")
    shutil.rmtree(folder / name)
    (made / "text_encoder").rename(folder / name)
    system = System.load(folder)
    wanted = system.text.encode(PROMPTS)[0]
    system.save(tmp_path / "saved")
    again = System.load(tmp_path / "saved").text
    assert type(again.modules[name]).__name__.startswith("CLIPTextModel")
    torch.testing.assert_close(again.encode(PROMPTS)[0].hidden, wanted.hidden, rtol=1e-5, atol=1e-5)
    if family == "sdxl":
        assert wanted.pooled is not None
        torch.testing.assert_close(again.encode(PROMPTS)[0].pooled, wanted.pooled, rtol=1e-5, atol=1e-5)


@needs_open_clip
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_type": "last"}, "not pool_type = 'last'"),
        ({"hf_model_name": "roberta"}, "not hf_model_name"),
        ({"no_such_key": 1}, "not no_such_key"),
        ({"width": "x"}, "width is 'x', where a whole number from 1 to"),
        ({"heads": 5}, "open_clip refuses the config"),
        ({"layers": 4}, "missing"),
        ({"vocab_size": 520}, "belong to different models|another shape"),
    ],
)
def test_an_open_clip_config_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny, "CLIP_VOCABULARY", 49408)
    folder, _ = open_clip_folder(tmp_path)
    path = folder / "text_encoder/open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value)


def test_missing_open_clip_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, _ = open_clip_folder(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'ldm-text-to-image\[openclip\]'"):
        load_text_encoder(folder)


# Mistakes


def test_mistakes_get_one_clear_line(tmp_path: Path):
    folder = tiny.tiny_clip_folder(tmp_path)
    encoder = load_text_encoder(folder)
    for prompts in ([], "a cat", [3], [["a"]]):
        with pytest.raises(UserError, match="list of at least one prompt"):
            encoder.encode(prompts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 negative prompts for 2"):
        encode_pair(encoder, PROMPTS, ["a"])
    with pytest.raises(UserError, match="nowhere"):
        load_text_encoder(folder, "nowhere")
    with pytest.raises(UserError, match="no tokenizer folder"):
        load_text_encoder(folder, tokenizer="nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModle"]}, "did you mean BertModel"),
        ({"architectures": 5, "model_type": []}, "no text encoder we know"),
        ({"architectures": [["BertModel"]]}, "no text encoder we know"),
        ({"hidden_size": 64}, "of another shape"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"architectures": ["CLIPTextModelWithProjection"]}, "text_projection"),
        ({"num_attention_heads": 5}, "refuses the config"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    folder = tiny.tiny_clip_folder(tmp_path)
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path):
    folder = tiny.tiny_clip_folder(tmp_path)
    weights = folder / "text_encoder/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_text_encoder(folder)
    weights.write_bytes(whole)
    (folder / "tokenizer/vocab.json").write_text("{")
    with pytest.raises(UserError, match=r"vocab\.json is not valid JSON") as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value)


def test_joined_encoders_need_one_window(tmp_path: Path):
    folder = tiny.tiny_pipeline_folder(tmp_path, "sdxl")
    tiny.clip_tokenizer_folder(folder / "tokenizer_2", "!", size=50)
    (folder / "tokenizer_2/tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="text_encoder 77, text_encoder_2 50"):
        conditioning(folder)
