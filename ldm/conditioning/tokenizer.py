"""Tokenizers: a folder's own, and CLIP's, which single-file checkpoints leave out.

CLIP's vocabulary (Radford et al. 2021) is a byte-level BPE: 256 byte symbols, the same at a word's end, one
entry a merge, and two special tokens; 49,408 in all.
"""

import contextlib
import gzip
import json
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ldm.checkpoints.paths import readable
from ldm.conditioning.cleaning import clean
from ldm.conditioning.text import Window
from ldm.errors import UserError
from ldm.foreign import LARGEST_TEXT, foreign, json_object, read_plain

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894  # of the list in the file, the first so many
_BPE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")  # OpenAI's, as OpenCLIP ships it
_T5_CLASS = "T5TokenizerFast"  # a name that transformers 4 and 5 share
_CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")  # ours, and transformers' own
# What holds an architecture's vocabulary where tokenizer.json does not.
_VOCABULARIES = {"clip": ("vocab.json", "merges.txt"), "bert": ("vocab.txt",), "t5": ("spiece.model",)}
_SETTINGS = "tokenizer_config.json"
_NO_LIMIT = 100_000  # transformers writes 1e30 where a tokenizer knows no limit


def load_tokenizer(folder: str | Path, architecture: str) -> Any:
    """Return the tokenizer of the architecture from its folder: of "clip" and "bert" ours, of "t5" transformers'.

    Raises UserError for missing and damaged files, and for another architecture's. transformers itself would go on
    without: an empty vocabulary reads every prompt alike, and without the settings the window has another size.
    """
    path = Path(folder)
    with readable(path):
        if not path.is_dir():
            raise UserError(f"there is no tokenizer folder {path}")
        there = {each.name for each in path.iterdir()}
    if "tokenizer.json" not in there and not there.issuperset(_VOCABULARIES[architecture]):
        wanted = " and ".join(_VOCABULARIES[architecture])
        raise UserError(
            f"{path} holds no vocabulary: a {architecture} tokenizer has tokenizer.json, or {wanted}"
        )
    if _SETTINGS not in there:
        raise UserError(f"{path} holds no {_SETTINGS}, which says how long a prompt may be: get it again")
    files = _read_files(path, there)
    with foreign(f"cannot read the {architecture} tokenizer", f"in {path}"):
        if architecture == "t5":
            tokenizer = _by_transformers(path)
        else:
            from ldm.conditioning.fast_tokenizer import FastTokenizer  # the library waits until it is needed

            tokenizer = FastTokenizer.read(path, architecture, files)
        # another architecture's file may be read well, and fail at an unknown word
        tokenizer("a \N{SNOWMAN}")
    return tokenizer


def _by_transformers(path: Path) -> Any:
    with quiet():
        import transformers

        kind: Any = getattr(transformers, _T5_CLASS)
        return kind.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def _read_files(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Return what the JSON files hold, by their names.

    Raises UserError for files that a reader would stumble over, or wait for, or spend all time in.
    """
    found: dict[str, Any] = {}
    for name in sorted(names):
        file = path / name
        if name.endswith((".json", ".txt", ".model", ".jinja")):
            with foreign(file):
                content = read_plain(file, LARGEST_TEXT)
            if name.endswith(".json"):
                found[name] = json_object(content, file)
    if "tokenizer.json" in found:
        _check_patterns(found["tokenizer.json"], path / "tokenizer.json")
    return found


def _check_patterns(rules: Any, file: Path) -> None:
    """Raise UserError for regular expressions that may take for ever: a group that repeats, or a back reference."""
    waiting = [rules.get("normalizer"), rules.get("pre_tokenizer"), rules.get("decoder")]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            waiting.extend(each.values() if isinstance(each, dict) else each)
        pattern = each.get("Regex") if isinstance(each, dict) else None
        if isinstance(pattern, str) and (len(pattern) > 1000 or re.search(r"\)[*+?{]|\\[1-9]", pattern)):
            raise UserError(f"{file}: its pattern {pattern[:60]!r} is too involved a regular expression")


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """Raise UserError unless the tokenizer's ids are those of a text encoder with a table of `rows` embeddings.

    Tables are padded to round numbers, but by a few rows: much fewer tokens are those of another model, too.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not 0.9 * rows <= size <= rows:
        raise UserError(
            f"{where}: the tokenizer has {size} tokens, the text encoder {rows}: they belong to different models"
        )


def window_of(tokenizer: Any, limit: int) -> Window:
    """Return the window that the tokenizer pads to: its own limit, and never more than the network's `limit`."""
    size, pad = tokenizer.model_max_length, tokenizer.pad_token_id
    if not isinstance(size, int | float) or size != size or size < 1 or pad is None:
        raise UserError(f"the tokenizer's {_SETTINGS} needs a pad_token and a model_max_length of 1 or more")
    size = size if size < _NO_LIMIT else limit
    special = tokenizer("").input_ids
    window = Window(int(min(size, limit)), tuple(special[:-1]), tuple(special[-1:]), pad)
    if window.capacity < 1:
        raise UserError(f"the tokenizer's model_max_length {size} leaves no room for text: set it to {limit}")
    return window


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of the text alone, uncut.

    For CLIP it is cleaned first, as CLIP's own tokenizer does (see `clean`).
    """
    if getattr(tokenizer, "tokenizer_class", type(tokenizer).__name__) in _CLIP_CLASSES:
        own = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
        text = clean(text, kept=tokenizer.get_added_vocab().keys() - own)
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def clip_tokenizer(pad_token: str = EOS) -> Any:
    """Return CLIP's tokenizer, with the vocabulary that this package carries.

    pad_token: "<|endoftext|>" for SD 1.x and SDXL's first encoder, "!" (id 0) for SD 2.x and SDXL's second.
    """
    with tempfile.TemporaryDirectory() as made:
        write_clip_tokenizer(made, clip_merges(), pad_token)
        return load_tokenizer(made, "clip")


def write_clip_tokenizer(
    folder: str | Path, merges: Sequence[str], pad_token: str = EOS, size: int = 77
) -> None:
    """Write a `tokenizer/` folder as diffusers has it, for the BPE of these merges ("a b</w>" each)."""
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": size,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": pad_token,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(clip_vocabulary(merges), ensure_ascii=False), "utf-8")
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")


def clip_merges() -> list[str]:
    """Return the merges of CLIP's BPE, best first."""
    lines = gzip.decompress(_BPE.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : 1 + MERGES]  # the first line is a heading


def clip_vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Map token to id: byte symbols, byte symbols at a word's end, merges, then the two special tokens."""
    symbols = list(_byte_symbols())
    ends = (symbol + "</w>" for symbol in symbols)
    tokens = chain(symbols, ends, (merge.replace(" ", "") for merge in merges), (BOS, EOS))
    return {token: index for index, token in enumerate(tokens)}


def _byte_symbols() -> Iterator[str]:
    """One printable character a byte: printable bytes first, as themselves, then the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the console while it loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
