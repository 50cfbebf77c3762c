"""The strict configuration: what it builds, what it refuses, and what it says when it refuses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ldm.config import from_dict, load_yaml, override, to_dict
from ldm.errors import UserError, nearest


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int | None = None
    fused: bool = False


@dataclass(frozen=True)
class Run:
    name: str
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    optimizer: Optimizer = field(default_factory=Optimizer)
    resume: Optimizer | None = None
    channels: tuple[int, ...] = (32, 64)
    depth: int | list[int] = 1
    weights: dict[str, float] = field(default_factory=dict)
    out: Path | None = None


FULL: dict[str, Any] = {
    "name": "small",
    "prediction_type": "v_prediction",
    "optimizer": {"lr": 1, "betas": [0.9, 0.99], "warmup": 100, "fused": True},
    "resume": {"lr": 0.5},
    "channels": [1, 2, 3],
    "depth": [1, 2],
    "weights": {"a": 2, "b": 0.5},
    "out": "runs/small",
}


def test_builds_nested_types() -> None:
    run = from_dict(Run, FULL)
    assert run == Run(
        name="small",
        prediction_type="v_prediction",
        optimizer=Optimizer(1.0, (0.9, 0.99), 100, True),
        resume=Optimizer(0.5),
        channels=(1, 2, 3),
        depth=[1, 2],
        weights={"a": 2.0, "b": 0.5},
        out=Path("runs/small"),
    )
    assert type(run.optimizer.lr) is float and type(run.weights["a"]) is float


def test_to_dict_is_plain_and_returns() -> None:
    run = from_dict(Run, FULL)
    plain = to_dict(run)
    assert (
        plain["channels"] == [1, 2, 3] and plain["out"] == "runs/small" and plain["resume"]["warmup"] is None
    )
    assert from_dict(Run, plain) == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nme": "x"}, "run.yaml: unknown key 'nme', did you mean name?"),
        ({"optimizer": {"beta": 1}}, "run.yaml: unknown key 'optimizer.beta', did you mean betas?"),
        ({"optimizer": {"lr": "fast"}}, "run.yaml: 'optimizer.lr' is 'fast' (str), expected float"),
        ({"optimizer": {"lr": True}}, "run.yaml: 'optimizer.lr' is True (bool), expected float"),
        ({"optimizer": {"fused": 1}}, "run.yaml: 'optimizer.fused' is 1 (int), expected bool"),
        ({"optimizer": {"warmup": 1.5}}, "run.yaml: 'optimizer.warmup' is 1.5 (float), expected int or none"),
        ({"optimizer": {"betas": [0.9]}}, "'optimizer.betas' is [0.9] (list), expected tuple[float, float]"),
        ({"optimizer": 3}, "run.yaml: 'optimizer' is 3 (int), expected keys and values"),
        ({"optimizer": None}, "run.yaml: 'optimizer' is None (NoneType), expected keys and values"),
        ({"resume": {"lrr": 3}}, "run.yaml: unknown key 'resume.lrr', did you mean lr?"),
        ({"channels": [1, "2"]}, "run.yaml: 'channels[1]' is '2' (str), expected int"),
        ({"weights": {"a": "b"}}, "run.yaml: 'weights.a' is 'b' (str), expected float"),
        ({"weights": {1: 1.0}}, "run.yaml: 'weights' is 1 (int), expected str"),
        ({"prediction_type": "v_predicton"}, "'sample', did you mean v_prediction?"),
        ({"name": 3}, "run.yaml: 'name' is 3 (int), expected str"),
    ],
)
def test_refuses_and_names_the_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        from_dict(Run, {"name": "x"} | change, where="run.yaml")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_key() -> None:
    with pytest.raises(UserError, match="missing key 'name'"):
        from_dict(Run, {})


def test_load_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: small\noptimizer: {lr: 2e-4, betas: [0.9, 1.0E-2]}\n")
    run = load_yaml(file, Run, ["optimizer.warmup=7", "weights.a=-1e3", "out=runs/3"])
    assert run.optimizer == Optimizer(2e-4, (0.9, 1e-2), 7)
    assert run.weights == {"a": -1000.0} and run.out == Path("runs/3")


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "\x00", "just words"])
def test_bad_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as refusal:
        load_yaml(file, Run)
    assert "run.yaml" in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=r"missing\.yaml"):
        load_yaml(tmp_path / "missing.yaml", Run)


def test_an_exponent_is_a_number_and_a_name_is_not(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: 1e-4-run\n")
    assert load_yaml(file, Run).name == "1e-4-run"


def test_override_changes_a_copy() -> None:
    original = {"optimizer": {"lr": 1.0}}
    changed = override(original, ["optimizer.lr=2", "depth=[1, 2]", "resume.lr=3e-5", "name='4'"], Run)
    assert changed == {"optimizer": {"lr": 2}, "depth": [1, 2], "resume": {"lr": 3e-5}, "name": "4"}
    assert original == {"optimizer": {"lr": 1.0}}
    assert override({"a": {"b": 1}}, ["a.b=x=y"]) == {"a": {"b": "x=y"}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lrr=3", "unknown key 'optimizer.lrr', did you mean lr?"),
        ("optimiser.lr=3", "unknown key 'optimiser', did you mean optimizer?"),
        ("name.x=3", "'name' is a value, not a section"),
        ("channels.0=3", "'channels' is a value, not a section"),
        ("name", "write key=value"),
        ("=3", "write key=value"),
        ("name=[1", "is not valid YAML"),
    ],
)
def test_override_refuses(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        override({"name": "x", "channels": [1]}, [assignment], Run)
    assert message in str(refusal.value)


@dataclass(frozen=True)
class Pictures:
    path: str
    resolution: int = 64


@dataclass(frozen=True)
class Loop:
    batch_size: int = 1
    optimizer: Optimizer = field(default_factory=Optimizer)
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Deep:
    output: str
    loop: Loop = field(default_factory=Loop)
    pictures: Pictures | None = None
    mode: Literal["mean", "noise"] | None = None


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("loop.out", "output"),  # one level up, of a like name
        ("pictures.batch_size", "loop.batch_size"),  # the same name in another section
        ("pictures.lr", "loop.optimizer.lr"),
        ("resolution", "pictures.resolution"),
        ("optimizer.lr", "loop.optimizer.lr"),  # the section above was left out
        ("loop.optimizer_lr", "loop.optimizer.lr"),
        ("Loop", "loop"),
        ("loop.wd", "loop.weight_decay"),  # its first letters
        ("batchsize", "loop.batch_size"),
        ("loop.optimizer.waarmup", "warmup"),  # a slip in the right place
    ],
)
def test_an_unknown_key_is_looked_for_at_every_level(key: str, meant: str) -> None:
    with pytest.raises(UserError) as refusal:
        override({"output": "x"}, [f"{key}=1"], Deep)
    assert f", did you mean {meant}" in str(refusal.value)
    nested: Any = 1
    for part in reversed(key.split(".")):
        nested = {part: nested}
    with pytest.raises(UserError) as refusal:
        from_dict(Deep, {"output": "x", "pictures": {"path": "p"}} | nested, "run.yaml")
    assert str(refusal.value).startswith("run.yaml: unknown key '") and "did you mean " in str(refusal.value)


def test_a_key_like_no_other_gets_no_hint() -> None:
    with pytest.raises(UserError, match=r"^unknown key 'zzz'$"):
        override({}, ["zzz=1"], Deep)


def test_a_choice_that_may_be_none_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean noise"):
        from_dict(Deep, {"output": "x", "mode": "noisy"})


@pytest.mark.parametrize(
    ("path", "meant"), [("configs/lora.yml", "lora"), ("lora", "lora"), ("configs/Lroa", "lora")]
)
def test_a_file_that_is_not_there_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("lora.yaml", "finetune.yaml"):
        (tmp_path / "configs" / name).write_text("output: x\n")
    with pytest.raises(UserError) as refusal:
        load_yaml(path, Deep)
    assert str(refusal.value) == f"there is no configuration {path}, did you mean configs/{meant}.yaml?"
    with pytest.raises(UserError, match=r"configs is a folder.*finetune.yaml, configs/lora.yaml"):
        load_yaml("configs", Deep)


def test_nearest() -> None:
    assert nearest("Euler", ["euler", "heun"]) == ", did you mean euler?"
    assert nearest("dpmpp_2", ["dpmpp_2m", "dpmpp_2s"]).count(" or ") == 1
    assert nearest("zzz", ["euler"]) == ""


def test_a_bare_no_stands_for_the_word_where_that_is_a_choice() -> None:
    """YAML 1.1 reads `precision: no` as a bool."""

    @dataclass(frozen=True)
    class Loop:
        precision: Literal["no", "bf16"] = "bf16"
        lights: Literal["on", "dim"] | None = None

    assert override({}, ["precision=no", "lights=on"], Loop) == {"precision": False, "lights": True}
    assert from_dict(Loop, {"precision": False, "lights": True}) == Loop("no", "on")
    with pytest.raises(UserError, match="'precision' is True"):
        from_dict(Loop, {"precision": True})
