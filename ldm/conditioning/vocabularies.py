"""The rules of CLIP's and BERT's tokenizers, read from a folder as transformers 5 reads it.

A folder has the vocabulary, the merges, the special and added tokens and some settings. How a text is cleaned and cut
is the architecture's, whatever else a tokenizer.json says of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

Token = str | AddedToken

CLASSES = {"clip": "CLIPTokenizer", "bert": "BertTokenizer"}  # in transformers
AROUND = {"clip": ("bos_token", "eos_token"), "bert": ("cls_token", "sep_token")}  # what stands around a text
# The roles of tokens, in the order in which these are added where the vocabulary lacks them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CLIP_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_BERT_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_SPECIAL = {"clip": _CLIP_SPECIAL, "bert": _BERT_SPECIAL}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_UNLIMITED = int(1e30)  # transformers' number for a tokenizer that knows no limit
# Radford et al. 2021, `simple_tokenizer.py`: abbreviations, words, single digits, runs of signs.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_rules(folder: Path, architecture: str, files: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the rules of the tokenizer of an architecture, "clip" or "bert", and its settings.

    The settings are those of tokenizer_config.json, the special tokens by their text, and always a `model_max_length`.

    files: what the folder's JSON files hold, by their names. Raises errors of any kind for what can't be.
    """
    settings = dict(files["tokenizer_config.json"])
    added = _added_tokens(settings, files)
    named, more = _special_tokens(settings, architecture, {each.content: each for each in added})
    missing = [each for each in ("unk_token", *AROUND[architecture]) if named[each] is None]
    if missing:
        raise ValueError(f"its settings have no {missing[0]}")
    texts: dict[str, Any] = {name: None if each is None else str(each) for name, each in named.items()}
    rules = _clip(folder, files, texts) if architecture == "clip" else _bert(folder, files, settings, texts)
    _add(rules, added, named, more)
    _put_around(rules, architecture, texts)
    told = {name: each for name, each in texts.items() if each is not None or name in settings}
    limit = settings.get("model_max_length", settings.get("max_len"))
    dropped = ("added_tokens_decoder", "additional_special_tokens", "tokenizer_class")
    told |= {"model_max_length": _UNLIMITED if limit is None else limit}
    told |= {"extra_special_tokens": [str(each) for each in more]} if more else {}
    return rules, {key: each for key, each in settings.items() if key not in dropped} | told


def _added_tokens(settings: dict[str, Any], files: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens beside the vocabulary, by their numbers; older folders have special ones in files of their own."""
    if "added_tokens_decoder" in settings:
        told = settings["added_tokens_decoder"]
        return [_made(told[number]) for number in sorted(told, key=int)]
    for key, each in files.get("special_tokens_map.json", {}).items():
        settings[key] = _made(each | {"special": True}) if isinstance(each, dict) else each
    special = {str(each) for key, each in settings.items() if key.endswith("_token") and each}
    found: dict[int, AddedToken] = {}
    for text, number in files.get("added_tokens.json", {}).items():
        found[number] = AddedToken(text, normalized=text not in special, special=text in special)
    for each in files.get("tokenizer.json", {}).get("added_tokens", []):
        found[each["id"]] = _made(each)
    return [found[number] for number in sorted(found)]


def _special_tokens(
    settings: Mapping[str, Any], architecture: str, added: Mapping[str, AddedToken]
) -> tuple[dict[str, Token | None], list[Token]]:
    """The tokens that have a role, by its name, and those without one."""
    named: dict[str, Token | None] = {name: _SPECIAL[architecture].get(name) for name in NAMED}
    for key, value in settings.items():
        token = _token(value)
        if key in named:
            if token is None and value is not None:
                raise TypeError(f"its {key} is {value!r:.60}, where a token is needed")
            named[key] = None if token is None else added.get(str(token), token)
        elif key.endswith("_token") and token is not None:
            named[key] = token
    more: Any = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(more, dict):  # with roles of their own
        return named | {key: _token(each) for key, each in more.items()}, []
    return named, [token for each in more if (token := _token(each)) is not None]


def _token(value: Any) -> Token | None:
    """A token of a settings file, where `value` is one: a text, or all that an AddedToken is made of."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _made(value)
    return value if isinstance(value, str | AddedToken) else None


def _made(told: Mapping[str, Any]) -> AddedToken:
    """A token of its text and its flags: the library prints what else it is given."""
    return AddedToken(told["content"], **{key: told[key] for key in _FLAGS if key in told})


def _add(
    rules: Tokenizer, added: list[AddedToken], named: Mapping[str, Token | None], more: list[Token]
) -> None:
    """Have the rules find these tokens in any text, whole."""
    special = {str(each) for each in named.values() if each is not None}
    tokens: dict[str, AddedToken] = {each.content: each for each in added}
    for each in (*named.values(), *more):
        if each is not None:
            tokens.setdefault(str(each), AddedToken(each, special=True) if isinstance(each, str) else each)
    for text, token in tokens.items():
        token.special = token.special or text in special
    rules.add_tokens(list(tokens.values()))
    for token in tokens.values():
        # The library would find them between any two letters, and end in a panic, which is no Exception.
        if token.normalized and token.content and not rules.normalizer.normalize_str(token.content):
            raise ValueError(f"its token {token.content!r:.60} is nothing once a text is cleaned")


def _clip(folder: Path, files: Mapping[str, Any], special: Mapping[str, Any]) -> Tokenizer:
    if "tokenizer.json" in files:
        model = _model(files["tokenizer.json"], "BPE")
        vocabulary, pairs = model["vocab"], model["merges"]
        merges: Any = [tuple(each.split(" ") if isinstance(each, str) else each) for each in pairs]
    else:
        vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    letters = pre_tokenizers.ByteLevel.alphabet()
    if any(each not in vocabulary or f"{each}</w>" not in vocabulary for each in letters):
        _check_unknown(special["unk_token"], vocabulary)
    rules = Tokenizer(
        BPE(
            vocabulary,
            merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=special["unk_token"],
        )
    )
    rules.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    rules.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rules.decoder = decoders.ByteLevel()
    return rules


def _bert(
    folder: Path, files: Mapping[str, Any], settings: Mapping[str, Any], special: Mapping[str, Any]
) -> Tokenizer:
    if "tokenizer.json" in files:
        vocabulary = _model(files["tokenizer.json"], "WordPiece")["vocab"]
    else:
        vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
    _check_unknown(special["unk_token"], vocabulary)
    rules = Tokenizer(WordPiece(vocabulary, unk_token=special["unk_token"]))
    rules.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.decoder = decoders.WordPiece(prefix="##")
    return rules


def _check_unknown(token: str, vocabulary: Mapping[str, int]) -> None:
    """Raise ValueError for a vocabulary that fails at the first word, of any later prompt, that it does not know."""
    if token not in vocabulary:
        raise ValueError(f"its vocabulary lacks its unk_token {token!r:.60}")


def _model(rules: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The vocabulary's part of a tokenizer.json. Raises ValueError for another kind; old files do not say theirs."""
    model = rules["model"]
    if model.get("type", kind) != kind:
        raise ValueError(f"its vocabulary is of the kind {model['type']!r:.60}, where {kind} is needed")
    return model


def _put_around(rules: Tokenizer, architecture: str, special: Mapping[str, Any]) -> None:
    """Have the rules put the architecture's special tokens around a text, for those who read them from a file."""
    around: list[Any] = [(special[name], rules.token_to_id(special[name])) for name in AROUND[architecture]]
    before, after = around
    if architecture == "clip":
        rules.post_processor = processors.RobertaProcessing(
            after, before, trim_offsets=False, add_prefix_space=False
        )
        return
    first, last = before[0], after[0]
    rules.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[before, after],
    )
