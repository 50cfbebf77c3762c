"""Our tokenizers against transformers', on texts that are hard to read, and on the forms that folders have."""

import copy
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import BertTokenizerFast, CLIPTokenizerFast

from ldm.conditioning.tokenizer import clip_merges, load_tokenizer, write_clip_tokenizer
from ldm.errors import UserError
from ldm.foreign import foreign

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    *(
        "",
        "   ",
        "a photo of a cat",
        "A Photo, of a CAT!!! ???",
        "don't they're I'LL 12345 3.14",
        "a_b-c/d\\e",
    ),
    *("naïve café CAFÉ", "e\u0301 \u212b ﬁ Å", "İstanbul ß ǅ", "a &amp; b &lt;x&gt;", "it’s “quoted”"),
    *("日本語 テスト 漢字kanji 한국어", "ไทย हिन्दी العربية עברית", "𝒜𝓑𝒞 𠮷野家", "\ufeffbom"),
    *("👩‍🚀 astronaut 🏳️‍🌈 \U0001f9d1\U0001f3fd", "a\u200bb\u00adc", "\x00\x01\x7f\t\n\r x\u0085y\u2028z"),
    *("x" * 300, "antidisestablishmentarianism" * 20, "a " * 200),
    *("<|endoftext|> a <|startoftext|>", "[CLS] a [MASK][SEP] [UNK] [PAD]", "<toy> x<toy>y <TOY> <x1><x2>"),
]
KINDS: Mapping[str, Any] = {"clip": CLIPTokenizerFast, "bert": BertTokenizerFast}
NAMED = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")


def texts() -> list[str]:
    rng = random.Random(0)
    ranges = [(32, 127), (32, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x1FFFF)]
    return TEXTS + ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(50)) for _ in range(50)]


def agree(folder: Path, architecture: str) -> Any:
    """Assert that our tokenizer of a folder is transformers', and return it."""
    ours = load_tokenizer(folder, architecture)
    theirs = KINDS[architecture].from_pretrained(folder)
    for text in texts():
        found, alone = ours(text), ours(text, add_special_tokens=False).input_ids
        wanted = theirs(text)
        assert dict(found) == dict(wanted), ascii(text)
        assert alone == theirs(text, add_special_tokens=False).input_ids, ascii(text)
        assert ours.tokenize(text) == theirs.tokenize(text)
        for skip in (False, True):
            assert ours.decode(found.input_ids, skip) == theirs.decode(wanted.input_ids, skip)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    assert ours.get_added_vocab() == theirs.get_added_vocab() == ours.added_tokens_encoder
    for name in [
        *(f"{each}_token" for each in NAMED),
        *(f"{each}_token_id" for each in NAMED),
        "model_max_length",
    ]:
        assert getattr(ours, name) == getattr(theirs, name), name
    for tokens in ("nosuchtokenatall", ["a", theirs.unk_token]):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    for ids in (5, [5, 6], torch.tensor([5, 6])):
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    return ours


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own vocabulary; copy it before changing it."""
    folder = tmp_path_factory.mktemp("clip")
    write_clip_tokenizer(folder, clip_merges())
    (folder / "special_tokens_map.json").unlink()  # which has the last word
    return folder


def changed(folder: Path, out: Path, **settings: Any) -> Path:
    """A copy of a tokenizer's folder with other settings."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return out


BERT = ROOT / "weights/emoji-128/tokenizer"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"strip_accents": True},
        {"strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
    ids=str,
)
def test_bert_reads_as_transformers_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    agree(changed(BERT, tmp_path, **settings), "bert")


def test_bert_reads_a_list_of_words(tmp_path: Path) -> None:
    agree(tiny.bert_tokenizer_folder(tmp_path / "words"), "bert").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/vocab.txt").read_text() == (tmp_path / "words/vocab.txt").read_text()
    (tmp_path / "saved/vocab.txt").unlink()
    agree(tmp_path / "saved", "bert")


def _at(content: str, typed: bool = True) -> dict[str, Any]:
    told = {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return told | ({"__type": "AddedToken"} if typed else {})


_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "another padding": ({"pad_token": "!"}, {}),
    "as OpenAI has published it": (
        {"bos_token": _at(_BOS), "eos_token": _at(_EOS), "unk_token": _at(_EOS)},
        {},
    ),
    "special tokens in a file of their own": (
        {"pad_token": "!"},
        {
            "special_tokens_map.json": {"bos_token": _at(_BOS, False), "pad_token": _EOS},
            "added_tokens.json": {"<toy>": 49408, "<x1>": 49409},
        },
    ),
    "added tokens by their numbers": (
        {
            "added_tokens_decoder": {
                "49409": _at("<x1>", False) | {"special": True},
                "49408": _at("<toy>", False) | {"special": False},
                "49407": _at(_EOS, False) | {"special": True},
            },
            "additional_special_tokens": ["<x2>"],
            "image_token": "<img>",
        },
        {},
    ),
    "a token without a limit": ({"model_max_length": None, "mask_token": "<m>"}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_clip_reads_as_transformers_does(tmp_path: Path, clip: Path, form: str) -> None:
    settings, files = FORMS[form]
    folder = changed(clip, tmp_path / "given", **settings)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    ours = agree(folder, "clip")
    ours.save_pretrained(tmp_path / "saved")
    for name in ("vocab.json", "merges.txt"):  # for transformers 4, and others
        (tmp_path / "saved" / name).unlink()
    again = agree(tmp_path / "saved", "clip")
    assert again.get_vocab() == ours.get_vocab() and again.get_added_vocab() == ours.get_added_vocab()
    KINDS["clip"].from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    agree(tmp_path / "theirs", "clip")


@pytest.mark.parametrize(
    "how",
    [
        {"padding": "max_length", "max_length": 20, "truncation": True},
        {"padding": "max_length", "truncation": True},
        {"padding": True},
        {"padding": "longest", "truncation": True, "max_length": 7, "add_special_tokens": False},
    ],
    ids=str,
)
def test_rows_are_padded_and_cut_as_by_transformers(clip: Path, how: dict[str, Any]) -> None:
    for folder, architecture in ((clip, "clip"), (BERT, "bert")):
        ours = load_tokenizer(folder, architecture)(texts(), return_tensors="pt", **how).to("cpu")
        theirs = KINDS[architecture].from_pretrained(folder)(texts(), return_tensors="pt", **how)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_copy_takes_new_words_alone(clip: Path) -> None:
    ours, theirs = load_tokenizer(clip, "clip"), CLIPTokenizerFast.from_pretrained(clip)
    other = copy.deepcopy(ours)
    for new in (["<toy>", "cat</w>"], "<Cat-Toy>"):
        assert other.add_tokens(new) == theirs.add_tokens(new)
    assert other("a <toy>", add_special_tokens=False).input_ids == [320, 49408]
    assert (
        other.get_vocab() == theirs.get_vocab()
        and other("A <CAT-TOY>x").input_ids == theirs("A <CAT-TOY>x").input_ids
    )
    assert len(other) == len(ours) + 2 and "<toy>" not in ours.get_vocab()
    rows = other(["a cat", "a <toy>"]).input_ids
    assert other.batch_decode(rows, skip_special_tokens=True) == ["a cat", "a <toy>"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bos_token": 5}, "bos_token is 5"),
        ({"eos_token": None}, "no eos_token"),
        ({"pad_token": ["x"]}, r"pad_token is \['x'\]"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "invalid literal"),
        ({"added_tokens_decoder": {"7": {"text": "y"}}}, "content"),
    ],
)
def test_special_tokens_that_are_none_are_refused(
    tmp_path: Path, clip: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=f"cannot read the clip tokenizer .*{words}") as caught:
        load_tokenizer(changed(clip, tmp_path, **settings), "clip")
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_would_fail_at_a_later_word_is_refused(tmp_path: Path, clip: Path) -> None:
    """Its unknown token stands for what it lacks, and has to be in it; what lacks nothing needs none."""
    settings = {"unk_token": "<unknown>"}
    folder = changed(clip, tmp_path / "clip", **settings)
    assert load_tokenizer(folder, "clip")("zz", add_special_tokens=False).input_ids
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["another"] = vocabulary.pop("z</w>")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="lacks its unk_token '<unknown>'"):
        load_tokenizer(folder, "clip")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\na\n\N{SNOWMAN}\n")
    (tmp_path / "bert/tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"lacks its unk_token '\[UNK\]'"):
        load_tokenizer(tmp_path / "bert", "bert")


@pytest.mark.parametrize("content", ["\u0301", "\x07", "\u200b"])
def test_added_tokens_of_which_cleaning_leaves_nothing_are_refused(tmp_path: Path, content: str) -> None:
    """The tokenizers library panics at the first text."""
    added = {"9": {"content": content, "normalized": True}}
    with pytest.raises(UserError, match="is nothing once a text is cleaned"):
        load_tokenizer(changed(BERT, tmp_path, added_tokens_decoder=added), "bert")


def test_a_place_that_cannot_be_written_to_is_an_oserror(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        load_tokenizer(clip, "clip").save_pretrained(tmp_path / "file" / "below")
    (tmp_path / "there/tokenizer.json").mkdir(parents=True)
    with pytest.raises(OSError):
        load_tokenizer(clip, "clip").save_pretrained(tmp_path / "there")


class Panic(BaseException):
    """As libraries in Rust raise it, which is no Exception."""


Panic.__module__ = "pyo3_runtime"


def test_a_panic_of_a_reader_in_rust_is_one_line_and_a_stop_is_a_stop() -> None:
    """A panic is no Exception in Python; Ctrl-C isn't either, and passes."""
    with pytest.raises(UserError, match=r"^a file can't be read: ") as caught, foreign("a file"):
        raise Panic("called `Option::unwrap()` on a `None` value")
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyboardInterrupt), foreign("a file"):
        raise KeyboardInterrupt
