"""Layers with packed weights compute what torch's do, and their plain weights are there for whoever asks."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import onednn, packed
from ldm.models.lora import LoRA
from ldm.models.packed import Conv2d, Linear

Layer = Conv2d | Linear
KINDS: dict[str, Callable[[], Layer]] = {
    "3x3": lambda: Conv2d(24, 40, 3, padding=1),
    "1x1": lambda: Conv2d(24, 40, 1, bias=False),
    "stride": lambda: Conv2d(24, 40, 3, stride=2),
    "groups": lambda: Conv2d(24, 40, 3, padding=1, groups=4),
    "few": lambda: Conv2d(4, 3, 3, padding=1),
    "one": lambda: Conv2d(24, 1, 3, padding=1),
    "linear": lambda: Linear(24, 40),
    "linear of one": lambda: Linear(24, 1),
}


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever processor this is, float32's linear layers are packed too."""
    if not onednn.multiplies(torch.float32):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(packed, "mkl_is_slow", lambda: True)


@pytest.fixture(params=KINDS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return KINDS[request.param]().requires_grad_(False).eval()


def given(layer: Layer, rows: int = 2) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(rows, 7, layer.in_features)
    return torch.randn(rows, layer.in_channels, 9, 10)


def plain(layer: Layer, x: Tensor) -> Tensor:
    """What torch's own layer gives; the weight is read."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    how = layer.stride, layer.padding, layer.dilation, layer.groups
    return F.conv2d(x, layer.weight, layer.bias, *how)


def is_packed(layer: Layer) -> bool:
    return packed._Held.of(layer._parameters["weight"]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_compute_what_torch_does_and_give_their_weights_back_to_the_bit(
    layer: Layer, dtype: torch.dtype
) -> None:
    if not onednn.multiplies(dtype):
        pytest.skip("this processor has no AVX512")
    layer.to(dtype)
    before, parameter = layer.weight.clone(), layer.weight
    # Sums of up to 216 products of numbers about 1 and 0.1 in another order; of bfloat16, 8 bits of what comes out.
    error = 1e-5 if dtype == torch.float32 else 2e-2
    for rows in (2, 1, 5, 2):  # whatever it was packed for
        x = given(layer, rows).to(dtype)
        found = layer(x)
        assert is_packed(layer) and found.dtype == dtype
        expected = F.linear(x, before, layer.bias) if isinstance(layer, nn.Linear) else None
        if expected is None:
            assert isinstance(layer, nn.Conv2d)
            how = layer.stride, layer.padding, layer.dilation, layer.groups
            expected = F.conv2d(x, before, layer.bias, *how)
        torch.testing.assert_close(found, expected, atol=error, rtol=error)
    assert parameter.untyped_storage().nbytes() < before.nbytes  # the plain ones are gone
    assert parameter.shape == before.shape and parameter.dtype == dtype
    assert layer.weight is parameter and torch.equal(parameter, before)
    assert layer.weight.stride() == before.stride() and not is_packed(layer)


def test_a_call_rounds_the_same_whenever_it_is_made(layer: Layer) -> None:
    x = given(layer)
    first = layer(x)
    layer(given(layer, 9))
    assert torch.equal(layer(x), first)
    layer.weight.sum()
    layer(given(layer, 4))
    assert torch.equal(layer(x), first)


READS: dict[str, Callable[[Layer], Tensor]] = {
    "weight": lambda layer: layer.weight,
    "state_dict": lambda layer: layer.state_dict()["weight"],
    "in a network": lambda layer: nn.Sequential(layer).state_dict()["0.weight"],
    "deepcopy": lambda layer: copy.deepcopy(layer).weight,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)).weight,
    "to": lambda layer: nn.Sequential(layer).to(torch.float64)[0].weight.float(),  # type: ignore[union-attr]
    "double": lambda layer: next(layer.double().parameters()).float(),
}


@pytest.mark.parametrize("read", READS)
def test_whoever_reads_gets_the_plain_weight(layer: Layer, read: str) -> None:
    before = layer.weight.clone()
    layer(given(layer))
    assert is_packed(layer)
    assert torch.equal(READS[read](layer), before)


def test_what_changes_the_weight_changes_what_comes_out(layer: Layer) -> None:
    x = given(layer)
    layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-5)
    layer(x)
    layer.weight.data = torch.zeros_like(layer.weight)
    torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-5)
    layer(x)
    layer.load_state_dict({name: torch.ones_like(each) for name, each in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-5)
    layer(x)
    layer.load_state_dict(
        {name: torch.randn_like(each) for name, each in layer.state_dict().items()}, assign=True
    )
    torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-5)
    layer(x)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-5)
    layer(x)
    parameter = next(layer.parameters())  # past `weight`, while it is packed
    assert is_packed(layer) and bool(parameter.isnan().all())
    parameter.data = torch.ones(parameter.shape)
    torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError):
        layer.weight = torch.ones(2)  # type: ignore[assignment]


def test_what_is_trained_traced_or_autocast_is_torch_s(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = given(layer)
    expected = plain(layer, x)
    layer(x)
    monkeypatch.setattr(type(layer), "pack", None)
    layer.requires_grad_(True)
    assert torch.equal(layer(x), expected) and not is_packed(layer)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.train()(x), expected)
    layer.eval()
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert "mkldnn" not in str(traced.inlined_graph)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    network = nn.Sequential(layer)
    if not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        lora = LoRA(network, ["0"], rank=2)
        monkeypatch.undo()
        monkeypatch.setattr(packed, "mkl_is_slow", lambda: True)
        network(x)
        assert is_packed(layer)  # a LoRA beside the layer doesn't read it
        lora.detach()
    handle = layer.register_forward_hook(lambda *_: None)
    layer(x + 1)
    layer.weight.sum()
    layer(x)
    assert not is_packed(layer)
    handle.remove()


def test_a_merged_adapter_draws_and_comes_out_without_a_trace() -> None:
    network = nn.Sequential(Linear(24, 24), Conv2d(3, 3, 1)).requires_grad_(False).eval()
    layer = network[0]
    assert isinstance(layer, Linear)
    x = torch.randn(2, 3, 24)
    first, before = layer(x), layer.weight.clone()
    layer(x)
    lora = LoRA(network, ["0"], rank=2)
    nn.init.normal_(lora.layers["0"].up.weight)  # type: ignore[union-attr, arg-type]
    beside = layer(x)
    assert not torch.allclose(beside, first, atol=1e-3)
    lora.merge()
    torch.testing.assert_close(layer(x), beside, atol=1e-4, rtol=1e-4)
    assert is_packed(layer)
    lora.detach()
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), first)


def test_modules_that_share_a_weight_share_what_it_has_while_packed(layer: Layer) -> None:
    """As those of a network and of the shell in which its average is drawn with."""
    other, x = copy.copy(layer), given(layer)
    first = layer(x)
    other._parameters = {**layer._parameters}
    for _ in range(2):
        assert torch.equal(other(x), first) and torch.equal(layer(x), first)
    before = other.weight.clone()
    other(x)
    assert torch.equal(layer.weight, before) and not bool(before.isnan().any())
    layer(x)
    instead = {name: torch.ones_like(each) for name, each in layer.state_dict().items()}
    torch.func.functional_call(layer, instead, (x,))
    assert torch.equal(layer(x), first)


def test_threads_that_begin_at_once_pack_one_weight(layer: Layer) -> None:
    x = given(layer)
    expected = layer(x)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            layer.weight.sum()
            found = list(pool.map(lambda _: layer(x), range(4)))
            assert all(torch.equal(each, expected) for each in found)
            weights = list(pool.map(lambda _: bool(layer.weight.isnan().any()), range(4)))
            assert not any(weights)


def test_odd_inputs_and_parametrized_layers_are_torch_s() -> None:
    conv = Conv2d(24, 40, 3, padding=1).requires_grad_(False).eval()
    x = torch.randn(24, 9, 10)  # without a batch
    torch.testing.assert_close(conv(x), conv(x[None])[0], atol=1e-5, rtol=1e-5)
    normed = nn.utils.parametrizations.weight_norm(Linear(24, 40).eval())
    assert normed(torch.randn(2, 24)).shape == (2, 40)


def test_one_row_rounds_as_it_does_after_many() -> None:
    one, other = Linear(320, 640).requires_grad_(False).eval(), Linear(320, 640).requires_grad_(False).eval()
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 320)
    other(torch.randn(64, 320))
    assert torch.equal(one(x), other(x))
