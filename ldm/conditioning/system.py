"""The text conditioning of a whole checkpoint: one encoder, or SDXL's pair."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.conditioning.architectures import architecture_of
from ldm.conditioning.load import build_text_encoder, tokenizer_name
from ldm.conditioning.open_clip import is_open_clip
from ldm.conditioning.sdxl import join
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import EOS, clip_tokenizer, load_tokenizer
from ldm.errors import UserError


def build_conditioning(
    checkpoint: Checkpoint,
    folder: str | Path | None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Build the checkpoint's text encoder; SDXL's pair (or its refiner's second) where there is a second.

    `folder` holds the tokenizers as in a diffusers folder. None: a single file, which has none, so CLIP's own
    vocabulary is taken (see `clip_tokenizer`), as it is for open_clip's checkpoints. Raises UserError.
    """
    where = str(folder) if folder is not None else "the checkpoint"
    names = [name for name in ("text_encoder", "text_encoder_2") if name in checkpoint.tensors]
    if not names:
        raise UserError(f"{where} has no text encoder")
    paired = "text_encoder_2" in names
    parts = [
        build_text_encoder(
            checkpoint.configs[name],
            checkpoint.tensors[name],
            _tokenizer(checkpoint.configs[name], name, folder),
            torch_dtype=torch_dtype,
            device=device,
            name=name,
            penultimate=paired,
            where=f"{where}: {name}",
        )
        for name in names
    ]
    zeros = bool(checkpoint.options.get("force_zeros_for_empty_prompt", True))
    return join(parts, zeros) if paired else parts[0]


def _tokenizer(config: Mapping[str, Any], name: str, folder: str | Path | None) -> Any:
    if is_open_clip(config):
        return None
    if folder is not None:
        architecture = architecture_of(config, f"{folder}: {name}")
        return load_tokenizer(Path(folder) / tokenizer_name(name), architecture.name)
    # OpenCLIP's towers (plain GELU) pad with id 0, as in diffusers' folders; OpenAI's with the end token.
    return clip_tokenizer(pad_token="!" if config.get("hidden_act") == "gelu" else EOS)
