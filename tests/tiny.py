"""Tiny models with random weights for the tests: text encoders, tokenizers and whole diffusers pipelines.

The vocabularies are made up, so nothing is downloaded. Norms get random scales and shifts (at their initial
ones and zeros a norm that is skipped, doubled or swapped could pass unseen), and every build is seeded.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ldm.conditioning.tokenizer import EOS, write_clip_tokenizer

Family = Literal["sd1", "sd2", "sdxl", "refiner", "inpaint", "bert"]

MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]
CLIP_VOCABULARY = 2 * 256 + len(MERGES) + 2
BERT_WORDS = ["a", "cat", "dog", "the", "photo", "of", "raccoon", "astro", "##naut", ",", "."]
WIDTH = 32  # of the text encoders' hidden states


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms random scales and shifts and every bias random values; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                scales = name.endswith("weight")
                parameter.copy_(1 + 0.3 * noise if scales else 0.1 * noise)
    return module.eval()


def _louder(module: nn.Module, seed: int = 1) -> nn.Module:
    """transformers starts text encoders at 2 % noise, where every prompt looks alike: draw larger weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return randomize(module, seed)


# Text encoders


def clip_tokenizer_folder(folder: Path, pad_token: str = EOS, size: int = 77) -> Path:
    """A CLIP tokenizer of 256 bytes and a few merges."""
    write_clip_tokenizer(folder, MERGES, pad_token, size)
    return folder


def clip_model(projection: bool = False, act: str = "quick_gelu", layers: int = 3, seed: int = 1) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        projection_dim=24,
        bos_token_id=0,
        eos_token_id=2,  # as published: the highest id in the window is then the end of the text
        pad_token_id=1,
    )
    return _louder((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def bert_model(masked: bool = True) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(bert_vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        use_attention_mask=masked,
    )
    return _louder(BertModel(config))


def bert_vocabulary() -> list[str]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1) if chr(c) not in BERT_WORDS]
    pieces = [f"##{chr(c)}" for c in range(ord("a"), ord("z") + 1)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BERT_WORDS, *letters, *pieces]


def bert_tokenizer_folder(folder: Path, size: int = 16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
    config = {"tokenizer_class": "BertTokenizerFast", "model_max_length": size, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_clip_folder(tmp: Path, projection: bool = False, pad_token: str = EOS) -> Path:
    """`text_encoder/` and `tokenizer/` of a tiny CLIP."""
    clip_model(projection).save_pretrained(tmp / "text_encoder")
    clip_tokenizer_folder(tmp / "tokenizer", pad_token)
    return tmp


def tiny_bert_folder(tmp: Path, masked: bool = True, size: int = 16) -> Path:
    """`text_encoder/` and `tokenizer/` of a tiny BERT."""
    bert_model(masked).save_pretrained(tmp / "text_encoder")
    bert_tokenizer_folder(tmp / "tokenizer", size)
    return tmp


def tiny_t5_folder(tmp: Path, size: int = 16) -> Path:
    """`text_encoder/` and `tokenizer/` of a tiny T5 whose tokens are single letters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [("▁", -2.0), *((chr(c), -3.0) for c in range(ord("a"), ord("z") + 1))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=size)
    tokenizer.save_pretrained(tmp / "tokenizer")
    config = T5Config(vocab_size=len(vocabulary), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    _louder(T5EncoderModel(config)).save_pretrained(tmp / "text_encoder")
    return tmp


# Whole pipelines

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tiny_unet(family: Family, seed: int = 3, **more: Any) -> Any:
    """more: settings beside those of the family."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 9 if family == "inpaint" else 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    if family == "sd2":
        settings |= {"attention_head_dim": (2, 4), "use_linear_projection": True}
    if family == "sdxl":
        settings |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        }
    if family == "refiner":
        settings |= {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": 2,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 5 * 8,
        }
    torch.manual_seed(seed)
    return randomize(UNet2DConditionModel(**settings, **more), seed)


def tiny_vae(family: Family, seed: int = 4) -> Any:
    """An autoencoder of factor 2: 16x16 latents are 32x32 pixels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.13025 if family in ("sdxl", "refiner") else 0.18215,
    )
    return randomize(vae, seed)


def tiny_pipeline_folder(
    tmp: Path, family: Family, scheduler: dict[str, Any] | None = None, kind: str = "", **unet: Any
) -> Path:
    """Build a pipeline of tiny networks with diffusers and let diffusers save it into `tmp`.

    `scheduler` is laid over SCHEDULER; its "_class_name" chooses the class. kind: of a family of one text encoder, the
    pipeline's class in place of its own. unet: settings beside those of the family. Pictures are 32x32.
    """
    import diffusers
    from transformers import BertTokenizerFast, CLIPTokenizerFast

    settings = SCHEDULER | (scheduler or {})
    parts: dict[str, Any] = {
        "unet": tiny_unet(family, **unet),
        "vae": tiny_vae(family),
        "scheduler": getattr(diffusers, settings["_class_name"]).from_config(settings),
    }
    pads = tmp / "made"  # the tokenizers' own files, from which diffusers saves its copies
    if family == "bert":
        parts["text_encoder"] = bert_model()
        parts["tokenizer"] = BertTokenizerFast.from_pretrained(bert_tokenizer_folder(pads))
    elif family == "refiner":
        parts |= {"text_encoder": None, "tokenizer": None}
    else:
        gelu = family == "sd2"
        parts["text_encoder"] = clip_model(act="gelu" if gelu else "quick_gelu")
        parts["tokenizer"] = CLIPTokenizerFast.from_pretrained(
            clip_tokenizer_folder(pads, "!" if gelu else EOS)
        )
    if family in ("sdxl", "refiner"):
        parts["text_encoder_2"] = clip_model(projection=True, act="gelu", seed=2)
        parts["tokenizer_2"] = CLIPTokenizerFast.from_pretrained(clip_tokenizer_folder(pads / "2", "!"))
    if family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(**parts)
    elif family == "refiner":
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
            **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
        )
    else:
        name = "StableDiffusionInpaintPipeline" if family == "inpaint" else "StableDiffusionPipeline"
        pipeline = getattr(diffusers, kind or name)(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(tmp / family)
    return tmp / family


def let_torchvision_import() -> None:
    """Make torchvision import beside a torch of another build, as open_clip needs it on such a machine.

    Its Python side registers fakes for operators that its compiled side failed to declare; two empty
    declarations are enough for what open_clip does with it. Call it before transformers is imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        importlib.import_module("torchvision")
