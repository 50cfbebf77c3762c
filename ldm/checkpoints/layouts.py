"""The rows of the single-file LDM layout, per network, computed from diffusers-style configs.

Sources: the module names of CompVis/latent-diffusion (`openaimodel.UNetModel`, `model.Encoder/Decoder`), of
open_clip's text tower and of transformers' CLIP; diffusers' own converter is the reference they are tested
against.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ldm.checkpoints.keymap import CONV_1X1, STACKED, TRANSPOSED, Row, below, row
from ldm.errors import UserError

Config = Mapping[str, Any]

_PLAIN = {"DownBlock2D", "UpBlock2D"}
_ATTENDING = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}


# The U-Net


def unet_rows(config: Config) -> list[Row]:
    """Return the rows of a U-Net with diffusers' config, without the `model.diffusion_model.` before them."""
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    if unknown := sorted({*down, *up} - _PLAIN - _ATTENDING):
        raise UserError(
            f"the single-file layout has no place for a U-Net with blocks of type {', '.join(unknown)}"
        )
    layers = config.get("layers_per_block", 2)
    layers = [layers] * len(down) if isinstance(layers, int) else list(layers)
    rows = [
        row("conv_in.", "input_blocks.0.0."),
        row("time_embedding.linear_1.", "time_embed.0."),
        row("time_embedding.linear_2.", "time_embed.2."),
        row("conv_norm_out.", "out.0."),
        row("conv_out.", "out.2."),
    ]
    if config.get("time_cond_proj_dim"):
        rows.append(
            row("time_embedding.cond_proj.", "time_embedding.cond_proj.")
        )  # as diffusers' script leaves it
    if config.get("addition_embed_type") == "text_time":
        rows += _label_rows("add_embedding.")
    elif config.get("class_embed_type") in ("timestep", "projection"):
        rows += _label_rows("class_embedding.")
    return rows + _down_rows(down, layers) + _middle_rows() + _up_rows(up, layers[::-1])


def _label_rows(ours: str) -> list[Row]:
    return [row(f"{ours}linear_1.", "label_emb.0.0."), row(f"{ours}linear_2.", "label_emb.0.2.")]


def _down_rows(kinds: list[str], layers: list[int]) -> list[Row]:
    rows: list[Row] = []
    place = 1  # input_blocks.0 is the first convolution
    for i, kind in enumerate(kinds):
        for j in range(layers[i]):
            rows += _resnet_rows(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{place}.0.")
            if kind in _ATTENDING:
                rows.append(row(f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{place}.1."))
            place += 1
        if i < len(kinds) - 1:
            rows.append(row(f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{place}.0.op."))
            place += 1
    return rows


def _middle_rows() -> list[Row]:
    return [
        *_resnet_rows("mid_block.resnets.0.", "middle_block.0."),
        row("mid_block.attentions.0.", "middle_block.1."),
        *_resnet_rows("mid_block.resnets.1.", "middle_block.2."),
    ]


def _up_rows(kinds: list[str], layers: list[int]) -> list[Row]:
    rows: list[Row] = []
    place = 0
    for i, kind in enumerate(kinds):
        attends = kind in _ATTENDING
        for j in range(layers[i] + 1):
            rows += _resnet_rows(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{place}.0.")
            if attends:
                rows.append(row(f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{place}.1."))
            place += 1
        if i < len(kinds) - 1:  # the upsampler is the last part of the block's last layer
            last = f"output_blocks.{place - 1}.{2 if attends else 1}.conv."
            rows.append(row(f"up_blocks.{i}.upsamplers.0.conv.", last))
    return rows


def _resnet_rows(ours: str, theirs: str) -> list[Row]:
    pairs = {
        "norm1.": "in_layers.0.",
        "conv1.": "in_layers.2.",
        "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.",
        "conv2.": "out_layers.3.",
        "conv_shortcut.": "skip_connection.",
    }
    return below(theirs, [row(left, right) for left, right in pairs.items()], ours)


# ControlNet


def controlnet_rows(config: Config) -> list[Row]:
    """Return the rows of a ControlNet with diffusers' config, without the `control_model.` before them.

    Source: `cldm.ControlNet` of lllyasviel/ControlNet.
    """
    down, layers = list(config["down_block_types"]), int(config.get("layers_per_block", 2))
    blocks = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    rows = [
        row("conv_in.", "input_blocks.0.0."),
        row("time_embedding.linear_1.", "time_embed.0."),
        row("time_embedding.linear_2.", "time_embed.2."),
        row("controlnet_cond_embedding.conv_in.", "input_hint_block.0."),
        row("controlnet_cond_embedding.conv_out.", f"input_hint_block.{2 * blocks + 2}."),
        row("controlnet_mid_block.", "middle_block_out.0."),
    ]
    # Activations stand between the convolutions, and are counted.
    rows += [
        row(f"controlnet_cond_embedding.blocks.{i}.", f"input_hint_block.{2 * i + 2}.") for i in range(blocks)
    ]
    maps = len(down) * (layers + 1)
    rows += [row(f"controlnet_down_blocks.{i}.", f"zero_convs.{i}.0.") for i in range(maps)]
    if config.get("addition_embed_type") == "text_time":
        rows += _label_rows("add_embedding.")
    middle = _middle_rows()
    if config.get("mid_block_type") == "UNetMidBlock2D":
        middle = _resnet_rows("mid_block.resnets.0.", "middle_block.0.")
    return rows + _down_rows(down, [layers] * len(down)) + middle


# The autoencoder


def vae_rows(config: Config) -> list[Row]:
    """Return the rows of a KL autoencoder with diffusers' config, without the `first_stage_model.`."""
    blocks, layers = len(config["block_out_channels"]), int(config.get("layers_per_block", 1))
    rows = [row("quant_conv.", "quant_conv."), row("post_quant_conv.", "post_quant_conv.")]
    for side in ("encoder.", "decoder."):
        rows += below(side, _vae_ends(), side)
    for i in range(blocks):
        for j in range(layers):
            rows += _vae_resnet(f"encoder.down_blocks.{i}.resnets.{j}.", f"encoder.down.{i}.block.{j}.")
        # The decoder's blocks are numbered from the finest in LDM, from the coarsest in diffusers.
        for j in range(layers + 1):
            rows += _vae_resnet(
                f"decoder.up_blocks.{i}.resnets.{j}.", f"decoder.up.{blocks - 1 - i}.block.{j}."
            )
        if i < blocks - 1:
            rows.append(
                row(f"encoder.down_blocks.{i}.downsamplers.0.conv.", f"encoder.down.{i}.downsample.conv.")
            )
            rows.append(
                row(
                    f"decoder.up_blocks.{i}.upsamplers.0.conv.", f"decoder.up.{blocks - 1 - i}.upsample.conv."
                )
            )
    return rows


def _vae_ends() -> list[Row]:
    """Return the rows of what the encoder and the decoder have in common: both ends and the middle."""
    attention = {
        "group_norm.": "norm.",
        "to_q.": "q.",
        "to_k.": "k.",
        "to_v.": "v.",
        "to_out.0.": "proj_out.",
    }
    return [
        row("conv_in.", "conv_in."),
        row("conv_norm_out.", "norm_out."),
        row("conv_out.", "conv_out."),
        *_vae_resnet("mid_block.resnets.0.", "mid.block_1."),
        *_vae_resnet("mid_block.resnets.1.", "mid.block_2."),
        *below(
            "mid.attn_1.",
            [row(ours, theirs, CONV_1X1) for ours, theirs in attention.items()],
            "mid_block.attentions.0.",
        ),
    ]


def _vae_resnet(ours: str, theirs: str) -> list[Row]:
    pairs = {each: each for each in ("norm1.", "conv1.", "norm2.", "conv2.")} | {
        "conv_shortcut.": "nin_shortcut."
    }
    return below(theirs, [row(left, right) for left, right in pairs.items()], ours)


# Text encoders


def clip_rows() -> list[Row]:
    """Return the one row of a transformers CLIP text encoder: a single file keeps its names as they are."""
    return [row("text_model.", "transformer.text_model.")]


def open_clip_rows(layers: int) -> list[Row]:
    """Return the rows from a transformers CLIP text encoder of `layers` layers to open_clip's text tower.

    open_clip has no `position_ids` (0, 1, 2, ...), yet folders of older versions do; they travel under the
    same name, which every other reader of the layout passes over.
    """
    rows = [
        row("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        row("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        row("text_model.embeddings.position_ids", "position_ids"),
        row("text_model.final_layer_norm.", "ln_final."),
        row("text_projection.weight", "text_projection", TRANSPOSED),
    ]
    pairs = {
        "layer_norm1.": "ln_1.",
        "self_attn.out_proj.": "attn.out_proj.",
        "layer_norm2.": "ln_2.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    layer = [row(ours, theirs) for ours, theirs in pairs.items()]
    layer.append(
        row(("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."), "attn.in_proj_", STACKED)
    )
    for i in range(layers):
        rows += below(f"transformer.resblocks.{i}.", layer, f"text_model.encoder.layers.{i}.")
    return rows


# One spelling for our own names, where versions of diffusers and transformers differ


_CLIP_PARTS = (
    "embeddings.token_embedding.",
    "embeddings.position_embedding.",
    "embeddings.position_ids",
    "encoder.layers.",
    "final_layer_norm.",
)
_OLD_ATTENTION = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}


def canonical_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP text encoder's tensors with `text_model.` before the names, as published folders have it.

    transformers since 5.6 saves CLIPTextModel without that prefix, and reads both.
    """
    return {
        f"text_model.{name}" if name.startswith(_CLIP_PARTS) else name: each for name, each in tensors.items()
    }


def canonical_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an autoencoder's tensors with the attention's names and shapes of today (`to_q`, linear).

    Folders saved before diffusers 0.17 call them `query`, `key`, `value` and `proj_attn`; a few keep them as
    1x1 convolutions.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, attention, tail = name.partition(".attentions.0.")
        old = next((each for each in _OLD_ATTENTION if tail.startswith(each)), "")
        new = head + attention + _OLD_ATTENTION.get(old, "") + tail.removeprefix(old)
        renamed[new] = tensor.flatten(1) if attention and tensor.ndim > 2 else tensor
    return renamed


def is_clip(names: Iterable[str]) -> bool:
    """Tell whether these are the names of a CLIP text encoder, in either spelling."""
    return any(name.removeprefix("text_model.") == "embeddings.token_embedding.weight" for name in names)
