"""Linear layers give torch's own products, whichever library multiplies."""

import pytest
import torch
import torch.nn.functional as F

from ldm.models import onednn as module
from ldm.models.lora import LoRA, select
from ldm.models.onednn import linear, mkl_is_slow
from ldm.models.packed import Linear
from ldm.processor import vendor


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whichever processor this is, both ways are tried."""
    monkeypatch.setattr(module, "mkl_is_slow", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(2, 24, 48), (64, 48), (1, 48), (3, 1, 48), (2, 4, 16, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_torch_s(onednn: bool, shape: tuple[int, ...], bias: bool) -> None:
    layer, x = Linear(48, 40, bias=bias), torch.randn(shape)
    with torch.no_grad():
        # Sums of 48 products of numbers about 1 and 0.1, in another order: some 1e-6.
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
        strided = x.transpose(0, -2).contiguous().transpose(0, -2)
        torch.testing.assert_close(layer(strided), layer(x), atol=1e-5, rtol=1e-5)


def test_what_onednn_can_not_take_is_torch_s(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(48, 40), torch.randn(64, 48)
    monkeypatch.setattr(module, "product", None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
        linear(x[:4], torch.randn(40, 48), None)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("x",), ("weight", "x")], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_torch_s(onednn: bool, bias: bool, frozen: tuple[str, ...]) -> None:
    layer, x = Linear(48, 40, bias=bias), torch.randn(2, 40, 48)
    given = {"x": x, "weight": layer.weight, **({"bias": layer.bias} if bias else {})}
    for name, each in given.items():
        each.requires_grad_(name not in frozen)
    wanted = [each for name, each in given.items() if name not in frozen]
    away = torch.randn(2, 40, 40)
    found = torch.autograd.grad(layer(x), wanted, away) if wanted else ()
    expected = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), wanted, away) if wanted else ()
    for one, other in zip(found, expected, strict=True):  # sums of up to 80 products of numbers about 1
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_transforms_of_functions_work(onednn: bool) -> None:
    layer, x = Linear(48, 40), torch.randn(64, 48)
    _, along = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(along, F.linear(x, layer.weight), atol=1e-4, rtol=1e-4)
    assert torch.func.vmap(layer)(x.expand(3, -1, -1)).shape == (3, 64, 40)
    _, pull = torch.func.vjp(layer, x)
    torch.testing.assert_close(pull(along)[0], along @ layer.weight, atol=1e-3, rtol=1e-3)


def test_what_is_trained_beside_frozen_layers_gets_its_gradient(onednn: bool) -> None:
    layer = Linear(48, 40).requires_grad_(False)
    x = torch.randn(64, 48, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0], layer.weight.sum(0), atol=1e-5)


def test_adapters_know_them() -> None:
    network = torch.nn.Sequential(Linear(8, 8), torch.nn.Linear(8, 8))
    assert list(select(network, "all-linear")) == ["0", "1"]
    LoRA(network, "all-linear")


def test_the_rule_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, slow in (("AuthenticAMD", True), ("HygonGenuine", True), ("GenuineIntel", False), ("", False)):
        mkl_is_slow.cache_clear()
        monkeypatch.setattr(module, "vendor", lambda name=name: name)
        monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
        assert mkl_is_slow() is (slow and torch.backends.mkl.is_available())
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    mkl_is_slow.cache_clear()
    assert not mkl_is_slow()
    mkl_is_slow.cache_clear()
    assert isinstance(vendor(), str)
