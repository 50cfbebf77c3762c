"""Enlarging networks compute the published formulas, whatever names a file has for their tensors."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.upscalers import read_upscaler, rrdb_rows
from ldm.errors import UserError
from ldm.models.esrgan import (
    CompactConfig,
    RRDBConfig,
    RRDBNet,
    SRVGGNetCompact,
    UpscalingNetwork,
    build_upscaler,
    in_tiles,
)

Tensors = dict[str, Tensor]
TINY = RRDBConfig(channels=8, growth=4, blocks=2)


def loud(network: UpscalingNetwork, seed: int = 0) -> Tensors:
    """Weights by which every convolution counts: unit gain, random biases and slopes."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, each in network.state_dict().items():
        noise = torch.randn(each.shape, generator=generator)
        tensors[name] = noise * (each[0].numel() ** -0.5 if each.ndim > 1 else 0.3)
    return tensors


def loaded(path: Path) -> UpscalingNetwork:
    file = read_upscaler(path)
    with torch.device("meta"):
        network = build_upscaler(file.kind, file.config)
    load_strict(network, file.tensors, path)
    return network.eval()


def old_names(tensors: Tensors, blocks: int, doublings: int) -> Tensors:
    """The names of 2018: by the place in nested torch.nn.Sequential (x4: 0, 1, 3, 6, 8, 10)."""
    places = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}"}
    places |= {f"conv_up{k}": f"model.{3 * k}" for k in range(1, doublings + 1)}
    places |= {"conv_hr": f"model.{2 + 3 * doublings}", "conv_last": f"model.{4 + 3 * doublings}"}
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        stem, end = name.rsplit(".", 1)
        if stem.startswith("body."):
            _, n, dense, conv = stem.split(".")
            renamed[f"model.1.sub.{n}.RDB{dense[3:]}.{conv}.0.{end}"] = tensor
        else:
            renamed[f"{places[stem]}.{end}"] = tensor
    return renamed


def middle_names(tensors: Tensors, blocks: int, doublings: int) -> Tensors:
    def named(name: str) -> str:
        for new, other in {"conv_body": "trunk_conv", "conv_up": "upconv", "conv_hr": "HRconv"}.items():
            name = name.replace(new, other)
        return name.replace("body.", "RRDB_trunk.").replace(".rdb", ".RDB")

    return {named(name): tensor for name, tensor in tensors.items()}


LAYOUTS: dict[str, Callable[[Tensors, int, int], Tensors]] = {
    "new": lambda tensors, blocks, doublings: tensors,
    "middle": middle_names,
    "old": old_names,
}


def rrdb(t: Tensors, x: Tensor, blocks: int, doublings: int, unshuffle: int) -> Tensor:
    """RRDBNet as published, from a state dict with Real-ESRGAN's names, in float64."""

    def conv(name: str, h: Tensor) -> Tensor:
        return F.conv2d(h, t[f"{name}.weight"].double(), t[f"{name}.bias"].double(), padding=1)

    def leaky(h: Tensor) -> Tensor:
        return torch.where(h > 0, h, 0.2 * h)

    b, c, height, width = x.shape
    u = unshuffle
    x = x.reshape(b, c, height // u, u, width // u, u).permute(0, 1, 3, 5, 2, 4)
    first = conv("conv_first", x.reshape(b, c * u * u, height // u, width // u))
    h = first
    for n in range(blocks):
        outer = h
        for m in (1, 2, 3):
            seen = [h]
            for k in (1, 2, 3, 4):
                seen.append(leaky(conv(f"body.{n}.rdb{m}.conv{k}", torch.cat(seen, 1))))
            h = 0.2 * conv(f"body.{n}.rdb{m}.conv5", torch.cat(seen, 1)) + h
        h = 0.2 * h + outer
    h = first + conv("conv_body", h)
    for k in range(1, doublings + 1):
        h = leaky(conv(f"conv_up{k}", h.repeat_interleave(2, -1).repeat_interleave(2, -2)))
    return conv("conv_last", leaky(conv("conv_hr", h)))


def compact(t: Tensors, x: Tensor, convolutions: int, scale: int) -> Tensor:
    """SRVGGNetCompact as published, in float64."""
    h = x
    for n in range(convolutions + 2):
        h = F.conv2d(h, t[f"body.{2 * n}.weight"].double(), t[f"body.{2 * n}.bias"].double(), padding=1)
        if n <= convolutions:
            h = torch.where(h > 0, h, h * t[f"body.{2 * n + 1}.weight"].double()[:, None, None])
    b, _, height, width = h.shape
    h = h.reshape(b, 3, scale, scale, height, width).permute(0, 1, 4, 2, 5, 3)
    h = h.reshape(b, 3, height * scale, width * scale)
    return h + x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def close(ours: Tensor, published: Tensor) -> bool:
    """float32 against float64: a chain of some fifty layers of about unit gain."""
    return bool((ours.double() - published).abs().max() <= 2e-5 * published.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("doublings", "unshuffle"), [(2, 1), (2, 2), (2, 4), (1, 1), (3, 1), (0, 1)])
def test_rrdb_is_the_published_formula(layout: str, doublings: int, unshuffle: int, tmp_path: Path) -> None:
    config = RRDBConfig(8, 4, 2, doublings, unshuffle)
    tensors = loud(RRDBNet(config))
    save_file(LAYOUTS[layout](tensors, 2, doublings), tmp_path / "x.safetensors")
    network = loaded(tmp_path / "x.safetensors")
    x = torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network(x)
    assert network.config == config
    assert found.shape == (2, 3, 12 * network.scale, 8 * network.scale)
    assert network.scale == 2**doublings // unshuffle
    assert close(found, rrdb(tensors, x.double(), 2, doublings, unshuffle))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_compact_network_is_the_published_formula(scale: int, tmp_path: Path) -> None:
    tensors = loud(SRVGGNetCompact(CompactConfig(8, 3, scale)))
    torch.save({"params": tensors}, tmp_path / "x.pth")
    network = loaded(tmp_path / "x.pth")
    x = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert close(network(x), compact(tensors, x.double(), 3, scale))


@pytest.mark.parametrize("wrapping", ["params_ema", "params", "state_dict"])
def test_a_pickle_holds_the_same(wrapping: str, tmp_path: Path) -> None:
    tensors = loud(RRDBNet(TINY))
    worse = {name: torch.zeros_like(each) for name, each in tensors.items()}
    both = {"params": worse, "params_ema": tensors} if wrapping == "params_ema" else {wrapping: tensors}
    torch.save(both, tmp_path / "x.pth")
    assert all(
        torch.equal(each, tensors[name]) for name, each in loaded(tmp_path / "x.pth").state_dict().items()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("blocks", "doublings"), [(1, 0), (6, 2), (23, 2), (2, 3)])
def test_the_maps_are_one_to_one_and_cover_all(layout: str, blocks: int, doublings: int) -> None:
    with torch.device("meta"):
        names = list(RRDBNet(RRDBConfig(8, 4, blocks, doublings)).state_dict())
    theirs = list(LAYOUTS[layout]({name: torch.empty(0) for name in names}, blocks, doublings))
    rows = rrdb_rows(layout, blocks, doublings)
    there, back = KeyMap.over_ours(rows, names, "x"), KeyMap.over_theirs(rows, theirs, "x")
    assert there.names() == {(name,): other for name, other in zip(names, theirs, strict=True)}
    assert back.names() == there.names()


def test_odd_sizes_are_filled_up_with_the_last_pixels() -> None:
    network = RRDBNet(RRDBConfig(8, 4, 1, 2, 4)).eval()
    network.load_state_dict(loud(network))
    x = torch.rand(1, 3, 9, 6)
    with torch.no_grad():
        whole = network(F.pad(x, (0, 2, 0, 3), mode="replicate"))
        assert torch.equal(network(x), whole[..., :9, :6])


@pytest.mark.parametrize(
    "network",
    [SRVGGNetCompact(CompactConfig(8, 3, 2)), *(RRDBNet(RRDBConfig(4, 2, 1, 2, u)) for u in (1, 2, 4))],
    ids=["compact", "x4", "x2", "x1"],
)
def test_tiles_join_to_the_whole(network: UpscalingNetwork) -> None:
    network.load_state_dict(loud(network))
    x = torch.rand(1, 3, 61, 93, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = network(x)
        joined = torch.full_like(whole, torch.nan)
        for top, left, part in in_tiles(network, x, 16, network.radius):
            joined[..., top : top + part.shape[-2], left : left + part.shape[-1]] = part
    assert (joined - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_radius_is_how_far_a_pixel_sees() -> None:
    """Where all gains are positive, a pixel's light reaches all that it can: no farther than `radius`."""
    for network in (SRVGGNetCompact(CompactConfig(2, 3, 2)), RRDBNet(RRDBConfig(2, 2, 1, 2, 1))):
        network.load_state_dict({name: each.abs() for name, each in loud(network).items()})
        network.double()
        size = 2 * network.radius + 9
        dark = torch.zeros(1, 3, 1, size, dtype=torch.float64).expand(1, 3, 3, size).clone()
        lit = dark.clone()
        lit[..., size // 2] = 1.0
        with torch.no_grad():
            seen = (network(lit) - network(dark)).abs().amax((0, 1, 2)).nonzero().flatten() // network.scale
        reach = max(size // 2 - int(seen.min()), int(seen.max()) - size // 2)
        assert network.radius - 3 <= reach <= network.radius


# Files that are something else


def refused(tensors: Tensors, tmp_path: Path) -> str:
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as caught:
        loaded(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.1.sub.0.RDB1.conv1x1.weight", "ESRGAN+"),
        ("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", "SwinIR"),
        ("layers.0.blocks.0.attn.attns.0.pos.pos1.0.weight", "DAT"),
        ("model.diffusion_model.input_blocks.0.0.weight", "diffusion model"),
        ("lora_unet_down_blocks_0.alpha", "LoRA"),
        ("block_1.c1_r.sk.weight", "SPAN"),
        ("something.else", "unknown network"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_other_networks_are_named(name: str, what: str, beside: bool, tmp_path: Path) -> None:
    tensors = loud(RRDBNet(TINY)) if beside else {}
    message = refused(tensors | {name: torch.ones(3)}, tmp_path)
    assert (what in message) or (beside and name in message)


def test_hostile_files_cost_one_line(tmp_path: Path) -> None:
    good, small = loud(RRDBNet(TINY)), loud(SRVGGNetCompact(CompactConfig(8, 3, 2)))
    old = old_names(good, 2, 2)

    def without(tensors: Tensors, name: str) -> Tensors:
        return {key: each for key, each in tensors.items() if key != name}

    first = "conv_first.weight"
    cases: list[tuple[Tensors, str]] = [
        (without(good, "body.1.rdb2.conv3.bias"), "missing"),
        (without(good, first), "lacks conv_first.weight"),
        (good | {"body.1000000.rdb1.conv1.weight": torch.ones(1)}, "unknown"),
        (good | {first: torch.ones(8, 5, 3, 3)}, "takes 5 channels"),
        (good | {first: torch.ones(8, 27, 3, 3)}, "takes 27 channels"),
        (good | {first: torch.ones(3)}, "where the weights of a 3x3 convolution"),
        (good | {first: torch.ones(0, 3, 3, 3)}, "where the weights of a 3x3 convolution"),
        (good | {first: torch.full((8, 3, 3, 3), math.nan)}, "NaN"),
        (good | {first: torch.ones(8, 3, 5, 5)}, "of another shape"),
        (good | {"conv_up3.weight": torch.ones(8, 8, 3, 3), "conv_up9.weight": torch.ones(1)}, "doubles"),
        (old | {"model.301.weight": torch.ones(1)}, "doubles a picture in no known way"),
        (
            {k: v for k, v in old.items() if not k.startswith("model.10.")},
            "doubles a picture in no known way",
        ),
        (small | {"body.999998.weight": torch.ones(12, 8, 3, 3)}, "names are missing"),
        (small | {"body.8.weight": torch.ones(13, 8, 3, 3)}, "gives 13"),
        (small | {"body.8.weight": torch.ones(3 * 81, 8, 3, 3)}, "is no compact network"),
        (small | {"body.1.weight": torch.ones(8, 8, 3, 3)}, "is no compact network"),
        (without(small, "body.4.weight"), "missing"),
        (small | {"tail.weight": torch.ones(1)}, "unknown in a compact network"),
    ]
    for tensors, words in cases:
        assert words in refused(tensors, tmp_path), words
    (tmp_path / "page.pth").write_text("<html>log in</html>")
    with pytest.raises(UserError, match="web page"):
        read_upscaler(tmp_path / "page.pth")
