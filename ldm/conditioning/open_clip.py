"""Text towers of OpenCLIP (Ilharco et al. 2021), run by the open_clip package.

A `text_encoder` folder may hold an OpenCLIP checkpoint (`open_clip_config.json` and its weights) in place of one of
transformers. A system with such a tower is saved with the transformers CLIP of the same weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.layouts import open_clip_rows
from ldm.conditioning.architectures import check_skip
from ldm.conditioning.network_settings import check_size
from ldm.conditioning.text import WindowedEncoder
from ldm.conditioning.tokenizer import check_vocabulary, clip_tokenizer, text_ids, window_of
from ldm.errors import UserError
from ldm.foreign import foreign

_TOWER = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_SIZES = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
_LONGEST = 4096  # tokens: their causal mask, a number for each two of them, is built and not read


def is_open_clip(config: Mapping[str, Any]) -> bool:
    """Return whether this is the `model_cfg` of an open_clip checkpoint, and no config of transformers."""
    return "text_cfg" in config


def build_open_clip(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    name: str = "text_encoder",
    penultimate: bool = False,
    where: str = "the checkpoint",
) -> WindowedEncoder:
    """Return the text tower of an open_clip model, with CLIP's own vocabulary; see `build_text_encoder`.

    The states and the pooled vector are those of the transformers CLIP with the same weights. Raises UserError, also
    where open_clip is not installed.
    """
    tower = _build(config, tensors, where).to(device=device, dtype=torch_dtype)
    tokenizer = clip_tokenizer(pad_token="!")
    check_vocabulary(tokenizer, tower.vocab_size, where)
    return WindowedEncoder(
        module=tower.eval().requires_grad_(False),
        tokenize=lambda text: text_ids(tokenizer, text),
        window=window_of(tokenizer, tower.context_length),
        states=lambda module, ids, mask, skip: _states(module, ids, mask, skip, penultimate),
        name=name,
        tokenizer=tokenizer,
    )


def as_transformers(tower: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of the transformers CLIP that computes the same, for the component `name`.

    Only SDXL's second text encoder keeps the projection: diffusers' other pipelines would read it as the states.
    """
    module: Any = tower
    projects = name == "text_encoder_2"
    theirs = {key: each for key, each in module.state_dict().items() if projects or key != "text_projection"}
    layers, block = len(module.transformer.resblocks), module.transformer.resblocks[0]
    config = {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.context_length,
        "hidden_size": module.token_embedding.embedding_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": layers,
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
        "projection_dim": module.text_projection.shape[1],
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published: transformers then takes the highest token id for the end of the text
        "pad_token_id": 1,
    }
    return config, KeyMap.over_theirs(open_clip_rows(layers), theirs, name).to_ours(theirs)


def open_clip_package(where: str) -> Any:
    """Import open_clip. Raises UserError where it is not installed."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"{where} is an OpenCLIP checkpoint: pip install 'ldm-text-to-image[openclip]' to read it ({error})"
        ) from error
    return open_clip


def _build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Any:
    from accelerate import init_empty_weights

    open_clip = open_clip_package(where)
    if not isinstance(config["text_cfg"], Mapping):
        raise UserError(f"{where}: text_cfg must hold named entries")
    with foreign(f"{where}:", "open_clip refuses the config"):
        text, plain = dict(config["text_cfg"]), vars(open_clip.CLIPTextCfg())
        odd = [key for key in text if key not in _SIZES and (key not in plain or text[key] != plain[key])]
        if odd:
            raise UserError(
                f"{where}: only CLIP's own causal text towers are supported, not {odd[0]} = {text[odd[0]]!r}"
            )
        for key in ("context_length", "vocab_size", "width", "heads", "layers"):
            if key in text:
                check_size(key, text[key], len(tensors), where)
        check_size("embed_dim", config.get("embed_dim"), len(tensors), where)
        if not 0 < float(text.get("mlp_ratio", 4)) <= 64 or text.get("context_length", 77) > _LONGEST:
            raise UserError(f"{where}: mlp_ratio or context_length is more than any text tower has")
        with init_empty_weights(include_buffers=False):
            tower = open_clip.model._build_text_tower(
                config["embed_dim"], text, config.get("quick_gelu", False)
            )
    # The tower's tensors lie at the top in older models, under `text.` in newer; the image tower's beside.
    inner = {name.removeprefix("text."): each for name, each in tensors.items()}
    load_strict(tower, {name: each for name, each in inner.items() if name.startswith(_TOWER)}, where)
    return tower


def _states(
    tower: Any, ids: Tensor, mask: Tensor | None, skip: int, penultimate: bool
) -> tuple[Tensor, Tensor | None]:
    if mask is not None:
        raise UserError(
            "compel's weights under 1 hide words from the text encoder, which one run by open_clip can't do: "
            "save the model as a folder and load that, or take prompt syntax comfyui"
        )
    output = tower.forward_intermediates(ids, output_fmt="NLC")
    layers = output["text_intermediates"]
    check_skip(skip, len(layers) - penultimate)
    hidden = layers[-1 - penultimate - skip]
    return hidden if penultimate else tower.ln_final(hidden), output["text_features"]
