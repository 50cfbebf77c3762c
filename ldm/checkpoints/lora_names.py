"""The names that adapters' files give to a model's layers and to the parts of an adapter.

A key is a layer's name and a part, such as `lora_unet_mid_block_..._to_q` and `lora_down.weight`. All names of a layer
are computed from the model; nothing is found by replacing text in a key. Sources: diffusers' `loaders.lora_pipeline`
and its training scripts of all ages, peft, kohya's sd-scripts, ComfyUI's `comfy.lora`, LyCORIS and OneTrainer.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.files import a_few
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.layouts import canonical_clip, unet_rows
from ldm.errors import printable

# The prefixes before dotted names, by component; those before names with underscores.
_DOTTED = {
    "unet": ("unet.", "unet.base_model.model.", "diffusion_model.", "model.diffusion_model."),
    "text_encoder": tuple(
        f"{before}{clip}{after}"
        for clip in ("clip_l.", "clip_h.")
        for before in ("", "text_encoders.")
        for after in ("", "transformer.")
    ),
    "text_encoder_2": ("clip_g.", "clip_g.transformer.", "text_encoders.clip_g.transformer."),
}
FLAT = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
PEFT = "base_model.model."  # before the names in peft's own files
_OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down", "down")
_UP = ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up", "up")
_FACTORS = (
    *(f"hada_{each}" for each in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{each}" for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
# A part's spellings, and ours.
_PARTS = {
    **{f"{each}.weight": "down" for each in _DOWN},
    **{f"{each}.weight": "up" for each in _UP},
    **{"lora_A": "down", "lora_B": "up", "lora_mid.weight": "mid"},
    **{"lora_B.bias": "up_bias", "lora_up.bias": "up_bias"},
    **{each: each for each in ("alpha", "scalar", "dora_scale", "diff", "diff_b", "on_input", "ia3_l")},
    **{"lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"},
    **{"w_norm": "diff", "b_norm": "diff_b"},
    **{
        f"{before}{each}": each
        for before in ("base_layer.", "modules_to_save.")
        for each in ("weight", "bias")
    },
    **{"weight": "weight", "bias": "bias", "set_weight": "weight"},
    **{each: each for each in _FACTORS},
}
_FIRST = {each.partition(".")[0] for each in _PARTS}
# After these peft's state has the adapter's own name, as in `lora_A.default.weight`.
_NAMED = {"lora_A", "lora_B", "lora_magnitude_vector", "ia3_l", "modules_to_save", *_FACTORS}

# Kinds that can't be read, by how a part of their keys begins.
_OTHER_KINDS = {
    "an OFT": ("oft_",),
    "a BOFT": ("boft_", "rescale"),
    "a GLoRA": ("a1", "a2", "b1", "b2"),
    "an AdaLoRA": ("lora_E", "ranknum"),
    "a LoRA of embeddings": ("lora_embedding_",),
    "an adapter of trained tokens": ("trainable_tokens", "token_adapter"),
    "an adapter with sparse biases": ("bias_indices", "bias_values", "bias_size"),
    "a VeRA": ("vera_",),
    "a FourierFT": ("fourierft_",),
    "an HRA": ("hra_",),
    "a GraLoRA": ("gralora_",),
    "a Bone or MiSS": ("bone_", "miss_"),
}
# What else lies in such files and has no part in drawing, by how a key begins; and by any of its pieces.
_PASSENGERS = {
    "the text projection, which this model doesn't have": (
        *("lora_te_text_projection", "lora_te1_text_projection", "text_encoder.text_projection"),
        *("clip_l.text_projection", "clip_l.transformer.text_projection"),
        "text_encoders.clip_l.transformer.text_projection",
    ),
    "the state of a training": (
        *("optimizer", "lr_scheduler", "global_step", "epoch", "step", "iteration", "loss", "ema_decay"),
        *(
            "num_updates",
            "training_",
            "random_state",
            "betas",
            "alphas_",
            "sqrt_",
            "log_one_minus",
            "posterior_",
        ),
    ),
    "averages of a training (EMA)": ("ema.", "ema_model.", "model_ema."),
    "embeddings without a word (load_textual_inversion reads those in files of their own)": (
        *("emb_params", "text_embeddings", "string_to_param", "string_to_token", "clip_l", "clip_g"),
    ),
    "the file's description": ("__metadata", "ss_", "modelspec.", "sshs_", "lora_name", "version"),
}
_TOWERS = ("vision_model", "visual_projection", "vision_tower", "logit_scale", "position_ids")
# Other families, by pieces of the names of their layers.
_FAMILIES = {
    "Flux, HunyuanVideo or another model of double and single blocks": (
        *("double_blocks", "single_blocks", "single_transformer_blocks", "txtfusion"),
    ),
    "Stable Diffusion 3": ("joint_blocks", "joint_transformer_blocks", "context_block"),
    "AnimateDiff (motion modules)": ("motion_module", "temporal_transformer"),
    "Stable Cascade": ("lora_prior_",),
    "ControlNet-LLLite": ("lllite_",),
    "IP-Adapter": ("ip_adapter", "to_k_ip", "to_v_ip", "image_proj"),
    "a diffusion transformer (such as SD3, Flux or Qwen-Image)": (
        *(
            "add_q_proj",
            "add_k_proj",
            "img_mlp",
            "img_mod",
            "lora_transformer_",
            "adaln",
            "adaLN",
            "x_embedder",
        ),
    ),
    "Wan or another model of plain blocks": (
        *("lora_unet_blocks_", "diffusion_model.blocks.", "transformer.blocks.", "diffusion_model.layers."),
    ),
    "SDXL": ("lora_te2_", "text_encoder_2.", "clip_g.", "add_embedding", "label_emb"),
    "Stable Diffusion 3 or Flux": ("lora_te3_", "text_encoder_3.", "t5xxl."),
}


@dataclass(frozen=True)
class Layer:
    """A layer of a component's network.

    path: in the network. name: as files spell it. shape: of its weight. norm: its weight is a scale per channel.
    """

    component: str
    path: str
    name: str
    shape: tuple[int, ...]
    bias: bool = True
    norm: bool = False

    def key(self, part: str) -> str:
        """Return a name in diffusers' layout, which is ours."""
        return f"{self.component}.{self.name}.{part}"


def layers_of(component: str, network: nn.Module) -> list[Layer]:
    """Return the layers that an adapter can change: linear layers, convolutions and norms."""
    return [
        Layer(
            component,
            path,
            name_of(path),
            tuple(module.weight.shape),
            module.bias is not None,
            isinstance(module, nn.GroupNorm | nn.LayerNorm),
        )
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm)
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]


def name_of(path: str) -> str:
    """Return the layer's name in files: CLIP's begin with `text_model.` in any version of transformers."""
    (name,) = canonical_clip({path: torch.empty(0)})
    return name


def names_in_ldm(layers: Iterable[Layer], unet_config: Mapping[str, Any] | None) -> dict[Layer, str]:
    """Return LDM's names of the U-Net's layers; {} where its config is not known."""
    unet = {f"{layer.name}.weight": layer for layer in layers if layer.component == "unet"}
    if unet_config is None or not unet:
        return {}
    ldm = KeyMap.over_ours(unet_rows(unet_config), unet, "unet").names()
    return {unet[ours]: theirs.removesuffix(".weight") for (ours,), theirs in ldm.items()}


def spellings(
    layers: Collection[Layer], unet_config: Mapping[str, Any] | None, bare: Collection[str] = ("unet",)
) -> dict[str, Layer]:
    """Return the layers by all the names that they have been given.

    bare: the components whose layers' names also stand alone, or behind peft's prefix; of two text encoders one.
    """
    ldm = names_in_ldm(layers, unet_config)
    found: dict[str, Layer] = {}
    for layer in layers:
        for stem in _stems(layer, ldm.get(layer), layer.component in bare):
            if found.setdefault(stem, layer) != layer:
                raise ValueError(f"{stem} would be two layers: {found[stem].path} and {layer.path}")
    return found


def bare_spellings(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Return the layers by those of their names that don't say which component they are of."""
    return {
        stem: layer
        for layer in layers
        for name in {layer.name, layer.path, layer.name.removeprefix("text_model.")}
        for stem in (name, PEFT + name, "lycoris_" + name.replace(".", "_"))
    }


def _stems(layer: Layer, in_ldm: str | None, bare: bool) -> Iterator[str]:
    own = f"{layer.component}."
    names = {layer.name, layer.path, layer.name.removeprefix("text_model."), in_ldm or layer.name}
    flat = [*FLAT.get(layer.component, ()), *["lycoris_"] * bare]
    yield from (before + name.replace(".", "_") for before in flat for name in names)
    parent, _, projection = layer.name.removesuffix(".0").rpartition(".")
    if (old := _OLD.get(projection, projection)) in ("to_q", "to_k", "to_v", "to_out"):
        names |= {f"{parent}.{old}", f"{parent}.processor.{old}"}
    prefixes = {own, own + PEFT, *_DOTTED.get(layer.component, ()), *["", PEFT] * bare}
    yield from (before + name for before in prefixes for name in names)


# Keys


def split_key(key: str) -> tuple[str, str] | None:
    """Return the layer's name in a key and the part; None where it ends in no part that is known."""
    pieces = key.rsplit(".", 4)
    for place in range(1, len(pieces)):
        first, *rest = pieces[place:]
        if first not in _FIRST:
            continue
        if first in _NAMED and rest and rest[0] not in ("weight", "bias"):
            rest = rest[1:]
        if part := _PARTS.get(".".join([first, *rest])):
            return ".".join(pieces[:place]).removesuffix("_lora"), part
    return None


def other_kind(key: str) -> str | None:
    """Return the kind of adapter that a key tells of, where that is one that can't be read."""
    tail = key.rsplit(".", 3)[1:]
    for kind, beginnings in _OTHER_KINDS.items():
        if any(
            piece.startswith(each) if each.endswith("_") else piece == each
            for piece in tail
            for each in beginnings
        ):
            return kind
    return None


def passenger(key: str) -> str | None:
    """Return what a key is that has no part in drawing; None for any other."""
    for what, beginnings in _PASSENGERS.items():
        if any(
            key == each or key.startswith(each if each[-1] in "._" else f"{each}.") for each in beginnings
        ):
            return what
    return "of parts of CLIP that draw nothing" if any(each in key for each in _TOWERS) else None


def family(keys: Iterable[str]) -> str | None:
    """Return the family of models whose layers' names these are, where they tell it and it is none of ours."""
    keys = list(keys)
    for name, pieces in _FAMILIES.items():
        if any(piece in key for key in keys for piece in pieces):
            return name
    return None


def shown(keys: Collection[str], n: int = 3) -> str:
    """Return the first keys for a message of one line, whatever is in them."""
    return a_few([printable(key if len(key) <= 200 else f"{key[:80]}...") for key in keys], n)
