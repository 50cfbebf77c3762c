"""The published families of Stable Diffusion: how to tell a single file's family, and its configs.

A published single file holds tensors and no configs. The tables here are the values of the families' own
config files (diffusers' layout), which is what diffusers' loader falls back on too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.checkpoints.stated import Stated, stated
from ldm.errors import UserError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = UNET + "input_blocks.0.0.weight"  # (C, in_channels, 3, 3)
GUIDANCE = UNET + "time_embedding.cond_proj.weight"  # (C, time_cond_proj_dim), of latent consistency models


@dataclass(frozen=True)
class Family:
    """A family's configs, and the places of its text encoders in a single file.

    Attributes:
        title: as people know it.
        pipeline: diffusers' pipeline class, for a U-Net that takes nothing but latents.
        text: component -> (prefix in the single file, "clip" or "open_clip").
        unet: what its U-Net has beyond `_UNET`; `text_configs` likewise per text encoder.
        options: the entries of its model_index.json that are no components, as published.
    """

    title: str
    pipeline: str
    text: dict[str, tuple[str, str]]
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_VAE_XL: dict[str, Any] = {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-05,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published: transformers then takes the highest token id for the end of the text
    "pad_token_id": 1,
}
_CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_H = _CLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of ViT-H's 24: SD 2.x conditions on the last but one
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_CLIP_BIG_G = _CLIP | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_EULER = _SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
_LCM: dict[str, Any] = {
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
}

FAMILIES = {
    "sd1": Family(
        title="Stable Diffusion 1.x",
        pipeline="StableDiffusionPipeline",
        text={"text_encoder": ("cond_stage_model.", "clip")},
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae={"sample_size": 512},
        text_configs={"text_encoder": _CLIP_L},
        scheduler=_SCHEDULER,
    ),
    "sd2": Family(
        title="Stable Diffusion 2.x",
        pipeline="StableDiffusionPipeline",
        text={"text_encoder": ("cond_stage_model.model.", "open_clip")},
        unet={
            "sample_size": 64,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        vae={"sample_size": 768},
        text_configs={"text_encoder": _CLIP_H},
        scheduler=_SCHEDULER,
    ),
    "sdxl": Family(
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        text={
            "text_encoder": ("conditioner.embedders.0.", "clip"),
            "text_encoder_2": ("conditioner.embedders.1.model.", "open_clip"),
        },
        unet={
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=_VAE_XL,
        text_configs={"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_BIG_G},
        scheduler=_EULER,
        options={"force_zeros_for_empty_prompt": True},
    ),
    "sdxl_refiner": Family(
        title="Stable Diffusion XL's refiner",
        pipeline="StableDiffusionXLImg2ImgPipeline",
        text={"text_encoder_2": ("conditioner.embedders.0.model.", "open_clip")},
        unet={
            "sample_size": 128,
            "cross_attention_dim": 1280,
            "attention_head_dim": [6, 12, 24, 24],
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": [
                "DownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": 4,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        vae=_VAE_XL,
        text_configs={"text_encoder_2": _CLIP_BIG_G},
        scheduler=_EULER,
        options={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
}


def detect_family(tensors: Collection[str]) -> str | None:
    """Return the key in FAMILIES for a single file's tensors, by the names of its networks; None for any other."""
    if FIRST not in tensors:
        return None
    for family, layout in FAMILIES.items():
        prefixes = [
            prefix + ("transformer." if kind == "clip" else "") for prefix, kind in layout.text.values()
        ]
        if all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes):
            return family
    return None


def family_configs(
    family: str,
    tensors: Mapping[str, Tensor],
    where: object,
    prediction_type: str | None = None,
    said: Stated | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the configs of a published single file's components, from the tables and from what the file says.

    Whether an SD 2.x predicts the noise or v can't be seen in its shapes. Where the file doesn't say, v is assumed as
    diffusers does (SD 2.1, 768 pixels), and the noise for its inpainting model. `prediction_type` ("epsilon",
    "v_prediction") overrides both.

    Raises:
        UserError: input channels of a model that isn't supported, or a U-Net that isn't the family's own.
    """
    said = said or stated(tensors, {}, str(where))
    layout = FAMILIES[family]
    width, channels = tensors[FIRST].shape[:2]
    unet: dict[str, Any] = _UNET | layout.unet | {"in_channels": channels}
    if channels not in (4, 9):
        what = {8: "an instruct-pix2pix model", 5: "a depth-to-image model", 7: "an upscaler"}.get(
            channels, "unknown"
        )
        raise UserError(
            f"{where}: its U-Net takes {channels} channels ({what}); 4 and 9 (inpainting) are supported"
        )
    context = next(
        (each.shape[-1] for name, each in tensors.items() if name.endswith("attn2.to_k.weight")), None
    )
    if (width, context) != (unet["block_out_channels"][0], unet["cross_attention_dim"]):
        raise UserError(
            f"{where}: names as in {layout.title}, but its U-Net is {width} channels wide and attends to "
            f"{context} features, not {unet['block_out_channels'][0]} and {unet['cross_attention_dim']}; "
            "nothing is known of its configs: give it as a diffusers folder"
        )
    guess = "v_prediction" if family == "sd2" and channels == 4 else "epsilon"
    scheduler = layout.scheduler | {"prediction_type": guess} | said.scheduler
    if prediction_type:
        scheduler["prediction_type"] = prediction_type
    vae = _VAE | layout.vae | said.vae
    if family == "sd2" and scheduler["prediction_type"] == "v_prediction":
        unet |= {"sample_size": 96, "upcast_attention": True}
        scheduler["_class_name"] = "DDIMScheduler"
    elif family == "sd2":
        vae["sample_size"] = 512
    if family == "sd2" and said.side in (512, 768):
        unet["sample_size"] = said.side // 8
    if scheduler.get(
        "rescale_betas_zero_snr"
    ):  # else the last timestep, which is all noise, is never visited
        scheduler["timestep_spacing"] = "trailing"
    if GUIDANCE in tensors:
        unet["time_cond_proj_dim"] = tensors[GUIDANCE].shape[-1]
        scheduler |= _LCM
    text = {component: dict(config) for component, config in layout.text_configs.items()}
    return {"unet": unet, "vae": vae, **text, "scheduler": scheduler}


def pipeline_class(family: str, unet: Mapping[str, Any]) -> str:
    """Return the name of diffusers' pipeline class for a family and its U-Net."""
    plain = FAMILIES[family].pipeline
    if unet.get("in_channels") != 9:
        consistent = unet.get("time_cond_proj_dim") and plain == "StableDiffusionPipeline"
        return "LatentConsistencyModelPipeline" if consistent else plain
    return f"StableDiffusion{'XL' if 'XL' in plain else ''}InpaintPipeline"


def family_of_configs(configs: Mapping[str, Mapping[str, Any]], where: object) -> str:
    """Return which family's single-file layout a system with these configs has a place in.

    Raises:
        UserError: networks that no such layout has, e.g. a text encoder that isn't CLIP.
    """
    text = sorted(name for name in configs if name.startswith("text_encoder"))
    kinds = [str(configs[name].get("model_type", "")) for name in text]
    if not all(kind.startswith("clip") for kind in kinds) or not text or not {"unet", "vae"} <= set(configs):
        have = ", ".join(
            f"{name} ({each.get('model_type') or each.get('_class_name')})" for name, each in configs.items()
        )
        raise UserError(
            f"{where}: a single file holds a U-Net, an autoencoder and CLIP text encoders; this has {have}"
        )
    if text == ["text_encoder", "text_encoder_2"]:
        return "sdxl"
    if text == ["text_encoder_2"]:
        return "sdxl_refiner"
    if text != ["text_encoder"]:
        raise UserError(f"{where}: no single-file layout has just {' and '.join(text)}")
    # SD 2.x is told by its text encoder: OpenCLIP's activation is the plain GELU, OpenAI's the quick one.
    return "sd2" if configs["text_encoder"].get("hidden_act", "quick_gelu") == "gelu" else "sd1"
