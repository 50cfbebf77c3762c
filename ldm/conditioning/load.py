"""Text encoders from folders as transformers, diffusers and open_clip write them, and to such; no network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component
from ldm.checkpoints.layouts import canonical_clip, is_clip
from ldm.conditioning.architectures import Architecture, architecture_of, states_of
from ldm.conditioning.inversion import ExtendedEmbedding
from ldm.conditioning.network_settings import network_settings
from ldm.conditioning.open_clip import as_transformers, build_open_clip, is_open_clip
from ldm.conditioning.text import TextEncoder, WindowedEncoder
from ldm.conditioning.tokenizer import check_vocabulary, load_tokenizer, quiet, text_ids, window_of
from ldm.errors import UserError
from ldm.foreign import foreign
from ldm.models.text import TextNetwork

_T5_WINDOW = 512  # the length T5 was trained on (Raffel et al. 2020), where the tokenizer knows none


def load_text_encoder(
    folder: str | Path,
    component: str = "text_encoder",
    tokenizer: str | Any = "tokenizer",
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    penultimate: bool = False,
) -> WindowedEncoder:
    """Load `folder/component` with its tokenizer: a folder's name beside it, or a tokenizer already loaded.

    component "" and tokenizer "" mean `folder` itself: a plain transformers model. An open_clip checkpoint needs no
    tokenizer: it has CLIP's. `variant` "fp16" reads the files of that name. `penultimate`: see `states_of`.
    Raises UserError.
    """
    where = str(Path(folder) / component)
    config, tensors = read_component(folder, component, variant)
    if isinstance(tokenizer, str) and not is_open_clip(config):
        tokenizer = load_tokenizer(Path(folder) / tokenizer, architecture_of(config, where).name)
    name = component or "text_encoder"
    return build_text_encoder(config, tensors, tokenizer, torch_dtype, device, name, penultimate, where)


def build_text_encoder(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    name: str = "text_encoder",
    penultimate: bool = False,
    where: str = "the checkpoint",
) -> WindowedEncoder:
    """Build a text encoder from a config of transformers (or open_clip) and its tensors, by the names of a folder.

    tokenizer: the folder's, see `load_tokenizer`; not used for open_clip, which has CLIP's. The network comes frozen
    and in evaluation mode. `name` is its component's name, `where` stands in errors. Raises UserError.
    """
    if is_open_clip(config):
        return build_open_clip(config, tensors, torch_dtype, device, name, penultimate, where)
    architecture = architecture_of(config, where)
    module = _build_module(architecture, config, tensors, where).to(device=device, dtype=torch_dtype)
    check_vocabulary(tokenizer, module.get_input_embeddings().num_embeddings, where)
    limit = getattr(module.config, "max_position_embeddings", _T5_WINDOW)
    return WindowedEncoder(
        module=module.eval().requires_grad_(False),
        tokenize=lambda text: text_ids(tokenizer, text),
        window=window_of(tokenizer, limit),
        states=states_of(architecture, penultimate),
        name=name,
        masked=module.config.use_attention_mask,
        stretches=architecture.stretches,
        tokenizer=tokenizer,
    )


def export(encoder: TextEncoder) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return each network's config and tensors by its component's name, as a diffusers folder has them."""
    return {
        name: (_config_of(module), _tensors_of(module))
        if hasattr(module, "config")
        else as_transformers(module, name)
        for name, module in encoder.modules.items()
    }


def write_tokenizers(encoder: TextEncoder, folder: str | Path) -> None:
    """Write the tokenizers into `folder`, named as diffusers names them. Raises UserError where it can't."""
    try:
        for name, tokenizer in encoder.tokenizers.items():
            tokenizer.save_pretrained(str(Path(folder) / tokenizer_name(name)))
    except OSError as error:
        raise UserError(f"can't write the tokenizer to {folder}: {error.strerror or error}") from error


def tokenizer_name(component: str) -> str:
    """Return the folder of the tokenizer that goes with a text encoder's: "text_encoder_2" -> "tokenizer_2"."""
    return component.replace("text_encoder", "tokenizer")


def _config_of(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, TextNetwork):
        config = module.config.to_dict()
    else:
        config = json.loads(module.config.to_json_string())  # type: ignore[union-attr, operator]
    return config | {"architectures": [type(module).__name__]}


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    tensors = dict(module.state_dict())
    for name, part in module.named_modules(remove_duplicate=False):  # new words have files of their own
        if isinstance(part, ExtendedEmbedding):
            tensors.pop(f"{name}.rows")
    if is_clip(tensors):
        tensors = canonical_clip(tensors)
    if "shared.weight" in tensors:
        tensors.pop("encoder.embed_tokens.weight", None)  # the same table under a second name
    return tensors


def _build_module(
    architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> Any:
    settings = network_settings(_settings_in(config, where), architecture.name, len(tensors), where)
    # So that a saved folder says what was done.
    settings["use_attention_mask"] = bool(config.get("use_attention_mask", architecture.masks))
    kind = architecture.model
    if isinstance(kind, str):
        return _by_transformers(kind, architecture, settings, tensors, where)
    with foreign(f"{where}:", "the text encoder refuses the config"), torch.device("meta"):
        module = kind(kind.config_type.read(settings))
    load_strict(module, _names_of(module, architecture, tensors), where)
    return module


def _by_transformers(
    model: str,
    architecture: Architecture,
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
) -> Any:
    from accelerate import init_empty_weights

    with quiet():
        import transformers

        kind = getattr(transformers, model)
        # transformers checks settings in many ways, none of them its own error
        with (
            foreign(f"{where}:", "transformers refuses the config"),
            init_empty_weights(include_buffers=False),
        ):
            # Which attention is ours to say: by a name in a config it would ask the hub for code.
            attention = "sdpa" if kind._supports_sdpa else "eager"
            module = kind(kind.config_class(**settings, attn_implementation=attention))
    load_strict(module, _names_of(module, architecture, tensors), where)
    module.tie_weights()
    return module


def _settings_in(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The text network's own part of a config; a CLIP's whole one has it under text_config."""
    found = config.get("text_config", config)
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: text_config is {found!r:.60}, where settings with names are needed")
    return found


def _names_of(
    module: nn.Module, architecture: Architecture, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that the module wants. Older folders hold `position_ids` (0, 1, 2, ...) too, which are no weights."""
    kept = {name: each for name, each in tensors.items() if name.startswith(architecture.keep or "")}
    if is_clip(kept):
        kept = canonical_clip(kept)
    if "shared.weight" in kept:
        kept.setdefault("encoder.embed_tokens.weight", kept["shared.weight"])
    wanted = module.state_dict().keys()
    return {name: each for name, each in kept.items() if name in wanted or not name.endswith("position_ids")}
