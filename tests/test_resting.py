"""Weights that rest elsewhere or in fewer bits: layers compute with what they should, and get their own back."""

import pytest
import torch
from tiny import tiny_unet
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models import packed
from ldm.models.compiled import compile_blocks
from ldm.models.lora import LoRA
from ldm.models.packed import Conv2d, Linear
from ldm.models.resting import Resting, computed_in, rest_in
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig


def network() -> UNet:
    theirs = tiny_unet("sd1")
    ours = UNet(UNetConfig.from_diffusers(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval().requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Condition]:
    width = network().config.cross_attention_dim
    return (
        torch.randn(2, 4, 8, 8, dtype=dtype),
        torch.tensor([10.0, 600.0]),
        Condition(hidden=torch.randn(2, 5, width, dtype=dtype)),
    )


def test_weights_that_rest_are_there_while_their_layer_works() -> None:
    unet, given = network(), inputs()
    expected = unet(*given)
    own = {name: each.data_ptr() for name, each in unet.state_dict().items()}
    seen = list[torch.dtype]()
    resting = Resting(unet, dtype=torch.float64)
    unet.conv_in.register_forward_pre_hook(lambda layer, _: seen.append(next(layer.parameters()).dtype))
    wide = unet(given[0].double(), given[1], Condition(hidden=given[2].text.double()))
    assert wide.dtype == torch.float64 and seen == [torch.float64]
    torch.testing.assert_close(wide.float(), expected, atol=1e-4, rtol=1e-4)
    # What failed gets its own back as well.
    with pytest.raises(RuntimeError):
        unet(given[0][:, :2].double(), given[1], Condition(hidden=given[2].text.double()))
    assert {name: each.data_ptr() for name, each in unet.state_dict().items()} == own
    resting.remove()
    torch.testing.assert_close(unet(*given), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_in_fewer_bits_are_the_rounded_ones(storage: torch.dtype) -> None:
    unet, other, given = network(), network(), inputs()
    before = sum(each.numel() * each.element_size() for each in unet.parameters())
    rest_in(unet, storage)
    after = sum(each.numel() * each.element_size() for each in unet.parameters())
    assert after < (0.6 if storage == torch.bfloat16 else 0.4) * before and unet.dtype == torch.float32
    for layer in other.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.data = layer.weight.data.to(storage).float()
    torch.testing.assert_close(unet(*given), other(*given), atol=1e-4, rtol=1e-4)
    assert all(
        layer.weight.dtype == storage for layer in unet.modules() if isinstance(layer, Conv2d | Linear)
    )
    with pytest.raises(ValueError, match="no layer"):
        rest_in(nn.GroupNorm(1, 4), storage)


def test_compiled_blocks_compute_the_same_under_their_own_names() -> None:
    unet, given = network(), inputs()
    expected, names = unet(*given), list(unet.state_dict())
    assert compile_blocks(unet, backend="eager", fullgraph=True) > 10
    torch.testing.assert_close(unet(*given), expected, atol=1e-4, rtol=1e-4)
    assert list(unet.state_dict()) == names
    assert not any(
        packed._Held.of(each._parameters["weight"]) is not None
        for block in unet.down_blocks
        for each in block.resnets[0].modules()
        if isinstance(each, Conv2d)
    )


def test_adapters_that_come_after_compiling_are_not_passed_over() -> None:
    unet, given = network(), inputs()
    compile_blocks(unet, backend="eager")
    expected = unet(*given)
    lora = LoRA(unet, "attention", rank=2)
    for layer in lora.layers.values():
        nn.init.normal_(layer.up.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.allclose(unet(*given), expected, atol=1e-2)
    lora.detach()
    torch.testing.assert_close(unet(*given), expected, atol=1e-4, rtol=1e-4)


def test_a_network_without_biases_and_norms_has_a_precision() -> None:
    assert computed_in(nn.Linear(2, 2, bias=False).bfloat16()) == torch.bfloat16
