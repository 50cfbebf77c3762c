"""The autoencoder in strips gives what it gives at once, up to rounding, in less memory; when it does so by itself."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomize
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm import sampling
from ldm.errors import UserError
from ldm.models import large, tiling
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.tiling import decode_in_strips, encode_in_strips


def config(*widths: int, **more: object) -> AutoencoderConfig:
    n = len(widths)
    return AutoencoderConfig(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        norm_num_groups=4,
        **more,  # pyright: ignore[reportArgumentType]
    )


CONFIGS = {
    "like SD": config(8, 16, 16),
    "narrower within": config(16, 8, 24, layers_per_block=1, latent_channels=6),
    "no attention, no 1x1": config(
        8, 8, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False
    ),
    "one level": config(8),
    "labels": config(8, 16, num_class_embeds=3),
}


def autoencoder(name: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    torch.manual_seed(0)
    found = AutoencoderKL(CONFIGS[name])
    randomize(found)
    return found.to(dtype).requires_grad_(False)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_strips_are_the_whole_in_float64(name: str) -> None:
    """Sizes are odd, and a picture has two to six strips of each map: what is missed at one border shows as 1e-2."""
    model = autoencoder(name, torch.float64)
    labels = torch.tensor([2, 0]) if model.config.num_class_embeds else None
    f, c = model.config.factor, model.config.latent_channels
    latent = torch.randn(2, c, 29, 13, dtype=torch.float64)
    picture = torch.rand(2, 3, 29 * f, 13 * f, dtype=torch.float64) * 2 - 1
    decoded, posterior = model.decode(latent, labels), model.encode(picture, labels)
    for tile in (4, 32):
        assert apart(decode_in_strips(model, latent, tile, labels), decoded) < 1e-12
        found = encode_in_strips(model, picture, tile, labels)
        assert apart(found.mean, posterior.mean) < 1e-12
        assert apart(found.logvar, posterior.logvar) < 1e-12


@pytest.mark.parametrize(("dtype", "margin"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_in_their_own_precision_they_differ_by_its_rounding(dtype: torch.dtype, margin: float) -> None:
    """Some 20 layers of rounding of 2**-24 and 2**-9, with sums in another order."""
    model = autoencoder("like SD", dtype)
    latent = torch.randn(1, 4, 20, 20).to(dtype)
    found = decode_in_strips(model, latent, 8)
    assert found.dtype == dtype and apart(found, model.decode(latent)) < margin


def test_a_map_whose_mean_is_far_from_zero_is_normalised_exactly() -> None:
    """One sum of squares less one squared mean would lose all digits here."""
    model = autoencoder("one level")
    with torch.no_grad():
        model.decoder.conv_in.bias.add_(1000.0)
    latent = torch.randn(1, 4, 40, 24)
    exact = autoencoder("one level", torch.float64)
    exact.load_state_dict({name: each.double() for name, each in model.state_dict().items()})
    truth = exact.decode(latent.double())
    assert apart(decode_in_strips(model, latent, 4), truth) < 2 * apart(model.decode(latent), truth) + 1e-6


class Largest(TorchFunctionMode):
    """Notes the largest map that layers compute, all of 16 channels here; pictures and latents have others."""

    numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.ndim == 4 and found.shape[1] == 16:
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize("encodes", [False, True])
def test_one_map_is_stored_and_layers_see_strips(encodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoencoderKL(config(16, 16, layers_per_block=1, mid_block_add_attention=False))
    alive, most = 0, 0
    kept = tiling._kept

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def noted(strip: Tensor) -> Tensor:
        nonlocal alive, most
        found = kept(strip)
        assert found.untyped_storage().nbytes() == found.nbytes  # no view, which would keep more alive
        alive += found.numel()
        most = max(most, alive)
        weakref.finalize(found, gone, found.numel())
        return found

    monkeypatch.setattr(tiling, "_kept", noted)
    with Largest() as largest:
        if encodes:
            encode_in_strips(model, torch.rand(1, 3, 256, 128), 32)
        else:
            decode_in_strips(model, torch.randn(1, 4, 128, 64), 32)
    a_map, a_row = 256 * 128 * 16, 128 * 16
    assert alive == 0
    # Strips have 8 rows here: one is new, and one waits for a halo.
    assert a_map <= most <= a_map + 2 * 8 * a_row
    # Two rows more on each side of a block, as much as that again for those that are made of two (25 and one of zeros).
    assert largest.numbers <= 27 * a_row
    with Largest() as largest:
        model.decode(torch.randn(1, 4, 128, 64))
    assert largest.numbers == a_map


# Which way is taken


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The free memory, in place of this machine's."""
    free = [0.0]
    monkeypatch.setattr(large, "free_memory", lambda device: free[0])
    return free


def test_what_fits_is_computed_at_once_and_else_one_by_one_or_in_strips(
    little: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = autoencoder("like SD")
    latents, pictures = torch.randn(3, 4, 10, 7), torch.rand(3, 3, 40, 28)
    whole = sampling.to_unit_range(model.decode(model.unscale(latents)))
    means = model.scale(model.encode(pictures * 2 - 1).mean)
    one = max(large.decoding_memory(model.config, 1120, 4), large.encoding_memory(model.config, 1120, 4))
    batches: list[int] = []
    strips: list[int] = []
    inside, apart_from = large.decode_in_strips, model.decoder.forward

    def counted(z: Tensor, label: Tensor | None = None) -> Tensor:
        batches.append(len(z))
        return apart_from(z, label)

    def cut(model: AutoencoderKL, latent: Tensor, tile: int) -> Tensor:
        strips.append(tile)
        return inside(model, latent, tile)

    monkeypatch.setattr(model.decoder, "forward", counted)
    monkeypatch.setattr(large, "decode_in_strips", cut)
    for little[0], expected in ((3 * one, ([3], [])), (one, ([1] * 3, [])), (0, ([], [large.TILE] * 3))):
        batches.clear(), strips.clear()
        found = sampling.decode(model, latents)
        assert (batches, strips) == expected
        assert torch.equal(found, whole) if little[0] == 3 * one else apart(found, whole) < 1e-5
        assert apart(sampling.encode(model, pictures), means) < 1e-5
    for tile, expected in ((0, ([3], [])), (96, ([], [96] * 3))):
        batches.clear(), strips.clear()
        sampling.decode(model, latents, tile)
        assert (batches, strips) == expected


def test_a_gradient_is_never_lost_by_itself(little: list[float]) -> None:
    model = autoencoder("like SD")
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    sampling.decode(model, latents).sum().backward()
    assert latents.grad is not None and float(latents.grad.abs().max()) > 0
    with torch.no_grad():
        assert not sampling.decode(model, latents).requires_grad


def test_encoding_samples_the_posterior_by_the_noise_that_is_given() -> None:
    model = autoencoder("like SD", torch.bfloat16)
    pictures, noise = torch.rand(2, 3, 24, 16), torch.randn(2, 4, 6, 4)
    posterior = model.encode((pictures * 2 - 1).bfloat16())
    std = (0.5 * posterior.logvar.float()).exp()
    found = sampling.encode(model, pictures, noise)
    assert found.dtype == torch.float32
    assert torch.allclose(found, (posterior.mean.float() + std * noise) * 0.18215)
    for tile in (None, 64):
        assert sampling.encode(model, pictures, tile=tile).shape == (2, 4, 6, 4)


def test_tiles_and_sizes_that_cannot_be() -> None:
    model = autoencoder("like SD")
    for tile in (-1, 1, 63):
        with pytest.raises(UserError, match=f"tile is {tile}"):
            sampling.decode(model, torch.zeros(1, 4, 4, 4), tile)
    with pytest.raises(UserError, match="multiples of 4"):
        sampling.encode(model, torch.zeros(1, 3, 10, 8))
    with pytest.raises(UserError, match="multiples of 4"):
        sampling.encode(model, torch.zeros(0, 3, 8, 8))


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert large._allowed(tmp_path) is None
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("9000\n")
    (old / "memory.usage_in_bytes").write_text("5000\n")
    (old / "memory.stat").write_text("cache 7\ninactive_file 1\ntotal_inactive_file 300\n")
    assert large._allowed(tmp_path) == 4300
    for name, text in (("max", "max"), ("current", "100"), ("stat", "anon 5\ninactive_file 20")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert large._allowed(tmp_path) == 4300
    (tmp_path / "memory.max").write_text("1000\n")
    assert large._allowed(tmp_path) == 920
    (tmp_path / "memory.current").write_text("5000\n")
    assert large._allowed(tmp_path) == 0
    free = large.free_memory(torch.device("cpu"))
    assert free is not None and free > 2**20 and large.free_memory(torch.device("meta")) is None
