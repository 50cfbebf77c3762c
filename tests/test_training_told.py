"""What a network without text is told in training: maps, low resolutions, blurred pictures, and nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ldm.emoji.pools  # noqa: F401 (the kind of data)
from ldm.condition import Condition
from ldm.config import from_dict
from ldm.emoji.composition import Composition
from ldm.emoji.mixture import REGIONS, Mixture, MixtureConfig
from ldm.emoji.sprites import load_sprites
from ldm.emoji.things import THINGS
from ldm.errors import UserError
from ldm.system.plain import PlainSystem
from ldm.training.data.examples import Batch
from ldm.training.data.told import blurred
from ldm.training.distributed import BatchGenerator
from ldm.training.objectives import diffusion

UNET2D = {
    "kind": "unet2d",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
UNET = {
    **UNET2D,
    "kind": "unet",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "map": {"kind": "semantic_map"},
    "tokens": {"kind": "semantic_map", "by": "cross_attention", "tokens": 4},
    "low": {"kind": "low_resolution", "resolution": 4},
    "blurred": {"kind": "blurred", "blur": 2},
}


def objective(sprites: str, condition: dict[str, Any], **changes: Any) -> diffusion.Objective:
    mixture = {"size": 32, "things": ["tree", "star", "rocket"], "styles": ["3d"]}
    settings = {
        "data": {"kind": "compositions", "sprites": sprites, "mixture": mixture},
        "network": UNET if condition.get("by") == "cross_attention" else UNET2D,
        "condition": condition,
        "validation": {"pictures": 4, "steps": 2, "guidance": 2.0},
        "validation_pictures": 4,
        **changes,
    }
    made = diffusion.Objective(from_dict(diffusion.Config, settings))
    made.prepare(torch.device("cpu"), 8)
    for parameter in made.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def told_of(made: diffusion.Objective, batch: Batch, dropped: torch.Tensor) -> Condition:
    return made.source.told(batch, made.system.shape[-1], dropped)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_from_what_it_is_told_and_draws_by_it(sprites: str, tmp_path: Path, kind: str) -> None:
    made = objective(sprites, KINDS[kind])
    batch = made.batch(0, 8, slice(None))
    value, _ = made.loss(made.model, batch, BatchGenerator(0, 8, slice(None)))
    value.backward()
    assert all(each.grad is not None for each in made.model.parameters())
    none = torch.zeros(8, dtype=torch.bool)
    told = told_of(made, batch, none)
    x, timestep = torch.randn(8, 3, 32, 32), torch.full((8,), 500.0)
    with torch.no_grad():
        under = made.model(x, timestep, told)
        other = made.model(x, timestep, told_of(made, made.batch(8, 8, slice(None)), none))
        untold = made.model(x, timestep, told_of(made, batch, ~none))
    assert not torch.allclose(under, other, atol=1e-4)
    assert not torch.allclose(under, untold, atol=1e-4)
    # What is left out is what guidance takes for no condition.
    with torch.no_grad():
        assert torch.equal(made.model(x, timestep, made.system.without(told)), untold)
    made.validate(made.model.eval(), tmp_path, 0)
    made.export(made.model, tmp_path / "export", "")
    assert PlainSystem.load(tmp_path / "export").wants == made.system.wants


def test_a_map_says_where_the_things_are(sprites: str) -> None:
    """What is the same before white and before blue is the thing; its edge, of both, is the only doubt."""
    mixture = Mixture(load_sprites(sprites), MixtureConfig(size=64, things=["tree"], styles=["3d"]))
    white, blue = (mixture.draw(Composition("single", ("tree",), "3d", each)) for each in ("white", "blue"))
    same = (white.picture == blue.picture).all(-1)
    here = white.regions == REGIONS.index(THINGS["tree"].category)
    assert here.sum() > 100 and (white.regions[~here] == 0).all()
    assert (same ^ here).mean() < 0.1


def test_the_map_reaches_the_network_as_one_hot_channels(sprites: str) -> None:
    made = objective(
        sprites, {"kind": "semantic_map", "dropout": 0.0}, validation={"pictures": 4, "steps": 2}
    )
    batch = made.batch(0, 4, slice(None))
    dropped = torch.tensor([False, True, False, False])
    channels = told_of(made, batch, dropped).channels
    assert channels is not None and batch.maps is not None
    assert torch.equal(channels.argmax(1)[0], batch.maps[0])
    assert torch.equal(channels.sum(1)[2:], torch.ones(2, 32, 32)) and not channels[1].any()


def test_a_blurred_picture_is_convolved_with_a_gaussian() -> None:
    from scipy.ndimage import gaussian_filter

    pictures = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    wanted = gaussian_filter(pictures.numpy(), (0, 0, 2.0, 2.0), mode="nearest", truncate=3.0)
    assert np.abs(blurred(pictures, 2.0).numpy() - wanted).max() < 1e-12
    plain = torch.full((1, 1, 8, 8), 0.3)
    assert torch.allclose(blurred(plain, 5.0), plain, atol=1e-6)


@pytest.mark.parametrize(
    ("condition", "changes", "message"),
    [
        ({"kind": "semantic_map"}, {"data": {"kind": "digits"}}, "don't say what lies where"),
        ({"kind": "semantic_map", "by": "cross_attention"}, {"network": UNET2D}, "take network.kind unet"),
        ({"kind": "low_resolution", "resolution": 64}, {}, "resolution is 64"),
        ({"kind": "blurred", "blur": 0}, {}, "blur is 0"),
        ({"kind": "blurred", "dropout": -1}, {}, "dropout is -1"),
    ],
)
def test_what_can_not_be_told_is_refused_in_one_line(
    sprites: str, condition: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        objective(sprites, condition, **changes)
    assert "\n" not in str(caught.value)
