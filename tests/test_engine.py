"""The engine: unlike requests in shared calls of one network, each as it is alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline_folder
from torch import Tensor

from ldm.conditioning.control import Control
from ldm.conditioning.prompts.reading import read_prompt
from ldm.diffusion.driver import Step
from ldm.diffusion.plan import plan
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from ldm.sampling import Guidance, Request, controlled, decode, prepare, run, sample
from ldm.sampling.editing import Pictures, begin_from, first_step
from ldm.sampling.engine import Engine
from ldm.system import System


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return System.load(tiny_pipeline_folder(tmp_path_factory.mktemp("model"), "sd1"))


@pytest.fixture
def calls(system: System, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every call of the network."""
    rows: list[int] = []
    forward = system.network.forward

    def counted(x: Tensor, *more: Any) -> Tensor:
        rows.append(len(x))
        return forward(x, *more)

    monkeypatch.setattr(system.network, "forward", counted)
    return rows


def plain(
    system: System, seed: int, steps: int = 4, sampler: str | None = None, scale: float = 4.0
) -> Request:
    how = plan(system.scheduler, steps, sampler=sampler)
    return prepare(system, how, [f"a cat {seed}"], [seed], guidance=Guidance(scale))


def unlike(system: System) -> list[Request]:
    """Requests of every sampler; others that start on the way, are masked, steered, change, are long, are two."""
    made = [plain(system, k, 3 + k % 4, name, (1.0, 4.0, 7.5)[k % 3]) for k, name in enumerate(SAMPLERS)]
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    for sampler, hidden in (("euler_ancestral", None), ("dpmpp_2m", mask)):
        whole = plan(system.scheduler, 6, sampler=sampler)
        how = whole.part(first_step(whole, 0.5))
        request = prepare(system, how, ["a hat"], [7], guidance=Guidance(3.0), size=(32, 32))
        made.append(begin_from(system, request, Pictures(picture, mask=hidden)))
    how = plan(system.scheduler, 5)
    assert isinstance(system.network, UNet)
    torch.manual_seed(1)
    controlnet = ControlNet.from_unet(system.network, conditioning_embedding_out_channels=(8, 16))
    for each in controlnet.parameters():
        torch.nn.init.normal_(each, std=0.05) if each.ndim > 1 else None
    control = Control(controlnet.eval(), picture, scale=0.8, end=0.7)
    made.append(controlled(system, plain(system, 8, 5), [control]))
    changing = read_prompt("a [cat:dog:0.5]", "a1111", steps=5)
    made.append(prepare(system, how, [changing], [9], guidance=Guidance(4.0)))
    made.append(prepare(system, how, ["a cat " * 60], [10], guidance=Guidance(4.0)))
    scales = Guidance(torch.tensor([1.0, 6.0]), 0.5, (0.2, 5.0))
    made.append(prepare(system, how, ["a cat", "a dog"], [11, 12], guidance=scales))
    return made


@torch.no_grad()
def test_unlike_requests_are_drawn_together_as_alone(system: System, calls: list[int]) -> None:
    alone = [sample(system, each) for each in unlike(system)]
    by_themselves = len(calls)
    calls.clear()
    engine = Engine(system, rows=64)
    tickets = [engine.add(run(system, each)) for each in unlike(system)]
    assert len(engine) == len(tickets)
    done = list(engine.run())
    assert set(done) == set(tickets) and len(engine) == 0
    assert len(calls) < by_themselves / 4 and max(calls) > 16
    for ticket, expected in zip(tickets, alone, strict=True):
        assert ticket.error is None and ticket.latents is not None
        pixels, others = (decode(system.autoencoder, each) for each in (ticket.latents, expected))
        assert (pixels - others).abs().max() < 1 / 255


@torch.no_grad()
def test_requests_come_and_go_between_ticks(system: System, calls: list[int]) -> None:
    alone = {seed: sample(system, plain(system, seed)) for seed in range(4)}
    engine = Engine(system)
    first = engine.add(run(system, plain(system, 0, steps=4)))
    assert engine.tick() == [] and engine.tick() == []
    calls.clear()
    late = [engine.add(run(system, plain(system, seed))) for seed in (1, 2, 3)]
    engine.tick()
    assert calls == [8]  # four guided pictures, two steps apart
    late[1].cancel()
    assert late[1].done and late[1].cancelled
    assert set(engine.run()) == {first, *late}
    assert calls == [8, 6, 4, 4]
    for ticket, seed in ((first, 0), (late[0], 1), (late[2], 3)):
        torch.testing.assert_close(ticket.latents, alone[seed], atol=1e-4, rtol=1e-4)
    assert late[1].latents is None and late[1].error is None


def test_one_that_fails_ends_alone_and_a_callback_stops_its_own(system: System) -> None:
    def fails(step: Step) -> bool:
        raise UserError("no more")

    engine, seen = Engine(system), list[int]()
    bad = engine.add(run(system, plain(system, 1), fails))
    short = engine.add(run(system, plain(system, 2), lambda step: step.index < 1))
    good = engine.add(run(system, plain(system, 3), lambda step: seen.append(step.index)))
    assert len(list(engine.run())) == 3
    assert isinstance(bad.error, UserError) and bad.latents is None
    assert short.latents is not None and good.latents is not None and seen == [0, 1, 2, 3]


def test_none_waits_longer_than_a_round(system: System, calls: list[int]) -> None:
    """Two rows a call: pictures of many steps, and one that shares no call with them, take turns."""
    engine, asked = Engine(system, rows=2), dict[int, list[int]]()
    tick = 0

    def note(which: int) -> Any:
        return lambda step: asked.setdefault(which, []).append(tick)

    for which, steps in enumerate((12, 3, 12, 3)):
        engine.add(run(system, plain(system, which, steps), note(which)))
    whole = plan(system.scheduler, 6)
    long = prepare(system, whole, ["a cat " * 60], [4], guidance=Guidance(4.0))
    engine.add(run(system, long, note(4)))
    while len(engine):
        engine.tick()
        tick += 1
    assert {which: len(ticks) for which, ticks in asked.items()} == {0: 12, 1: 3, 2: 12, 3: 3, 4: 6}
    assert set(calls) == {2}
    for ticks in asked.values():
        assert all(after - before <= 5 for before, after in pairwise(ticks))


@torch.no_grad()
def test_calls_are_halved_where_memory_does_not_suffice(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = sample(
        system, prepare(system, plan(system.scheduler, 3), ["a"] * 5, range(5), guidance=Guidance(4))
    )
    forward, rows = system.network.forward, list[int]()

    def small(x: Tensor, *more: Any) -> Tensor:
        rows.append(len(x))
        if len(x) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(x, *more)

    monkeypatch.setattr(system.network, "forward", small)
    engine = Engine(system)
    how = plan(system.scheduler, 3)
    ticket = engine.add(run(system, prepare(system, how, ["a"] * 5, range(5), guidance=Guidance(4))))
    assert list(engine.run()) == [ticket] and list(engine.limits.values()) == [2]
    assert rows == [10, 5] + [2] * 15
    assert ticket.latents is not None
    torch.testing.assert_close(ticket.latents, alone, atol=1e-4, rtol=1e-4)

    monkeypatch.setattr(
        system.network, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    ticket = engine.add(run(system, plain(system, 1)))
    assert list(engine.run()) == [ticket] and "out of memory" in str(ticket.error)
    monkeypatch.setattr(system.network, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    engine.add(run(system, plain(system, 1)))
    with pytest.raises(RuntimeError, match="a bug"):
        list(engine.run())
    with pytest.raises(UserError, match="rows is 0"):
        Engine(system, rows=0)


def test_settings_share_no_call(system: System, calls: list[int]) -> None:
    entered: list[object] = []

    @contextmanager
    def within(setting: object) -> Iterator[None]:
        entered.append(setting)
        yield

    engine = Engine(system, within=within)
    for seed, setting in enumerate(("ink", None, "ink", None)):
        engine.add(run(system, plain(system, seed, steps=2)), setting)
    assert len(list(engine.run())) == 4
    assert calls == [4] * 4 and entered == ["ink", None] * 4  # to begin each, and then at every call


def test_an_engine_takes_requests_while_it_yields(system: System) -> None:
    engine, count = Engine(system), 0
    engine.add(run(system, plain(system, 0, steps=2)))
    for ticket in engine.run():
        count += 1
        assert ticket.latents is not None
        if count < 4:
            engine.add(run(system, plain(system, count, steps=2)))
    assert count == 4
