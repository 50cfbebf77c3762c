"""Text towers of OpenCLIP (Ilharco et al. 2021), run by the open_clip package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.files import load_strict, read_tensors
from ldm.checkpoints.folder import read_json
from ldm.conditioning.families import check_skip
from ldm.conditioning.text import Window, WindowedEncoder
from ldm.errors import UserError, nearest

_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TOWER = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def load_open_clip(
    model: str | Path,
    weights: str | Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    penultimate: bool = False,
    final_norm: bool = True,
    name: str = "text_encoder",
) -> WindowedEncoder:
    """The text tower of an open_clip model folder, or of a model's name ("ViT-H-14") and a weights file.

    penultimate: leave out the last layer; final_norm: normalise the states. SD 2.x takes (True, True), SDXL
    (True, False). The states and the pooled vector are those of the transformers CLIP with the same weights.
    Raises UserError, also where open_clip is not installed.
    """
    config, path = _find(model, weights)
    open_clip = _open_clip()
    if config is None:
        config = open_clip.get_model_config(str(model))
        if config is None:
            hint = nearest(str(model), open_clip.list_models())
            raise UserError(f"{str(model)!r} is neither a folder nor a model of open_clip{hint}")
    tower = _build(open_clip, config, read_tensors(path), str(path)).to(device=device, dtype=torch_dtype)
    tokenizer = open_clip.SimpleTokenizer(context_length=tower.context_length)
    return WindowedEncoder(
        module=tower.eval().requires_grad_(False),
        tokenize=tokenizer.encode,
        window=Window(
            tower.context_length, (tokenizer.sot_token_id,), (tokenizer.eot_token_id,), tower.pad_id
        ),
        states=lambda module, ids, mask, skip: _states(module, ids, skip + penultimate, final_norm),
        name=name,
        tokenizer=tokenizer,
    )


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"OpenCLIP needs a package: pip install open_clip_torch ({error})") from error
    return open_clip


def _find(model: str | Path, weights: str | Path | None) -> tuple[dict[str, Any] | None, Path]:
    """The folder's model config (None: `model` is a name) and the file with the weights."""
    folder = Path(model)
    if not folder.is_dir():
        if weights is None:
            raise UserError(f"there is no folder {folder}; with a model's name give its weights file too")
        return None, Path(weights)
    config = read_json(folder / "open_clip_config.json")
    found = [folder / each for each in _WEIGHTS if (folder / each).is_file()]
    if weights is None and not found:
        raise UserError(f"{folder} holds no weights: none of {', '.join(_WEIGHTS)}")
    return config.get("model_cfg", config), Path(weights) if weights is not None else found[0]


def _build(open_clip: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Any:
    text = dict(config["text_cfg"])
    if text.get("hf_model_name") or text.get("embed_cls"):
        raise UserError(f"{where}: only open_clip's own causal text towers are supported, not {text}")
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        tower = open_clip.model._build_text_tower(config["embed_dim"], text, config.get("quick_gelu", False))
    # The tower's tensors lie at the top in older models, under `text.` in newer; the image tower's beside.
    inner = {name.removeprefix("text."): each for name, each in tensors.items()}
    load_strict(tower, {name: each for name, each in inner.items() if name.startswith(_TOWER)}, where)
    return tower


def _states(tower: Any, ids: Tensor, skip: int, final_norm: bool) -> tuple[Tensor, Tensor | None]:
    output = tower.forward_intermediates(ids, output_fmt="NLC")
    layers = output["text_intermediates"]
    check_skip(skip, len(layers))
    hidden = layers[-1 - skip]
    return tower.ln_final(hidden) if final_norm else hidden, output["text_features"]
