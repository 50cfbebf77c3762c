"""UNet2D against diffusers' UNet2DModel, from the same random weights, in float32."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models.networks import NETWORKS
from ldm.models.unet2d import UNet2D
from ldm.models.unet2d_config import UNet2DConfig

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
KINDS: dict[str, dict[str, Any]] = {
    "positional": SMALL,
    "ddpm": {  # as google/ddpm-cifar10-32 is
        **SMALL,
        "layers_per_block": 2,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "fourier": {**SMALL, "time_embedding_type": "fourier", "time_embedding_dim": 24},
    "classes": {
        **SMALL,
        "num_class_embeds": 11,
        "in_channels": 4,
        "out_channels": 8,
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 4,
    },
    "attention everywhere": {
        **SMALL,
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "attention_head_dim": 16,
        "attn_norm_num_groups": 4,
        "norm_eps": 0.1,
    },
    "no attention": {
        **SMALL,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "attention_head_dim": 5,  # which divides nothing, and nothing asks for it
        "add_attention": False,
    },
    "resized in residual blocks": {  # as openai's consistency models of ImageNet are
        **SMALL,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "num_class_embeds": 10,
    },
    "no middle": {**SMALL, "mid_block_type": None, "attention_head_dim": 8},
    "one level": {
        **SMALL,
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
}


def pair(name: str) -> tuple[UNet2D, Any]:
    """Our network and diffusers', of the same weights, random in norms and biases too."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    theirs = UNet2DModel(**KINDS[name]).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:  # Fourier features keep the frequencies that they drew
            nn.init.normal_(parameter, std=0.1)
            parameter.data += 0.5 if parameter.ndim == 1 else 0.0
    ours = UNet2D(UNet2DConfig.from_diffusers(json.loads(theirs.to_json_string()))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def labels_of(network: UNet2D, rows: int) -> torch.Tensor | None:
    classes = network.config.num_class_embeds
    return torch.randint(classes, (rows,)) if classes else None


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_equals_diffusers(name: str) -> None:
    ours, theirs = pair(name)
    sample, labels = torch.randn(2, ours.config.in_channels, 16, 12), labels_of(ours, 2)
    told = torch.tensor([0.3, 40.0]) if name == "fourier" else torch.tensor([3, 981])
    expected = theirs(sample, told, class_labels=labels).sample
    found = ours(sample, told, Condition(labels=labels))
    # Float32's error after some ten layers; wrong arithmetic is off by a tenth or more.
    assert found.shape == expected.shape and float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_configs_and_weights_return_to_diffusers(name: str) -> None:
    from diffusers import UNet2DModel

    ours, theirs = pair(name)
    again: Any = UNet2DModel.from_config(json.loads(json.dumps(ours.config.to_diffusers())))
    again.load_state_dict(ours.state_dict(), strict=True)
    assert UNet2DConfig.from_diffusers(json.loads(again.to_json_string())) == ours.config
    kept, given = (json.loads(each.to_json_string()) for each in (again, theirs))
    assert kept | {"_use_default_values": None} == given | {"_use_default_values": None}


@torch.no_grad()
def test_odd_sizes_come_back_as_they_were() -> None:
    ours, _ = pair("ddpm")
    assert ours(torch.randn(1, 3, 9, 7), torch.tensor([5.0]), Condition()).shape == (1, 3, 9, 7)
    assert ours.multiple == 4


@torch.no_grad()
def test_channels_are_joined_and_new_ones_begin_without_a_say() -> None:
    ours, _ = pair("positional")
    sample, told, more = torch.randn(2, 3, 8, 8), torch.tensor([5.0, 800.0]), torch.randn(2, 2, 8, 8)
    before = ours(sample, told, Condition())
    ours.take_channels(5)
    assert ours.wants(3) == {"channels": 2} and ours.config.in_channels == 5
    torch.testing.assert_close(ours(sample, told, Condition(channels=more)), before, rtol=1e-4, atol=1e-5)
    nn.init.normal_(ours.conv_in.weight)
    assert not torch.allclose(ours(sample, told, Condition(channels=more)), before, atol=0.1)


def test_what_it_is_told_of_labels() -> None:
    classes, plain = UNet2D(UNet2DConfig(**KINDS["classes"])), UNet2D(UNet2DConfig(**SMALL))
    assert classes.wants(4) == {"labels": 11} and plain.wants(3) == {}
    sample, told = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="knows 11 classes, and the condition has no labels"):
        classes(sample, told, Condition())
    with pytest.raises(ValueError, match="knows no classes, and the condition has labels"):
        plain(sample[:, :3], told, Condition(labels=torch.tensor([0, 1])))


def test_it_begins_at_zero_and_learns_everywhere() -> None:
    torch.manual_seed(0)
    network = UNet2D(UNet2DConfig(**KINDS["fourier"]))
    sample, told = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0])
    assert not network(sample, told, Condition()).any()
    assert "time_proj.weight" not in dict(network.named_parameters())  # the frequencies stay
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):  # the layers that begin at zero let the others learn from the second step on
        optimizer.zero_grad()
        (network(sample, told, Condition()) - sample).square().mean().backward()
        optimizer.step()
    still = [
        n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()
    ]  # softmax is blind to what all keys have in common
    assert all(name.endswith("to_k.bias") for name in still)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "'SkipDownBlock2D' is not supported"),
    ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "'CrossAttnUpBlock2D' is not supported"),
    ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 names for a U-Net of 2 levels"),
    ({"attention_head_dim": 5}, r"attention_head_dim 5 \(the width of a head\) does not divide .* 32"),
    ({"attention_head_dim": 64}, "attention_head_dim 64"),
    ({"norm_num_groups": 7}, "norm_num_groups 7 does not divide the block_out_channels 16"),
    ({"attn_norm_num_groups": 5}, "attn_norm_num_groups 5 does not divide the block_out_channels 32"),
    ({"num_class_embeds": 0}, "num_class_embeds is 0"),
    ({"time_embedding_type": "learned"}, "time_embedding_type"),
    ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not supported"),
    ({"downsample_type": "pool"}, "downsample_type"),
    ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
    ({"freq_shift": 8}, "freq_shift is 8"),
    ({"dropout": 1.5}, "dropout is 1.5"),
    ({"norm_eps": -1.0}, "norm_eps is -1.0"),
    ({"block_out_channels": []}, "block_out_channels is"),
    ({"layers_per_block": 10**6}, "layers_per_block is 1000000"),
    ({"_class_name": "UNet2DConditionModel"}, "another network than the UNet2DModel"),
    ({"colour": 1}, "'colour' is not one this network knows"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[str(each[0])[:40] for each in FAULTS])
def test_a_config_of_which_no_network_can_be_built_names_file_and_key(
    change: dict[str, Any], message: str
) -> None:
    sound = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
    NETWORKS["UNet2DModel"].read_config(sound, "a/config.json")
    with pytest.raises(UserError, match=f"^a/config.json: .*{message}") as caught:
        NETWORKS["UNet2DModel"].read_config(sound | change, "a/config.json")
    assert "\n" not in str(caught.value)
