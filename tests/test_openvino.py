"""OpenVINO in torch's place: the same outputs for any shapes, whatever is loaded, changed or saved meanwhile."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controls import control_picture, saved_controlnet
from ip_adapters import saved_adapter
from random_lora import trained
from tiny import tiny_pipeline_folder
from torch import Tensor

from ldm import processor
from ldm.backends import graphs
from ldm.backends import openvino as backend
from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models.lora import LoRA
from ldm.system import System
from pipelines import TextToImagePipeline
from pipelines.cli import main

pytest.importorskip("openvino")
if processor.vendor() and not processor.has("avx512f"):
    pytest.skip("OpenVINO is for processors with AVX512", allow_module_level=True)

CLOSE = 1e-5  # relative, in float32: a few hundred roundings of 6e-8 in sums of other orders
DRAW: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
SAME = 1e-3  # of pixels in [0, 1]: three steps' roundings, a tenth of what 8 bits show


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    made: dict[str, Path] = {}

    def build(family: Any) -> Path:
        if family not in made:
            made[family] = tiny_pipeline_folder(tmp_path_factory.mktemp(family), family)
        return made[family]

    return build


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_CACHE", str(shared_cache))
    return shared_cache / "openvino"


def told(system: System, rows: int, height: int, width: int, length: int) -> tuple[Tensor, Tensor, Condition]:
    """Random inputs of a system's network."""
    wants, dtype = system.wants, system.network.dtype
    parts = {
        "hidden": torch.randn(rows, length, wants["hidden"]),
        "pooled": torch.randn(rows, wants.get("pooled", 1)),
        "time_ids": torch.randint(0, 64, (rows, wants.get("time_ids", 1))).float(),
        "channels": torch.randn(rows, wants.get("channels", 1), height, width),
    }
    condition = Condition.of({name: part for name, part in parts.items() if name in wants})
    sample = torch.randn(rows, 4, height, width).to(dtype)
    return sample, torch.linspace(999, 1, rows), condition.to(dtype=dtype)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with every graph that is converted."""
    found: list[Any] = []
    plain = graphs._converted

    def counted(*arguments: Any) -> Any:
        found.append(arguments[3])
        return plain(*arguments)

    monkeypatch.setattr(graphs, "_converted", counted)
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_a_network_of_any_shapes(folder: Callable[[Any], Path], family: str, conversions: list[Any]) -> None:
    system = System.load(folder(family))
    shapes = [(2, 16, 16, 77), (1, 12, 20, 77), (5, 8, 8, 154), (3, 13, 9, 7)]
    inputs = [told(system, *shape) for shape in shapes]
    expected = [system.network(*each) for each in inputs]
    computed = backend.use(system)
    for given, output in zip(inputs, expected, strict=True):
        assert apart(system.network(*given), output) < CLOSE
    assert len(conversions) == 1 and computed.notes() == []
    computed.remove()
    assert torch.equal(system.network(*inputs[0]), expected[0])


@torch.no_grad()
def test_bfloat16_is_as_near_as_torch_is(folder: Callable[[Any], Path]) -> None:
    exact, system = System.load(folder("sd1")), System.load(folder("sd1"), torch_dtype=torch.bfloat16)
    given = told(system, 4, 16, 16, 77)
    expected = exact.network(given[0].float(), given[1], given[2].to(dtype=torch.float32))
    by_torch = apart(system.network(*given), expected)
    backend.use(system)
    output = system.network(*given)
    assert output.dtype is torch.bfloat16 and apart(output, expected) < 2 * by_torch


def test_pictures_of_a_pipeline(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    plain = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), backend="openvino")
    ours, theirs = pipe("a cat", **DRAW), plain("a cat", **DRAW)
    assert np.abs(ours.images[0] - theirs.images[0]).max() < SAME
    assert ours.recipes == theirs.recipes and ours.notes == theirs.notes
    pipe.save_pretrained(tmp_path / "saved")
    again = TextToImagePipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert np.array_equal(again("a cat", **DRAW).images[0], theirs.images[0])
    first, second = (
        [
            each.image
            for each in sorted(p.draw_each(theirs.recipes * 3, together=2), key=lambda each: each.place)
        ]
        for p in (pipe, plain)
    )
    for one, other in zip(first, second, strict=True):
        assert one is not None and np.abs(np.int16(one) - np.int16(other)).max() <= 1
    pipe.to(torch.bfloat16)
    near = pipe("a cat", **DRAW).images[0]
    assert np.abs(near - plain.to(torch.bfloat16)("a cat", **DRAW).images[0]).mean() < 0.02


@torch.no_grad()
def test_loras_beside_the_weights_and_in_them(folder: Callable[[Any], Path], conversions: list[Any]) -> None:
    system = System.load(folder("sd1"))
    network, given = system.network, told(system, 2, 16, 16, 77)

    def by_torch() -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return type(network).forward(network, *given)

    bare = by_torch()
    computed = backend.use(system)
    lora = trained(network, "attention+conv").requires_grad_(False)
    assert apart(by_torch(), bare) > 0.01
    for weight in (1.0, 0.3, -2.0, 0.0):
        lora.weight = weight
        assert apart(network(*given), by_torch()) < CLOSE
    assert len(conversions) <= 2  # with a LoRA of any weight, and without
    lora.weight = 0.5
    lora.merge()
    merged = by_torch()
    assert apart(network(*given), merged) < CLOSE
    lora.unmerge()
    assert apart(network(*given), by_torch()) < CLOSE and computed.notes() == []
    lora.detach()
    assert apart(network(*given), bare) < CLOSE

    path = next(path for path, each in network.named_modules() if path.endswith("to_q"))
    other = LoRA.from_weights(
        network, {path: {"diff": torch.randn(network.get_submodule(path).weight.shape)}}
    )
    assert torch.equal(network(*given), by_torch())
    assert "no plain LoRA" in computed.notes()[0] and computed.notes() == []
    other.merge()
    assert apart(network(*given), by_torch()) < CLOSE and computed.notes() == []


@torch.no_grad()
def test_weights_that_change_and_gradients(folder: Callable[[Any], Path]) -> None:
    system = System.load(folder("sd1"))
    network, given = system.network, told(system, 2, 16, 16, 77)
    backend.use(system)
    before = network(*given)
    network.conv_out.weight.mul_(1.5)  # in place
    assert apart(network(*given), type(network).forward(network, *given)) < CLOSE
    assert apart(network(*given), before) > 0.1
    with torch.enable_grad():
        sample = given[0].requires_grad_()
        network(sample, *given[1:]).sum().backward()
    assert sample.grad is not None and sample.grad.abs().sum() > 0


def test_a_controlnet_and_an_image_prompt(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    control, shown = saved_controlnet(tmp_path / "control", "sd1"), saved_adapter(tmp_path / "ip", "base")
    images = list[np.ndarray]()
    for how in ("torch", "openvino"):
        pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu", backend=how)
        pipe.load_controlnet(control)
        pipe.load_ip_adapter(shown)
        found = pipe(
            ["a cat", "a dog"],
            control_image=control_picture(),
            control_guidance_end=0.5,
            ip_adapter_image=control_picture(1),
            ip_adapter_scale=0.7,
            **DRAW,
        )
        assert found.notes == []
        images.append(np.stack(found.images))
    assert np.abs(images[0] - images[1]).max() < SAME


@torch.no_grad()
def test_the_cache(
    folder: Callable[[Any], Path], tmp_path: Path, conversions: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_call() -> Tensor:
        system = System.load(folder("sd2"))
        backend.use(system)
        return system.network(*given)

    given = told(System.load(folder("sd2")), 2, 16, 16, 77)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    expected = first_call()
    assert len(conversions) == 1
    assert torch.equal(first_call(), expected) and len(conversions) == 1
    (kept,) = (tmp_path / "cache" / "openvino").iterdir()
    weights = sum(each.stat().st_size for each in folder("sd2").rglob("*.safetensors"))
    whole = kept.read_bytes()
    assert len(whole) < weights
    for damaged in (whole[:-100], b"", whole[:200] + b"\0" + whole[201:]):
        kept.write_bytes(damaged)
        assert graphs._read(kept) is None
    assert torch.equal(first_call(), expected) and len(conversions) == 2
    assert graphs._read(kept) is not None
    (tmp_path / "file").touch()
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file"))  # where no folder can be
    assert torch.equal(first_call(), expected) and len(conversions) == 3


@torch.no_grad()
def test_what_cannot_be_converted_is_torchs(
    folder: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such operator\nand a long trace")

    system = System.load(folder("sd1"))
    given = told(system, 2, 16, 16, 77)
    expected = system.network(*given)
    computed = backend.use(system)
    monkeypatch.setattr(backend, "graph", broken)
    assert torch.equal(system.network(*given), expected) and torch.equal(system.network(*given), expected)
    assert computed.notes() == [
        "drawn by torch, not by OpenVINO: it can't convert the UNet (no such operator)"
    ]


def test_what_it_is_not_for(
    folder: Callable[[Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = TextToImagePipeline.from_pretrained
    with pytest.raises(UserError, match="unknown, did you mean openvino"):
        load(folder("sd1"), backend="openvno")  # pyright: ignore
    with pytest.raises(UserError, match="float32 or bfloat16, not in float16"):
        load(folder("sd1"), backend="openvino", torch_dtype=torch.float16)
    with pytest.raises(UserError, match="computes on the CPU"):
        backend.check(torch.device("cuda"), torch.float32)
    pipe = load(folder("sd1"), backend="openvino")
    with pytest.raises(UserError, match="not in float16"):
        pipe.to(torch.float16)
    assert pipe.dtype is torch.float32
    options = [
        "a cat",
        "--model",
        str(folder("sd1")),
        "--backend",
        "openvino",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert main([*options, "--dtype", "float16"]) == 2
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert main(options) == 2
    lines = [each for each in capsys.readouterr().err.splitlines() if each.startswith(("error", "Trace"))]
    assert len(lines) == 2 and "pip install 'ldm-text-to-image[openvino]'" in lines[1]


def test_a_batch_records_it(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    from pipelines.batch.setup import Setup

    (tmp_path / "rows.txt").write_text("a cat\n")
    setup = Setup(
        tmp_path / "rows.txt", tmp_path / "out", model=str(folder("sd1")), device="cpu", backend="openvino"
    )
    asked = setup.asked(setup.load(), None)
    assert asked["backend"] == "openvino" and asked["openvino"].startswith("20")
