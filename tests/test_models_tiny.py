"""The tiny autoencoder against diffusers', and what its config refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component, write_component
from ldm.errors import UserError
from ldm.models.autoencoder_tiny import AutoencoderTiny, TinyConfig
from pipelines.preview import load_tiny

TINY: dict[str, Any] = {
    "latent_channels": 5,
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (12, 12, 12),
    "num_encoder_blocks": (0, 2, 1),
    "num_decoder_blocks": (2, 1, 0),
}


def theirs(seed: int = 0, **changes: Any) -> Any:
    """diffusers' network with random biases."""
    from diffusers import AutoencoderTiny as Theirs

    torch.manual_seed(seed)
    network = Theirs(**{**TINY, **changes})
    for parameter in network.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "changes", [{}, {"upsampling_scaling_factor": 3}, {"scaling_factor": 0.5, "shift_factor": 0.25}]
)
@torch.no_grad()
def test_it_equals_diffusers_from_its_folder_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    from diffusers import AutoencoderTiny as Theirs

    expected = theirs(**changes)
    expected.save_pretrained(tmp_path / "theirs")
    config, tensors = read_component(tmp_path, "theirs")
    ours = AutoencoderTiny(TinyConfig.from_diffusers(config))
    load_strict(ours, tensors, tmp_path)
    ours.eval().requires_grad_(False)
    latent, picture = 3 * torch.randn(2, 5, 6, 4), torch.rand(2, 3, 24, 16) * 2 - 1
    decoded, encoded = ours.decode(latent), ours.encode(picture)
    assert decoded.shape[2:] == (6 * ours.config.factor, 4 * ours.config.factor)
    # convolutions in another order of sums, of float32
    torch.testing.assert_close(decoded, expected.decode(latent).sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded, expected.encode(picture).latents, rtol=1e-4, atol=1e-5)
    # as diffusers' pipelines bring a U-Net's latents to a decoder, and pictures' latents to a U-Net
    factor, shift = expected.config.scaling_factor, expected.config.shift_factor
    torch.testing.assert_close(ours.unscale(latent), latent / factor + shift)
    torch.testing.assert_close(ours.scale(latent), (latent - shift) * factor)

    write_component(tmp_path, "ours", ours.config.to_diffusers(), ours.state_dict())
    back = Theirs.from_pretrained(tmp_path / "ours").eval()
    settings = [json.loads(each.to_json_string()) for each in (back, expected)]
    assert settings[0] | {"_name_or_path": ""} == settings[1] | {"_name_or_path": ""}
    assert all(torch.equal(back.state_dict()[name], each) for name, each in expected.state_dict().items())


@torch.no_grad()
def test_packed_weights_and_plain_ones_decode_alike() -> None:
    """The first call packs a frozen network's weights; one that is trained has plain ones."""
    ours = AutoencoderTiny(TinyConfig(**TINY)).eval()
    latent = torch.randn(1, 5, 4, 4)
    plain = ours.decode(latent)
    torch.testing.assert_close(ours.requires_grad_(False).decode(latent), plain, rtol=1e-4, atol=1e-5)


def test_taesds_config_is_the_default() -> None:
    """The one of madebyollin/taesd, by the keys that its config.json has."""
    published = {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": "0.20.0.dev0",
        "act_fn": "relu",
        "decoder_block_out_channels": [64, 64, 64, 64],
        "encoder_block_out_channels": [64, 64, 64, 64],
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": 4,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": [3, 3, 3, 1],
        "num_encoder_blocks": [1, 3, 3, 3],
        "out_channels": 3,
        "scaling_factor": 1.0,
        "upsampling_scaling_factor": 2,
    }
    config = TinyConfig.from_diffusers(published)
    assert config == TinyConfig() and config.factor == 8
    with torch.device("meta"):
        ours = AutoencoderTiny(config)
    shapes = {name: each.shape for name, each in ours.state_dict().items()}
    from diffusers import AutoencoderTiny as Theirs

    assert shapes == {name: each.shape for name, each in Theirs().state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported"),
        ({"upsample_fn": "bilinear"}, "upsample_fn = 'bilinear' is not supported"),
        ({"_class_name": "AutoencoderKL"}, "another network than the AutoencoderTiny"),
        ({"decoder_block_out_channels": [8, 16, 8]}, "one width throughout"),
        ({"num_decoder_blocks": [1, 1]}, "num_decoder_blocks has 2 values for a network of 3 levels"),
        ({"num_encoder_blocks": [1, -1, 1]}, "num_encoder_blocks is"),
        ({"num_encoder_blocks": [1, 10**6, 1]}, "1,000,005 layers"),
        ({"scaling_factor": 0.0}, "would lose every latent"),
        ({"shift_factor": float("inf")}, "a finite number"),
        ({"latent_channels": 0}, "latent_channels is 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {**TinyConfig(**TINY).to_diffusers(), **changes}
    with pytest.raises(UserError, match=message):
        TinyConfig.from_diffusers(json.loads(json.dumps(config)))


def test_one_of_other_latents_is_refused(tmp_path: Path) -> None:
    from ldm.models.autoencoder import AutoencoderConfig

    theirs().save_pretrained(tmp_path / "tiny")
    other = AutoencoderConfig()
    with pytest.raises(UserError, match=r"tiny has 5 latent channels, the model's autoencoder 4"):
        load_tiny(tmp_path / "tiny", other)
    theirs(latent_channels=4).save_pretrained(tmp_path / "small")
    with pytest.raises(
        UserError, match=r"small has 4 pixels a side for each latent, the model's autoencoder 8"
    ):
        load_tiny(tmp_path / "small", other)
    with pytest.raises(UserError, match="no folder"):
        load_tiny(tmp_path / "none", other)
    (tmp_path / "small" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"small/config\.json"):
        load_tiny(tmp_path / "small", other)
