"""Reuse of features across steps: which parts are computed when, by whatever sampler, alone and among others."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_pipeline_folder
from torch import Tensor

from ldm.condition import Condition
from ldm.conditioning.control import Control
from ldm.conditioning.prompts.reading import read_prompt
from ldm.diffusion.plan import plan
from ldm.errors import UserError
from ldm.models import feature_reuse
from ldm.models.controlnet import ControlNet
from ldm.models.denoising import DenoisingNetwork
from ldm.models.feature_reuse import Features
from ldm.models.unet import UNet
from ldm.sampling import Guidance, Request, controlled, prepare, run, sample
from ldm.sampling.editing import Pictures, begin_from, first_step
from ldm.sampling.engine import Engine
from ldm.system import System
from pipelines import TextToImagePipeline
from pipelines.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("model"), "sd1")


@pytest.fixture(scope="module")
def system(folder: Path) -> System:
    return System.load(folder)


@pytest.fixture
def calls(system: System) -> Iterator[dict[str, list[int]]]:
    """The rows of every call of the finest level, "all", and of the levels below it, "deep"."""
    network, rows = system.network, dict[str, list[int]](all=[], deep=[])
    assert isinstance(network, UNet)

    def counts(name: str) -> Any:
        return lambda module, inputs, output: rows[name].append(len(inputs[0]))

    parts = {"all": network.up_blocks[-1], "deep": network.mid_block}
    handles = [part.register_forward_hook(counts(name)) for name, part in parts.items()]
    yield rows
    for handle in handles:
        handle.remove()


def request(system: System, every: int, seed: int = 0, steps: int = 6, **how: Any) -> Request:
    scale, sampler = how.pop("scale", 4.0), how.pop("sampler", None)
    made = prepare(
        system,
        plan(system.scheduler, steps, sampler=sampler),
        ["a cat"],
        [seed],
        guidance=Guidance(scale, **how),
    )
    return replace(made, feature_reuse=every)


@torch.no_grad()
def test_the_finest_level_on_the_held_features_is_the_published_formula(system: System) -> None:
    """Ma et al. 2024, eq. 9: what enters the last block of the way up is of another step, all else is of this one."""
    network = system.network
    assert isinstance(network, UNet)
    told, time = Condition(hidden=torch.randn(2, 77, 32)), torch.full((2,), 500.0)
    before, now = torch.randn(2, 2, 4, 16, 16)
    features = Features()
    assert torch.equal(network(before, time, told, None, features), network(before, time, told))
    assert features.deep is not None
    # On the features of its own step nothing is lost.
    assert torch.equal(network(before, time, told, None, features), network(before, time, told))
    found = network(now, time, told, None, features)

    replaced = network.up_blocks[-1].register_forward_pre_hook(
        lambda _, inputs: (features.deep, *inputs[1:])
    )  # all is computed, and the deep part is put aside
    torch.testing.assert_close(found, network(now, time, told))
    replaced.remove()
    assert not torch.allclose(found, network(now, time, told))


@pytest.mark.parametrize(("interval", "deep"), [(1, 6), (2, 3), (3, 2), (4, 2), (100, 1)])
@torch.no_grad()
def test_every_nth_step_computes_all(
    system: System, calls: dict[str, list[int]], interval: int, deep: int
) -> None:
    drawn = sample(system, request(system, interval))
    assert calls == {"all": [2] * 6, "deep": [2] * deep}
    exact = sample(system, replace(request(system, 1)))
    assert torch.equal(drawn, exact) == (interval == 1)
    assert F.mse_loss(drawn, exact) < exact.var()


@torch.no_grad()
def test_steps_are_counted_by_their_noise_level(system: System, calls: dict[str, list[int]]) -> None:
    sample(system, request(system, 2, steps=4, sampler="heun"))
    # Two asks a step, but for the last; that at a step's end is of the next one.
    assert len(calls["all"]) == 7 and len(calls["deep"]) == 1 + 2
    for rows in calls.values():
        rows.clear()
    whole = plan(system.scheduler, 8)
    part = whole.part(first_step(whole, 0.6))  # 4 steps, from number 4 on
    made = prepare(system, part, ["a hat"], [7], guidance=Guidance(1.0), size=(32, 32))
    sample(system, replace(begin_from(system, made, Pictures(torch.rand(1, 3, 32, 32))), feature_reuse=3))
    assert calls == {"all": [1] * 4, "deep": [1] * 2}


@torch.no_grad()
def test_guidance_that_begins_on_the_way_computes_all(system: System, calls: dict[str, list[int]]) -> None:
    levels = plan(system.scheduler, 6).sigmas
    sample(system, request(system, 4, interval=(levels[4] * 0.99, levels[1] * 0.99)))
    # Guided at steps 2 to 4: with twice the rows of step 0, what it holds does not suffice.
    assert calls == {"all": [1, 1, 2, 2, 2, 1], "deep": [1, 2, 2]}


def controls(system: System) -> tuple[ControlNet, Tensor]:
    assert isinstance(system.network, UNet)
    torch.manual_seed(1)
    network = ControlNet.from_unet(system.network, conditioning_embedding_out_channels=(8, 16))
    for each in network.parameters():
        torch.nn.init.normal_(each, std=0.05) if each.ndim > 1 else None
    return network.eval(), torch.rand(1, 3, 32, 32)


@torch.no_grad()
def test_unlike_requests_are_drawn_together_as_alone(system: System, calls: dict[str, list[int]]) -> None:
    network, picture = controls(system)
    changing = read_prompt("a [cat:dog:0.5]", "a1111", steps=6)
    changed = prepare(system, plan(system.scheduler, 6), [changing], [9], guidance=Guidance(4.0))

    def made() -> list[Request]:
        return [
            request(system, 1, 1),
            request(system, 2, 2),
            request(system, 2, 3, steps=5, sampler="euler"),
            request(system, 3, 4, scale=1.0),
            controlled(system, request(system, 2, 5), [Control(network, picture, 0.8, end=0.6)]),
            replace(changed, feature_reuse=2, noise=request(system, 2, 9).noise),
            replace(request(system, 2, 6), token_merging=0.5),
        ]

    alone = [sample(system, each) for each in made()]
    by_themselves = len(calls["all"])
    calls["all"].clear()
    engine = Engine(system, rows=64)
    tickets = [engine.add(run(system, each)) for each in made()]
    list(engine.run())
    assert len(calls["all"]) < by_themselves / 2
    for ticket, expected in zip(tickets, alone, strict=True):
        assert ticket.error is None
        torch.testing.assert_close(ticket.latents, expected, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_where_memory_is_short_features_are_kept_row_by_row(system: System) -> None:
    expected = sample(system, request(system, 2))
    engine = Engine(system, rows=1)
    ticket = engine.add(run(system, request(system, 2)))
    list(engine.run())
    torch.testing.assert_close(ticket.latents, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu")
    for interval in (0, -1):
        with pytest.raises(UserError, match=f"feature_reuse is {interval}"):
            pipe("a cat", feature_reuse=interval)
    with pytest.raises(UserError, match="feature_reuse is for U-Nets"):
        feature_reuse.check(DenoisingNetwork())
    (tmp_path / "rows.csv").write_text("prompt,feature_reuse\na cat,0\n")
    for words in (["a cat", "--feature-reuse", "0"], ["--file", str(tmp_path / "rows.csv")]):
        assert main([*words, "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip()
        assert "feature_reuse is 0" in said and "\n" not in said
