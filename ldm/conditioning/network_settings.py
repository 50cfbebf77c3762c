"""The settings of transformers' networks that come from a folder's config.json: known ones, checked, and no others.

transformers takes any key of a config.json for a setting: some have it ask the hub for code, or build things by the
thousand million. So what is handed on is listed here, and its sizes are compared with what a file can hold first.
"""

import math
from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError

_LARGEST = 2**22  # of a width, or of a vocabulary
_LONGEST = 2**16  # positions: some tables of them are built, not read
_LAYERS = 1000
_SIZES = {
    "clip": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ),
    "clip_vision": (
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
    ),
    "bert": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "type_vocab_size",
    ),
    "t5": (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    ),
}
_CLIP_REALS = ("layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor")
_REALS = {
    "clip": _CLIP_REALS,
    "clip_vision": _CLIP_REALS,
    "bert": (
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "classifier_dropout",
    ),
    "t5": ("layer_norm_epsilon", "dropout_rate", "initializer_factor", "classifier_dropout"),
}
_WORDS = ("hidden_act", "feed_forward_proj", "dense_act_fn", "_name_or_path")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
_SWITCHES = ("use_cache", "is_encoder_decoder", "tie_word_embeddings", "is_gated_act")
# Settings that change what a network computes, and that nothing here is built for, with what they must be.
_INERT: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "position_embedding_type": ("absolute", None),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0, None),
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def network_settings(
    config: Mapping[str, Any], architecture: str, tensors: int, where: str
) -> dict[str, Any]:
    """Return the settings in a config.json that a network of the architecture is built from.

    architecture: "clip", "clip_vision", "bert" or "t5".

    tensors: how many a file has for the network; no more layers than these are built. Keys that are no settings of
    such a network (who wrote it, how a text is generated, what labels it gives) are left out. Raises UserError.
    """
    for key, allowed in _INERT.items():
        if config.get(key) not in allowed:
            raise UserError(
                f"{where}: {key} = {config[key]!r:.60} is not supported (supported: {allowed[0]!r})"
            )
    kept: dict[str, Any] = {}
    for key in _SIZES[architecture]:
        if (value := config.get(key)) is not None:
            check_size(key, value, tensors, where)
            kept[key] = value
    for key in _REALS[architecture]:
        if (value := config.get(key)) is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not _sane(value):
                raise UserError(f"{where}: {key} is {value!r:.60}, where a number from 0 to 1,000 is needed")
            kept[key] = value
    for key in _TOKENS:
        if key in config:
            values = config[key] if isinstance(config[key], list) else [config[key]]
            if not all(each is None or (type(each) is int and abs(each) < 2**31) for each in values):
                raise UserError(
                    f"{where}: {key} is {config[key]!r:.60}, where the number of a token is needed"
                )
            kept[key] = config[key]
    for names, kind in ((_WORDS, str), (_SWITCHES, bool)):
        for key in names:
            if (value := config.get(key)) is not None:
                if not isinstance(value, kind):
                    raise UserError(f"{where}: {key} is {value!r:.60}, where a {kind.__name__} is needed")
                kept[key] = value
    dtype = config.get("dtype", config.get("torch_dtype"))
    return kept | ({"dtype": dtype} if dtype in _DTYPES else {})


def check_size(key: str, value: object, tensors: int, where: str) -> None:
    """Raise UserError for a size that no network in a file of so many tensors can have."""
    counted = "layers" in key
    most = (
        min(_LAYERS, tensors) if counted else _LONGEST if "position" in key or "length" in key else _LARGEST
    )
    if type(value) is not int or not 1 <= value <= most:
        known = f", for {tensors} tensors" if counted and most == tensors else ""
        raise UserError(
            f"{where}: {key} is {value!r:.60}, where a whole number from 1 to {most} is needed{known}"
        )


def _sane(value: int | float) -> bool:
    return math.isfinite(value) and 0 <= value <= 1000
