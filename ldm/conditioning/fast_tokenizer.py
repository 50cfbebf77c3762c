"""CLIP's and BERT's tokenizers on the tokenizers library alone, for its callers what transformers' are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ldm.conditioning.vocabularies import AROUND, CLASSES, NAMED, read_rules
from ldm.files import write_text


class Tokens(dict[str, Any]):
    """What a tokenizer gives: `input_ids`, `attention_mask`, for BERT `token_type_ids`; lists, or tensors (N, S)."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device: torch.device | str) -> "Tokens":
        """Return the same with its tensors on a device."""
        return Tokens({name: each.to(device) for name, each in self.items()})


def _id_of(name: str) -> property:
    return property(lambda self: None if (token := getattr(self, name)) is None else self.id_of(token))


class FastTokenizer:
    """A tokenizer of CLIP ("clip") or BERT ("bert"), with what is used of transformers' here, by diffusers and compel.

    Names are transformers'. `model_max_length` and the special tokens (None where there is none) can be set.

    Attributes:
        tokenizer_class: how transformers calls it.
    """

    def __init__(self, architecture: str, rules: Tokenizer, settings: Mapping[str, Any]):
        """rules, settings: see `read_rules`."""
        self.tokenizer_class = CLASSES[architecture]
        self.model_max_length: Any = settings["model_max_length"]
        for name in NAMED:
            setattr(self, name, settings.get(name))
        self._rules, self._settings = rules, dict(settings)
        before, after = AROUND[architecture]
        self._around = [self.id_of(settings[before])], [self.id_of(settings[after])]

    @classmethod
    def read(cls, folder: Path, architecture: str, files: Mapping[str, Any]) -> "FastTokenizer":
        """Return the tokenizer of a folder. files, errors: as of `read_rules`."""
        return cls(architecture, *read_rules(folder, architecture, files))

    bos_token_id = _id_of("bos_token")
    eos_token_id = _id_of("eos_token")
    unk_token_id = _id_of("unk_token")
    sep_token_id = _id_of("sep_token")
    pad_token_id = _id_of("pad_token")
    cls_token_id = _id_of("cls_token")
    mask_token_id = _id_of("mask_token")

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Tokens:
        """Return the tokens of a text, or of each of several.

        Args:
            text: one, or several. Tensors have a row for each, and one row for one.
            add_special_tokens: put the architecture's own around each.
            padding: True or "longest" to the longest, "max_length" to `max_length`; by the padding's token.
            truncation: cut what is longer than `max_length`.
            max_length: with the special tokens. None is `model_max_length`.
            return_tensors: "pt" for tensors.
            verbose: as transformers has it; here are no warnings.
        """
        single = isinstance(text, str)
        before, after = self._around if add_special_tokens else ([], [])
        most = self.model_max_length if max_length is None else max_length
        cuts = truncation and truncation != "do_not_truncate"
        room = max(most - len(before) - len(after), 0) if cuts else None
        # One by one: the library's threads and a process that is forked later would be in each other's way.
        found = [self._rules.encode(each, add_special_tokens=False) for each in ([text] if single else text)]
        rows = [[*before, *each.ids[:room], *after] for each in found]
        size = {True: max(map(len, rows), default=0), "max_length": most}.get(
            True if padding == "longest" else padding, 0
        )
        pads = [[self.pad_token_id] * (size - len(row)) for row in rows]
        tokens = {
            "input_ids": [row + pad for row, pad in zip(rows, pads, strict=True)],
            "attention_mask": [[1] * len(row) + [0] * len(pad) for row, pad in zip(rows, pads, strict=True)],
        }
        if self.tokenizer_class == CLASSES["bert"]:
            tokens["token_type_ids"] = [[0] * len(row) for row in tokens["input_ids"]]
        if return_tensors == "pt":
            return Tokens({name: torch.tensor(each) for name, each in tokens.items()})
        return Tokens({name: each[0] for name, each in tokens.items()} if single else tokens)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text as they stand in the vocabulary, without special ones."""
        return self._rules.encode(text, add_special_tokens=False).tokens

    def decode(self, token_ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        text = self._rules.decode([int(each) for each in token_ids], skip_special_tokens=skip_special_tokens)
        return text.replace("</w>", " ").strip() if self.tokenizer_class == CLASSES["clip"] else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """Return the texts of rows of token ids."""
        return [self.decode(each, skip_special_tokens) for each in sequences]

    def id_of(self, token: str) -> Any:
        """Return a token's id; that of `unk_token`, which may be None, for an unknown one."""
        found = self._rules.token_to_id(token)
        unknown: str | None = self.unk_token  # pyright: ignore[reportAttributeAccessIssue]
        return self._rules.token_to_id(unknown) if found is None and unknown is not None else found

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or of each of several."""
        return self.id_of(tokens) if isinstance(tokens, str) else [self.id_of(each) for each in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | Tensor) -> Any:
        """Return the token of an id, or of each of several."""
        several = [self._rules.id_to_token(int(each)) for each in ([ids] if isinstance(ids, int) else ids)]
        return several[0] if isinstance(ids, int) else several

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens, added ones too, and their ids."""
        return self._rules.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Return the added tokens, special ones among them, and their ids."""
        return {token.content: id for id, token in sorted(self._rules.get_added_tokens_decoder().items())}

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """As `get_added_vocab`."""
        return self.get_added_vocab()

    def __len__(self) -> int:
        return self._rules.get_vocab_size(with_added_tokens=True)

    def add_tokens(self, new_tokens: str | Sequence[str]) -> int:
        """Have these tokens found whole in any text, behind the vocabulary where they aren't in it; return how many."""
        return self._rules.add_tokens([new_tokens] if isinstance(new_tokens, str) else list(new_tokens))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder that transformers reads, 4 and 5, and other readers of vocabularies.

        Raises OSError or UserError where it can't be written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._rules.save(str(folder / "tokenizer.json"))
            self._rules.model.save(str(folder))
        except Exception as error:  # the library has no other
            raise OSError(str(error)) from error
        named = {name: getattr(self, name) for name in NAMED if name in self._settings}
        told = self._settings | named | {"model_max_length": self.model_max_length}
        told["tokenizer_class"] = self.tokenizer_class
        text = json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False)
        write_text(folder / "tokenizer_config.json", text + "\n")
