"""The benchmark of parts: contenders compute the same, who fails or dies is reported, results stay."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import comparison, contenders, costs, fresh, speed_report, true_sizes
from benchmarks.parts import PARTS, Contender, Job, Shapes
from benchmarks.workers import FailedError, Worker, in_turns
from ldm.errors import UserError
from scripts import benchmark
from tests.behaving import behaving
from tests.tiny import tiny_pipeline_folder

THEIRS, OURS = Contender(comparison.DEFAULT, "diffusers", "float32"), Contender("ours, as loaded", "ours")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny_pipeline_folder(folder, family) for family in ("sd1", "sdxl")}


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """`build` turns them off for its process, which here is the tests' own."""
    yield
    torch.set_grad_enabled(True)


# What is computed


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("part", PARTS)
def test_contenders_compute_the_same(models: dict[str, Path], family: str, part: str) -> None:
    job = Job(str(models[family]), part, pictures=2, steps=2)
    low = [Contender("low", "ours", "bfloat16"), Contender("tuned", "diffusers", "bfloat16", tuned=True)]
    outs = []
    for each in [THEIRS, Contender("ours", "ours", "float32"), *low]:
        work, facts = contenders.build(each, job)
        assert facts == {"dtype": each.dtype}
        outs.append(work(0)[1])
    apart = [comparison.distance(each, outs[0], part) for each in outs[1:]]
    if part == "picture":
        assert apart[0] > 80 and min(apart[1:]) > 20
    else:
        assert apart[0] < 1e-5 and max(apart[1:]) < 0.1


def test_first_pictures_of_fresh_processes_are_drawn_and_say_their_memory(models: dict[str, Path]) -> None:
    for each in (THEIRS, OURS):
        told = fresh.Fresh(each, Job(str(models["sd1"]), "start", steps=1))._told
        said = fresh.drawn(json.loads(json.dumps(told)))
        assert said["peak_bytes"] > 1e8 and "dtype" in said
    assert fresh.imported({"contender": asdict(OURS)})["beyond_torch"] >= 0


def test_operations_of_stable_diffusion_are_counted_attention_included(tmp_path: Path) -> None:
    told = true_sizes.configs()
    for part, config in {**told, "tokenizer": {}}.items():
        (tmp_path / part).mkdir()
        name = "tokenizer_config.json" if part == "tokenizer" else "config.json"
        (tmp_path / part / name).write_text(json.dumps(config))
    assert costs.flops(str(tmp_path), "step", 1) == pytest.approx(1.6065e12, rel=1e-3)
    assert costs.flops(str(tmp_path), "decode", 1) == pytest.approx(2.5145e12, rel=1e-3)


def test_operators_have_kinds() -> None:
    kinds = {
        "aten::mkldnn_convolution": "convolution",
        "aten::bmm": "attention products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention products",
        "aten::addmm": "linear",
        "mkldnn::_linear_pointwise": "linear",
        "aten::native_group_norm": "norm",
        "aten::silu": "elementwise",
        "aten::copy_": "copies",
        "aten::_softmax": "softmax",
        "aten::empty": "other",
    }
    assert {name: costs.kind_of(name) for name in kinds} == kinds


def test_a_true_size_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(folder: Path, *given: Any) -> None:
        made.append(given)
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")

    monkeypatch.setattr(true_sizes, "make_system", make)
    for _ in range(2):
        assert true_sizes.true_size("sdxl", tmp_path) == tmp_path / "sdxl"
    assert made == [("sdxl", torch.bfloat16)]


# Turns, failures, deaths


class Scripted:
    """A contender that notes when it was called, and fails at a turn."""

    def __init__(self, name: str, order: list[str], fails: int | None = None):
        self.facts: dict[str, Any] = {"dtype": name}
        self._name, self._order, self._fails = name, order, fails

    def once(self, turn: int) -> tuple[float, Any]:
        if turn == self._fails:
            raise FailedError("it fell")
        self._order.append(f"{self._name}{turn}")
        return float(turn), self._name if turn == 0 else None

    def close(self) -> None:
        self._order.append(f"{self._name}.")


def test_turns_go_forwards_and_backwards_without_the_one_that_failed() -> None:
    order: list[str] = []
    makers = {name: partial(Scripted, name, order, 2 if name == "b" else None) for name in "abc"}
    found = in_turns(makers, 3)
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "c2", "a2", "a3", "c3", "a.", "c."]
    assert found["a"].seconds == [1.0, 2.0, 3.0] and found["a"].output == "a"
    assert found["b"].failed == "it fell"


def test_apart_each_is_loaded_alone_and_twice() -> None:
    order: list[str] = []
    found = in_turns({name: partial(Scripted, name, order) for name in "ab"}, 3, apart=True)
    assert order == ["a0", "a1", "a2", "a.", "b0", "b1", "b2", "b.", "b0", "b3", "b.", "a0", "a3", "a."]
    assert found["b"].seconds == [1.0, 2.0, 3.0]


def test_who_raises_dies_or_leaves_is_reported_and_the_rest_goes_on() -> None:
    found = in_turns({how: partial(Worker, behaving, how) for how in ("dies", "well", "leaves", "raises")}, 2)
    assert {name: each.failed for name, each in found.items()} == {
        "dies": "its process died of SIGSEGV",
        "well": None,
        "leaves": "its process ended with status 3",
        "raises": "ValueError: no such shape",
    }
    assert found["well"].seconds == [1.0, 1.0] and found["well"].output == "well"


# Results


def results(failed: bool = False) -> dict[str, Any]:
    other = (
        {"failed": "its process died of SIGSEGV", "seconds": []} if failed else {"seconds": [1.0, 2.0, 4.0]}
    )
    key = {"model": "tiny", "part": "step", "pictures": 1, "steps": None, "rounds": 3}
    own = {
        "diffusers, float32": {"dtype": "float32", "seconds": [4.0, 4.0, 5.0], "distance": 0.0},
        "ours, as loaded": {"dtype": "float32", "distance": 1e-7, **other},
    }
    peaks = {"matrix float32": [1e9, 2e9], "convolution float32": [4e9, 4e9]}
    return {
        "key": key,
        "operations": 4e9,
        "contenders": own,
        "peaks": peaks,
        "profiles": {"it": {"norm": 1.0}},
    }


def test_a_table_has_ratios_rates_and_shares() -> None:
    rows = speed_report.table(results()).splitlines()
    assert "| ours, as loaded (float32) | 2 (1 to 4) | 2.00 | 2.00 | 2 | 50 % | 1.0e-07 |" in rows
    assert "| it | 100 % |" in rows


def test_a_failed_contender_is_a_row_of_the_table_and_no_bar(tmp_path: Path) -> None:
    assert "| ours, as loaded | failed: its process died of SIGSEGV |" in speed_report.table(results(True))
    kept = {"machine": "one", "measurements": [results(True), results()]}
    speed_report.plot([kept], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="nothing to plot"):
        speed_report.plot([{"measurements": []}], tmp_path / "none.png")


def test_distances() -> None:
    one = np.ones((1, 3, 2, 2), np.float32)
    assert comparison.distance(one, one, "picture") == pytest.approx(120)
    assert comparison.distance(one * 1.1, one, "step") == pytest.approx(0.1, rel=1e-4)
    assert np.isnan(comparison.distance(one * np.nan, one, "step"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    return benchmark.main()


def test_the_command_measures_once_and_goes_on(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, plot = tmp_path / "tiny.json", tmp_path / "tiny.png"
    asked = ("--part", "text", "--precision", "no", "--rounds", 1, "--contenders", "s, float32")
    command = ("parts", "--model", models["sd1"], *asked, "--output", output)
    assert run(monkeypatch, *command, "--plot", plot) == 0
    assert "| ours, float32 |" in capsys.readouterr().out and plot.exists()
    (found,) = json.loads(output.read_text())["measurements"]
    assert found["contenders"]["ours, float32"]["distance"] < 1e-5
    monkeypatch.setattr(comparison, "measure", lambda *given: pytest.fail("measured twice"))
    assert run(monkeypatch, *command) == 0 and run(monkeypatch, "plot", output) == 0
    monkeypatch.setattr(comparison, "machine", lambda: "another")
    assert run(monkeypatch, *command) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["parts", "--model", "nowhere"], "no diffusers folder"),
        (["parts", "--pictures", "0"], "--pictures must be"),
        (["parts", "--part", "step", "--contenders", "nobody"], "no contender of step"),
        (["parts", "some.json"], "files of results are for plot"),
        (["plot"], "plot needs files of results"),
        (["plot", "nowhere.json"], "no results of this benchmark"),
        (["rows", "--precision", "no", "bf16"], "one --precision"),
        (["training"], "training needs --data"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_shapes_of_the_inputs(models: dict[str, Path]) -> None:
    shapes = Shapes.read(models["sdxl"])
    assert [tuple(each.shape) for each in shapes.inputs("step", 2)] == [
        (4, 4, 16, 16),
        (1,),
        (4, 77, 64),
        (4, 24),
        (4, 6),
    ]
