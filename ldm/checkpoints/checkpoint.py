"""What a whole text-to-image system is on disk: configs and tensors by component, under diffusers' names."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Checkpoint:
    """A system's files in memory; the tensors of a safetensors file are still memory-mapped.

    Attributes:
        pipeline: diffusers' pipeline class, e.g. "StableDiffusionPipeline".
        configs: each component's config as its own config file has it: "unet", "vae", "text_encoder",
            "text_encoder_2" (SDXL), "scheduler", and whatever else the system has.
        tensors: each network's weights by name (names as in diffusers and transformers; CLIP always with
            `text_model.`, see `canonical_clip`).
        options: the entries of model_index.json that are no components.
        notes: what a reader should be told: what was not used, or guessed.
        unused: tensors of a single file that no network uses, under the file's own names.
    """

    pipeline: str
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unused: dict[str, Tensor] = field(default_factory=dict)
