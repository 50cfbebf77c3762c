"""The networks against diffusers' modules, from the same random weights, in float32."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models import attention, onednn
from ldm.models.attention import attend, set_attention_backend
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from ldm.models.unet import UNet, UNetConfig

SMALL = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 16, "sample_size": 16}
DOWN4, UP4 = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
UNETS = {
    "sd1": {**SMALL, "cross_attention_dim": 24, "attention_head_dim": 4},
    "sd2": {
        **SMALL,
        "cross_attention_dim": 40,
        "attention_head_dim": [2, 4, 8, 8],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "norm_num_groups": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 48,
        "attention_head_dim": [2, 4, 6],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
    "classes": {**SMALL, "cross_attention_dim": 24, "attention_head_dim": 4, "num_class_embeds": 5},
    "inpainting": {**SMALL, "in_channels": 9, "cross_attention_dim": 24, "attention_head_dim": 4},
    "small": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}
AUTOENCODERS = {
    "sd": {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 8,
    },
    "small": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}


def randomise(module: nn.Module) -> None:
    """Random values everywhere, norms and biases too, so that a mix-up of any two tensors shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
        if parameter.ndim == 1:
            parameter.data += 0.5


def relative_l2(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (18, 10)])  # the second is halved to odd sizes
@torch.no_grad()
def test_unet_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**UNETS[name]).eval()
    randomise(theirs)
    config = UNetConfig.from_diffusers(json.loads(theirs.to_json_string()))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)

    sample = torch.randn(2, config.in_channels, *size)
    context, timestep = torch.randn(2, 7, config.cross_attention_dim), torch.tensor([3, 981])
    added = {"text_embeds": torch.randn(2, 20), "time_ids": torch.tensor([[64.0, 48, 0, 3, 64, 48]] * 2)}
    added = added if config.addition_embed_type else None
    labels = torch.tensor([4, 1]) if config.num_class_embeds else None
    expected = theirs(sample, timestep, context, class_labels=labels, added_cond_kwargs=added).sample
    parts = {"pooled": added["text_embeds"], "time_ids": added["time_ids"]} if added else {}
    latents, channels = sample[:, :4], sample[:, 4:]
    condition = Condition(context, **parts, labels=labels, channels=channels if channels.shape[1] else None)
    assert relative_l2(ours(latents, timestep, condition), expected) < 1e-5


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_equals_diffusers(name: str) -> None:
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    theirs = Theirs(**AUTOENCODERS[name]).eval()
    randomise(theirs)
    ours = AutoencoderKL(AutoencoderConfig.from_diffusers(json.loads(theirs.to_json_string()))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)

    picture = torch.rand(2, 3, 32, 48) * 2 - 1
    expected = theirs.encode(picture).latent_dist
    posterior = ours.encode(picture)
    assert relative_l2(posterior.mean, expected.mean) < 1e-5
    assert relative_l2(posterior.logvar, expected.logvar) < 1e-5
    assert relative_l2(posterior.kl(), expected.kl()) < 1e-5
    assert relative_l2(ours.decode(expected.mean), theirs.decode(expected.mean).sample) < 1e-5


@pytest.mark.parametrize("name", UNETS)
def test_configs_return_to_diffusers(name: str) -> None:
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel(**UNETS[name])
    config = UNetConfig.from_diffusers(json.loads(theirs.to_json_string()))
    again = UNet2DConditionModel.from_config(config.to_diffusers())
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


def test_a_setting_we_cannot_honour_is_named() -> None:
    with pytest.raises(UserError, match="class_embed_type = 'timestep'"):
        UNetConfig.from_diffusers({"class_embed_type": "timestep"})
    with pytest.raises(UserError, match="no_such_key"):
        UNetConfig.from_diffusers({"no_such_key": 1})
    with pytest.raises(UserError, match="attention_head_dim has 2 values"):
        UNet(UNetConfig(attention_head_dim=(8, 8)))
    with pytest.raises(UserError, match="AttnDownBlock2D"):
        UNet(UNetConfig(down_block_types=("AttnDownBlock2D",) * 4))


UNET_FAULTS = [
    ({"attention_head_dim": 5}, "attention_head_dim 5 .* does not divide the block_out_channels 32"),
    ({"attention_head_dim": 0}, "attention_head_dim is 0"),
    ({"attention_head_dim": [4, 4, 0, 4]}, r"attention_head_dim is \[4, 4, 0, 4\]"),
    ({"norm_num_groups": 7}, "norm_num_groups 7 does not divide the block_out_channels 32"),
    ({"norm_num_groups": 0}, "norm_num_groups is 0"),
    ({"block_out_channels": []}, "block_out_channels is"),
    ({"layers_per_block": 0}, "layers_per_block is 0"),
    ({"attention_head_dim": [8, 8]}, "attention_head_dim has 2 values"),
    ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 names"),
    ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
    ({"addition_embed_type": "text_time"}, "needs projection_class_embeddings_input_dim"),
    ({"dropout": 2.0}, "dropout is 2.0"),
    ({"_class_name": "UNet3DConditionModel"}, "_class_name is 'UNet3DConditionModel', another network"),
    ({"_class_name": ["UNet2DConditionModel"]}, "_class_name is"),
]
AUTOENCODER_FAULTS = [
    ({"scaling_factor": 0}, "scaling_factor is 0"),
    ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
    ({"latents_mean": [0.5], "latents_std": [1.0] * 4}, "latents_mean has 1 values for 4 latent_channels"),
    ({"latents_mean": [0.5] * 4, "latents_std": [1.0] * 3}, "latents_std has 3 values"),
    ({"latents_mean": [0.5] * 4, "latents_std": [1.0, 0, 1, 1]}, "latents_std holds a 0"),
    ({"norm_num_groups": 7}, "norm_num_groups 7 does not divide the block_out_channels 16"),
    ({"latent_channels": 0}, "latent_channels is 0"),
    ({"_class_name": "AsymmetricAutoencoderKL"}, "_class_name is 'AsymmetricAutoencoderKL', another network"),
]


@pytest.mark.parametrize(
    ("kind", "sound", "change", "message"),
    [(UNetConfig, UNETS["sd1"], *each) for each in UNET_FAULTS]
    + [(AutoencoderConfig, AUTOENCODERS["sd"], *each) for each in AUTOENCODER_FAULTS],
)
def test_a_config_of_which_no_network_can_be_built_names_file_and_key(kind, sound, change, message) -> None:
    sound = {key: list(value) if isinstance(value, tuple) else value for key, value in sound.items()}
    kind.from_diffusers(sound, "a/config.json")  # a missing _class_name is taken
    with pytest.raises(UserError, match=f"^a/config.json: .*{message}"):
        kind.from_diffusers(sound | change, "a/config.json")
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in change.items()}
    if "_class_name" not in own:  # settings that come from no file are checked too
        build = UNet if kind is UNetConfig else AutoencoderKL
        with pytest.raises(UserError, match=message), torch.device("meta"):
            build(kind(**{**{k: tuple(v) if isinstance(v, list) else v for k, v in sound.items()}, **own}))


def test_scaling_is_undone() -> None:
    tiny = {
        **AUTOENCODERS["small"],
        "latents_mean": [0.5] * 8,
        "latents_std": [2.0] * 8,
        "scaling_factor": 0.5,
    }
    model = AutoencoderKL(AutoencoderConfig.from_diffusers(tiny))
    latent = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(model.scale(latent), (latent - 0.5) * 0.5 / 2.0)
    torch.testing.assert_close(model.unscale(model.scale(latent)), latent)


def test_kl_of_the_unit_gaussian_is_zero() -> None:
    unit = DiagonalGaussian(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))
    assert torch.equal(unit.kl(), torch.zeros(2))


def test_attention_equals_the_formula_and_names_backends() -> None:
    query, key, value = torch.randn(2, 5, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    q, k, v = (t.view(2, -1, 2, 4).transpose(1, 2) for t in (query, key, value))
    expected = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8)
    torch.testing.assert_close(attend(query, key, value, heads=2), expected)
    halves = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), heads=2)  # plain products on the CPU
    torch.testing.assert_close(halves.float(), expected, atol=0.03, rtol=0.03)
    with pytest.raises(UserError, match="did you mean sdpa"):
        set_attention_backend("spda")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("lengths", [(600, 600, 40), (1100, 77, 64), (1, 4000, 16), (300, 300, 80)], ids=str)
def test_attention_is_the_same_whatever_the_processor_is_fast_with(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, faster: bool, lengths: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(attention, "plain_is_faster", lambda: faster)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: faster)
    monkeypatch.setattr(attention, "_BLOCK", 2**18)  # so that there are several
    queries, keys, width = lengths
    q, k, v = (torch.randn(2, n, 3 * width) for n in (queries, keys, keys))
    heads = (t.view(2, -1, 3, width).transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, queries, -1)
    # Sums of many rounded terms, each about 1: of bfloat16, 8 bits; of float32, some 1e-6.
    error = 3e-2 if dtype == torch.bfloat16 else 1e-5
    with torch.no_grad():
        found = attend(q.to(dtype), k.to(dtype), v.to(dtype), heads=3)
    assert found.dtype == dtype and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, atol=error, rtol=error)
    q = q.to(dtype).requires_grad_()
    attend(q, k.to(dtype), v.to(dtype), heads=3).float().sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())


def test_the_rule_of_plain_products_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, plain in (({"avx512_bf16"}, True), ({"avx512_bf16", "amx_bf16"}, False), (set[str](), False)):
        attention.plain_is_faster.cache_clear()
        monkeypatch.setattr(attention.processor, "has", flags.__contains__)
        assert attention.plain_is_faster() is plain
    attention.plain_is_faster.cache_clear()


@pytest.mark.gpu
def test_xformers_equals_sdpa_on_cuda() -> None:
    pytest.importorskip("xformers")
    q, k, v = (torch.randn(2, 64, 80, device="cuda", dtype=torch.float16) for _ in range(3))
    results = []
    for backend in ("sdpa", "xformers"):
        set_attention_backend(backend)  # type: ignore[arg-type]
        results.append(attend(q, k, v, heads=2).float())
    set_attention_backend("auto")
    assert relative_l2(results[1], results[0]) < 5e-3
