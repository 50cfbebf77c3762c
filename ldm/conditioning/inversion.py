"""Textual inversion (Gal et al. 2022): new words for a text encoder, each one or several learnt vectors.

Files: diffusers' `learned_embeds.safetensors`, and AUTOMATIC1111's embeddings. A new word gets a token of its own
beside the tokenizer and rows of its own beside the frozen table, so that the encoder's checkpoint stays as it was.
"""

import copy
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints.files import (
    a_few,
    check_finite,
    check_plain,
    file_in,
    read_metadata,
    read_tensors,
    write_tensors,
)
from ldm.checkpoints.kinds import weights_kind
from ldm.checkpoints.pickles import read_pickle
from ldm.conditioning.text import WindowedEncoder
from ldm.conditioning.tokenizer import text_ids
from ldm.errors import UserError

FILE = "learned_embeds.safetensors"  # in a folder, as diffusers names it
_WORD = "word"  # in our own files' headers
_MOST_VECTORS = 10_000  # of a file: each is a token
_LONGEST_WORD = 1000  # characters
BUNDLED = "bundle_emb."  # before the names of words that came with a LoRA
# AUTOMATIC1111's name for a text encoder's vectors, and ours.
_ENCODERS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}


class ExtendedEmbedding(nn.Embedding):
    """A table of embeddings with new rows after it: id -1 is the first of them, -2 the second.

    Below zero because CLIPs with an old config take the text's vector where the largest id of a window stands, which
    must remain the end token. `weight` is the frozen table's own parameter; `rows`, (n, D), is what textual inversion
    trains, and alone gets gradients.
    """

    def __init__(self, base: nn.Embedding, rows: Tensor):
        super().__init__(*base.weight.shape, padding_idx=base.padding_idx, _weight=base.weight)
        self.weight = base.weight
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids (N, S) -> (N, S, D), in the table's dtype."""
        known = super().forward(input.clamp(min=0))
        new = F.embedding((-1 - input).clamp(min=0), self.rows.to(known.dtype))
        return torch.where((input < 0)[..., None], new, known)


class NewWords:
    """The words added to one encoder, which can be taken away again.

    A word of n vectors stands for n tokens of the window. As in diffusers `word` is all of them in a prompt, and for
    n > 1 `word_1` is the second alone. The encoder's `tokenizer` is left as it was, for whoever saves it.
    """

    def __init__(self, encoder: WindowedEncoder):
        self.encoder = encoder
        self._tokenize = encoder.tokenize
        self._plain: nn.Embedding | None = None
        self._counts: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        return list(self._counts)

    @property
    def embedding(self) -> ExtendedEmbedding | None:
        """The table with the words' rows, in the order of `words`; None while there are none."""
        table = _module(self.encoder).get_input_embeddings()
        return table if isinstance(table, ExtendedEmbedding) else None

    def vectors(self, word: str) -> Tensor:
        """Return the vectors of a word: (n, D)."""
        assert self.embedding is not None
        start = sum(self._counts[each] for each in self.words[: self.words.index(word)])
        return self.embedding.rows.detach()[start : start + self._counts[word]]

    def add(self, word: str, vectors: Tensor) -> None:
        """Let `word` stand for vectors (n, D) or (D,). Raises the UserErrors of `add_all`."""
        self.add_all({word: vectors})

    def add_all(self, words: Mapping[str, Tensor]) -> None:
        """Let each word stand for vectors (n, D) or (D,), all of them at once.

        Raises:
            UserError: a word is a token already or none that could be, or the vectors have another width.
        """
        self.check_all(words)
        given = [each.reshape(-1, each.shape[-1]).to(self._table().weight) for each in words.values()]
        before = [] if self.embedding is None else [self.embedding.rows.detach()]
        self._counts |= dict(zip(words, map(len, given), strict=True))
        self._put(torch.cat(before + given) if before or given else None)

    def check(self, word: str, vectors: Tensor) -> None:
        """Raise the UserErrors of `add`, and change nothing."""
        self.check_all({word: vectors})

    def check_all(self, words: Mapping[str, Tensor]) -> None:
        """Raise the UserErrors of `add_all`, and change nothing."""
        name = self.encoder.name
        if not hasattr(self.encoder.module, "get_input_embeddings"):
            raise UserError(
                f"{name} is run by open_clip, which takes no new words: save the model as a folder, and load that"
            )
        known = {*self.encoder.tokenizer.get_vocab(), *self._spelled()}
        width = self._table().weight.shape[1]
        for word, vectors in words.items():
            if len(word.split()) != 1 or not _legible(word):
                raise UserError(
                    f"{word!r} can't be a new word: give a token without spaces, such as <cat-toy>"
                )
            spelled = _spellings(word, len(vectors) if vectors.ndim == 2 else 1)
            if taken := [each for each in spelled if each in known]:
                raise UserError(
                    f"{name} knows the word {taken[0]!r} already: give the embedding another token"
                )
            if vectors.ndim not in (1, 2) or not vectors.numel() or vectors.shape[-1] != width:
                raise UserError(
                    f"the embedding of {word!r} is {tuple(vectors.shape)}, where {name} has vectors of {width}: "
                    "it is for another model"
                )
            known.update(spelled)

    def remove(self, word: str) -> None:
        """Take a word away. Raises KeyError where it was not added."""
        self.remove_all([word])

    def remove_all(self, words: Iterable[str]) -> None:
        """Take words away. Raises KeyError where one was not added."""
        gone = set(words)
        if absent := gone - set(self._counts):
            raise KeyError(min(absent))
        rows = self.embedding.rows.detach() if self.embedding is not None else torch.zeros(0)
        pieces = zip(self._counts, rows.split(list(self._counts.values())), strict=True)
        kept = [piece for word, piece in pieces if word not in gone]
        self._counts = {word: count for word, count in self._counts.items() if word not in gone}
        self._put(torch.cat(kept) if kept else None)

    def _table(self) -> nn.Embedding:
        """The network's own table."""
        if self._plain is None:
            self._plain = _module(self.encoder).get_input_embeddings()
        assert self._plain is not None
        return self._plain

    def _put(self, rows: Tensor | None) -> None:
        """Have the network look words up in a table with these rows, and the encoder read them in prompts."""
        if rows is None:
            _module(self.encoder).set_input_embeddings(self._table())
            self.encoder.tokenize = self._tokenize
            return
        _module(self.encoder).set_input_embeddings(ExtendedEmbedding(self._table(), rows))
        tokenizer = copy.deepcopy(self.encoder.tokenizer)  # a copy, for tokenizers can't forget a token
        spelled = self._spelled()
        tokenizer.add_tokens(list(spelled))
        runs = {tokenizer.convert_tokens_to_ids(each): run for each, run in spelled.items()}
        self.encoder.tokenize = lambda text: [
            each for known in text_ids(tokenizer, text) for each in runs.get(known, (known,))
        ]

    def _spelled(self) -> dict[str, list[int]]:
        """What can be written in a prompt, and the ids it stands for."""
        spelled: dict[str, list[int]] = {}
        first = 0
        for word, count in self._counts.items():
            run = [-1 - first - k for k in range(count)]
            spelled |= {each: [one] for each, one in zip(_spellings(word, count), run, strict=True)}
            spelled[word] = run
            first += count
        return spelled


def _module(encoder: WindowedEncoder) -> Any:
    """The encoder's network, with the methods that all but open_clip's have."""
    return encoder.module


def _legible(word: str) -> bool:
    """Whether something is left of a word once a tokenizer cleaned it, and UTF-8 can hold it."""
    kinds = {unicodedata.category(each) for each in word}
    return "Cs" not in kinds and not kinds <= {"Mn", "Cc", "Cf"}


def _spellings(word: str, count: int) -> list[str]:
    return [word, *(f"{word}_{k}" for k in range(1, count))]


# Files


def read_inversion(path: str | Path, token: str | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the words in a file and their vectors (n, D) by text encoder ("text_encoder", SDXL's "text_encoder_2").

    Args:
        path: `.safetensors`, `.pt` or `.bin` (read without running its code), or a folder with diffusers' file.
        token: the word, in place of what the file says; AUTOMATIC1111's `.safetensors`, and others' pairs for SDXL, go
            by their file's name.

    Raises:
        UserError: unreadable, no embedding, or one token given for several words.
    """
    path = file_in(path, FILE)
    found: Mapping[str, Any] = read_pickle(path) if weights_kind(path) == "pickle" else read_tensors(path)
    if isinstance(found, Tensor):
        found = {path.stem: found}
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds a {type(found).__name__}, not an embedding")
    webui = found.get("string_to_param")
    if any(str(name).startswith(BUNDLED) for name in found):
        words = bundled_words({str(name): each for name, each in found.items()}, path)
    elif isinstance(webui, Mapping):
        name = found.get("name")
        word = name if isinstance(name, str) and name else path.stem
        words = {word: {"text_encoder": _only(webui, path)}}
    elif set(found) & set(_ENCODERS):
        word = read_metadata(path).get(_WORD, path.stem)
        words = {word: {_ENCODERS[name]: each for name, each in found.items() if name in _ENCODERS}}
    else:
        words = {str(word): {"text_encoder": each} for word, each in found.items()}
    if token is not None:
        if len(words) != 1:
            raise UserError(f"{path} holds {len(words)} words ({a_few(list(words))}): leave the token out")
        words = {token: next(iter(words.values()))}
    return checked(words, path)


def checked(words: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, dict[str, Tensor]]:
    """Return vectors as (n, D), where they are that or one vector (D,). Raises UserError, also for NaN."""
    tensors = {f"{word}, {encoder}": each for word, by in words.items() for encoder, each in by.items()}
    if long := [word for word in words if len(word) > _LONGEST_WORD]:
        raise UserError(f"{path} holds a word of {len(long[0]):,} characters, and no prompt has such a one")
    odd = [
        name
        for name, each in tensors.items()
        if not isinstance(each, Tensor) or (each.ndim not in (1, 2) and not each.is_nested)
    ]
    if odd or not tensors:
        raise UserError(f"{path} is no embedding of textual inversion: {a_few(odd) or 'it is empty'}")
    count = sum(len(each) if each.ndim == 2 else 1 for each in tensors.values() if not each.is_nested)
    if count > _MOST_VECTORS:
        raise UserError(f"{path} holds {count:,} vectors, where {_MOST_VECTORS:,} are the most that are read")
    check_plain(tensors, path)
    check_finite(tensors, path)
    return {
        word: {encoder: each.detach().reshape(-1, each.shape[-1]) for encoder, each in by.items()}
        for word, by in words.items()
    }


def bundled_words(found: Mapping[str, Any], path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the words that came with a LoRA, as `read_inversion` does; other keys are left alone.

    Their names are AUTOMATIC1111's: `bundle_emb.<word>.emb_params`, `.clip_l` and `.clip_g`, or `.string_to_param.*`.
    Raises UserError for a key of another form. The vectors are still to be `checked`.
    """
    words: dict[str, dict[str, Tensor]] = {}
    for name in (name for name in found if name.startswith(BUNDLED)):
        word, _, vectors = name.removeprefix(BUNDLED).removesuffix(".*").rpartition(".")
        encoder = {**_ENCODERS, "string_to_param": "text_encoder"}.get(vectors)
        if encoder is None or not word or not isinstance(found[name], Tensor):
            raise UserError(
                f"{path}: {name[:200]!r} is no word of textual inversion: it would end in .emb_params"
            )
        words.setdefault(word, {})[encoder] = found[name]
    return words


def write_inversion(
    path: str | Path, word: str, vectors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a word's vectors (n, D) as others read them: diffusers' `{word: vectors}`, for SDXL clip_l and clip_g.

    The names of a pair leave no room for the word, so it also goes into the file's header, where we find it again.
    vectors: by text encoder. metadata: more text for the file's header, such as the resolved config. Raises UserError.
    """
    if set(vectors) == {"text_encoder"}:
        # diffusers' single vectors have one dimension
        (each,) = vectors.values()
        tensors = {word: each[0] if len(each) == 1 else each}
    else:
        ours = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        tensors = {ours[encoder]: each for encoder, each in vectors.items()}
    write_tensors(path, tensors, {**(metadata or {}), _WORD: word})


def _only(parameters: Mapping[str, Any], path: Path) -> Any:
    if len(parameters) != 1:
        raise UserError(
            f"{path} holds {len(parameters)} embeddings under string_to_param, where one was expected"
        )
    return next(iter(parameters.values()))
