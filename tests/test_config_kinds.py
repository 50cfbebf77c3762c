"""Tagged unions in a configuration: sections whose `kind` says which dataclass they are."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from ldm.config import add_kind, from_dict, override, to_dict
from ldm.errors import UserError


class Source:
    """An open union: subclasses are its kinds."""

    kinds: ClassVar[dict[str, type["Source"]]] = {}

    def __init_subclass__(cls, kind: str) -> None:
        add_kind(Source.kinds, cls, kind)


@dataclass(frozen=True)
class Disk(Source, kind="disk"):
    path: str
    flip: bool = False


@dataclass(frozen=True)
class Made(Source, kind="made"):
    renamed: ClassVar[dict[str, str]] = {"number": "seed"}

    seed: int = 0
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    kind: ClassVar[str] = "whole"
    text: bool = False


@dataclass(frozen=True)
class Part:
    kind: ClassVar[str] = "part"
    rank: int
    text: bool = False


@dataclass(frozen=True)
class Begin:
    rank: int = 1


@dataclass(frozen=True)
class Loss:
    kind: str = "l2"  # a setting of its own, no tag


@dataclass(frozen=True)
class Model:
    data: Source
    train: Whole | Part = field(default_factory=Whole)
    other: Part | Whole | None = None
    start: str | Begin = "there"
    sources: tuple[Source, ...] = ()
    loss: Loss = field(default_factory=Loss)

    renamed: ClassVar[dict[str, str]] = {"old": "loss", "disk": "data, with kind: disk"}


@dataclass(frozen=True)
class Run:
    model: Model


def run(**model: Any) -> dict[str, Any]:
    return {"model": {"data": {"kind": "made"}, **model}}


def test_the_kind_chooses_the_class_and_returns() -> None:
    sections = {
        "data": {"kind": "disk", "path": "x", "flip": True},
        "train": {"kind": "part", "rank": 3, "text": False},
        "other": None,
        "start": {"rank": 2},
        "sources": [{"kind": "made", "seed": 1, "labels": {}}],
        "loss": {"kind": "l1"},
    }
    made = from_dict(Run, {"model": sections})
    assert made == Run(Model(Disk("x", True), Part(3), None, Begin(2), (Made(1),), Loss("l1")))
    assert to_dict(made) == {"model": sections}
    assert next(iter(to_dict(made)["model"]["train"])) == "kind"
    assert from_dict(Run, run()).model == Model(Made(), Whole())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"data": {"kind": "dsk", "path": "x"}},
            "'model.data.kind' is 'dsk', expected one of disk, made, did you mean disk",
        ),
        ({"data": {"kind": 3}}, "'model.data.kind' is 3, expected one of disk, made$"),
        (
            {"data": {"kind": "stream"}},
            r"is 'stream', expected one of disk, made \(is the module that brings it imported\?\)$",
        ),
        ({"data": {"path": "x"}}, "'model.data' needs a kind: one of disk, made"),
        ({"data": "disk"}, r"'model.data' is 'disk' \(str\), expected keys and values$"),
        ({"data": {"kind": "disk"}}, "missing key 'model.data.path'"),
        (
            {"data": {"kind": "made", "flip": True}},
            "unknown key 'model.data.flip': it goes with model.data.kind disk",
        ),
        ({"data": {"kind": "made", "sed": 1}}, "unknown key 'model.data.sed', did you mean seed"),
        ({"train": {"kind": "part", "rank": "x"}}, "'model.train.rank' is 'x'"),
        ({"train": {"kind": "sixth"}}, "is 'sixth', expected one of whole, part$"),
        ({"train": True}, r"'model.train' is True \(bool\), expected keys and values$"),
        ({"disk": {"path": "x"}}, "'model.disk' is called model.data, with kind: disk now"),
        ({"flip": True}, r"unknown key 'model.flip', did you mean model.data.flip\?"),
        ({"text": True}, r"unknown key 'model.text', did you mean model.train.text or model.other.text\?"),
        ({"old": True}, "'model.old' is called model.loss now$"),
        ({"start": {"rank": "x"}}, "'model.start.rank' is 'x'"),
        ({"data": {"kind": "made", "number": 1}}, "'model.data.number' is called model.data.seed now"),
        ({"data": {"kind": ["made"]}}, r"'model.data.kind' is \['made'\], expected one of disk, made"),
        ({"start": 3}, r"'model.start' is 3 \(int\), expected str or keys and values"),
    ],
)
def test_what_is_wrong_is_named(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Run, run(**model))


def test_overrides_know_the_kind() -> None:
    given = override(
        run(), ["model.data.seed=4", "model.data.labels.a=1", "model.train={kind: part, rank: 2}"], Run
    )
    assert from_dict(Run, given).model == Model(Made(4, {"a": 1}), Part(2))
    assert from_dict(Run, override(run(), ["model.start.rank=4"], Run)).model.start == Begin(4)
    with pytest.raises(UserError, match=r"'model.start' is a value, not a section"):
        override(run(start="here"), ["model.start.rank=4"], Run)
    changed = override({"model": {"data": {"kind": "disk", "path": "x"}}}, ["model.data.kind=made"], Run)
    with pytest.raises(UserError, match=r"unknown key 'model.data.path': it goes with model.data.kind disk"):
        from_dict(Run, changed)
    given = override(run(), ["model.train.kind=part", "model.train.rank=5"], Run)
    assert from_dict(Run, given).model.train == Part(5)
    with pytest.raises(UserError, match=r"unknown key 'model.data.flip': it goes with model.data.kind disk"):
        override(run(), ["model.data.flip=true"], Run)
    with pytest.raises(UserError, match=r"'model.disk' is called model.data, with kind: disk now"):
        override(run(), ["model.disk.path=x"], Run)


def test_a_kind_is_taken_once() -> None:
    with pytest.raises(ValueError, match=r"'disk' is taken by Disk"):

        class Again(Source, kind="disk"):
            pass
