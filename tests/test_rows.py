"""Rows of files: what each kind states, a mistake costs its row and no other, and memory doesn't grow with the file."""

import csv
import io
import json
import math
import os
import sys
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import UserError
from pipelines import jobs
from pipelines.jobs import read_prompts
from pipelines.recipe import PER_IMAGE, SETTINGS, Recipe
from pipelines.row_files import HINTS, LONGEST
from pipelines.rows import Row, place, read_rows

QUICK = settings(max_examples=15, deadline=None)
# What a line of a text can hold: no end of a line, no half of a surrogate pair and no NUL.
LINES = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=20)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def rows_of(path: Path, content: str | bytes) -> list[Row]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path))


def refused(path: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as error:
        rows_of(path, content)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value).removeprefix(str(path))


@pytest.fixture
def parquet(folder: Path) -> Callable[..., list[Row]]:
    def write(columns: Any, **how: Any) -> list[Row]:
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(table, folder / "some.parquet", **how)
        return list(read_rows(folder / "some.parquet"))

    return write


# The same rows in each kind of file


@QUICK
@given(st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"]))), st.booleans())
def test_a_prompt_a_line_however_lines_end(folder: Path, lines: list[tuple[str, str]], mark: bool) -> None:
    path, wanted = folder / "prompts.txt", list[tuple[int, str]]()
    number = 0
    content = "".join(text + end for text, end in lines)
    for number, text in enumerate(content.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        wanted += [(number, text.strip())] if text.strip() else []
    if not wanted:
        assert "holds no prompt" in refused(path, content)
        return
    found = rows_of(path, ("\ufeff" if mark else "") + content)
    assert [(row.line, row.settings["prompt"]) for row in found] == wanted
    assert [row.number for row in found] == list(range(len(wanted))) and not any(row.error for row in found)


STATED = st.fixed_dictionaries(
    {"prompt": TEXTS.filter(str.strip)},
    optional={
        "negative_prompt": TEXTS.filter(str.strip),
        "seed": st.integers(0, 2**64 - 1),
        "guidance_scale": st.floats(allow_nan=False, allow_infinity=False),
        "height": st.integers(1, 2**31),
        "guess_mode": st.booleans(),
        "original_size": st.lists(st.integers(1, 99), min_size=2, max_size=2),
        "loras": st.lists(st.sampled_from(["a.safetensors:0.5", "b.safetensors"]), max_size=2),
        "id": TEXTS.filter(str.strip),
        "count": st.integers(1, 10_000),
    },
)


@QUICK
@given(st.lists(STATED, min_size=1, max_size=5))
def test_each_kind_says_the_same(folder: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in names] for row in rows]
    cells = [[each if isinstance(each, str | None) else json.dumps(each) for each in line] for line in cells]
    tabs, commas = io.StringIO(), io.StringIO()
    csv.writer(tabs, delimiter="\t").writerows([names, *cells])
    csv.writer(commas, quoting=csv.QUOTE_ALL, lineterminator="\r").writerows([names, *cells])
    types = {"seed": pa.uint64(), "guidance_scale": pa.float64(), "height": pa.int64(), "count": pa.int32()}
    arrays = [pa.array([row.get(name) for row in rows], types.get(name)) for name in names]
    pq.write_table(pa.table(arrays, names=names), folder / "same.parquet")
    for path, content in (
        (folder / "same.jsonl", "\n".join(json.dumps(row) for row in rows)),
        (folder / "same.ndjson", "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        (folder / "same.tsv", tabs.getvalue()),
        (folder / "same.csv", commas.getvalue()),
        (folder / "same.parquet", (folder / "same.parquet").read_bytes()),
    ):
        found = rows_of(path, content)
        assert not any(row.error for row in found)
        for row, wanted in zip(found, rows, strict=True):
            assert row.settings == {name: wanted[name] for name in wanted if name not in ("id", "count")}
            assert (row.id, row.count) == (wanted.get("id"), wanted.get("count", 1))
            assert all(type(each).__module__ == "builtins" for each in row.settings.values())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["txt", "jsonl", "csv", "tsv", "parquet"]), st.booleans())
def test_any_bytes_are_rows_or_one_line(folder: Path, content: bytes, kind: str, headed: bool) -> None:
    path = folder / f"any.{kind}"
    path.write_bytes((b"prompt\n" if headed else b"") + content)
    try:
        for row in read_rows(path):
            assert row.error or row.settings["prompt"].strip()
            assert row.error.isprintable() and row.line >= 1
            json.dumps(dict(row.settings)).encode()
    except UserError as error:
        assert str(error).isprintable()


# A mistake in a row


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not", "it is not valid JSON: Expecting"),
        ("[1]", 'expected an object such as {"prompt": "a fox"'),
        (b'{"prompt": "\xff"}', "it is not valid UTF-8 text: save"),
        ('{"prompt": "\\ud800"}', "it is not valid UTF-8 text"),
        ('{"prompt": "a", "controls": [{"image": "\\u0000"}]}', "it holds a NUL character"),
        ('{"prompt": "a\0"}', "it holds a NUL character"),
        ('{"prompt": "' + "a" * LONGEST + '"}', "it is longer than 1,048,576 characters"),
        ("{}", "it has no prompt"),
        ('{"prompt": null}', "it has no prompt"),
        ('{"prompt": " "}', "its prompt is empty"),
        ('{"prompt": 5}', "'prompt' is 5 (int): give a text"),
        ('{"prompt": "a", "samplr": 1}', "unknown key 'samplr', did you mean sampler?"),
        ('{"prompt": "a", "a\\nb": 1}', "unknown key 'a\\nb'"),
        ('{"prompt": "a", "steps": 1}', "'steps' is called num_inference_steps in a row, as in Python"),
        ('{"prompt": "a", "guidance": 1}', "'guidance' is called guidance_scale in a row"),
        ('{"prompt": "a", "size": 1}', "'size' is called height and width in a row"),
        ('{"prompt": "a", "mask": 1}', "'mask' is called mask_image in a row"),
        ('{"prompt": "a", "lora": 1}', "'lora' is called loras in a row"),
        ('{"prompt": "a", "negative": 1}', "'negative' is called negative_prompt in a row"),
        ('{"prompt": "a", "model": 1}', "'model' holds for the whole run, not for a row"),
        ('{"prompt": "a", "beside": []}', "'beside' holds for the whole run"),
        ('{"prompt": "a", "count": 0}', "'count' is 0 (int): give a whole number from 1 to 10,000"),
        ('{"prompt": "a", "count": 10001}', "'count' is 10001"),
        ('{"prompt": "a", "count": true}', "'count' is True (bool)"),
        ('{"prompt": "a", "count": 2.0}', "'count' is 2.0 (float)"),
        ('{"prompt": "a", "id": ""}', "its id is empty"),
        ('{"prompt": "a", "id": [1]}', "'id' is [1] (list): give a text or a whole number"),
        ('{"prompt": "a", "id": "' + "x" * 201 + '"}', "its id has 201 characters"),
        ('{"prompt": ' + "[" * 9999, "it is not valid JSON: it is nested too deeply"),
    ],
)
def test_a_mistake_in_a_row_is_its_own(folder: Path, line: str | bytes, words: str) -> None:
    line = line if isinstance(line, bytes) else line.encode()
    first, wrong, last = rows_of(folder / "one.jsonl", b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    assert (
        wrong.error.startswith(words) and wrong.error.isprintable() and (wrong.id, wrong.count) == (None, 1)
    )
    assert (first.error, last.error, last.settings) == ("", "", {"prompt": "b"})
    assert ([first.line, wrong.line, last.line], last.number) == ([1, 3, 4], 2)
    assert '"prompt": "a", ' not in line.decode(errors="replace") or wrong.settings.get("prompt", "a") == "a"


def test_names_follow_the_recipe() -> None:
    assert set(HINTS) == {*PER_IMAGE, *SETTINGS, "id", "count"} - {"beside"}


def test_rows_stand_as_they_are_in_json(folder: Path) -> None:
    line = (
        '{"prompt": " a ", "seed": 7.0, "negative_prompt": null, "id": 7, "strength": NaN, "image": "a.png"}'
    )
    (row,) = rows_of(folder / "one.jsonl", line)
    assert (
        row.settings["seed"] == 7.0 and type(row.settings["seed"]) is float
    )  # Recipe.parse says what is wrong
    assert row.settings["prompt"] == " a " and row.settings["negative_prompt"] is None and row.id == "7"
    assert math.isnan(row.settings["strength"]) and row.settings["image"] == "a.png"
    assert place("rows.jsonl", row) == "rows.jsonl, line 1" and place("a.parquet", row) == "a.parquet, row 1"


# Tables


def test_cells(folder: Path) -> None:
    content = (
        '\ufeffprompt, seed,guidance_scale,sampler,loras,controls,id,guess_mode,,image\r\n"a ""red"", fox\nand\r\na '
        'dog",7.0,7,5,x.safetensors:0.8,"[{""path"": ""n"", ""scale"": 1}]",007,TRUE\r\n,,,\r\n\r\n'
        "cat,1e3,NaN,true,,null,,,,[1]\r\n7,07,x,,,,,,\r\ncat,,,,,,,,extra\r\ncat,1,2,3,4,5,6,7,8,9,10\r\n"
    )
    first, second, third, nameless, more = rows_of(folder / "some.csv", content)
    assert first.settings == {
        "prompt": 'a "red", fox\nand\na dog',
        "seed": 7,
        "guidance_scale": 7,
        "sampler": "5",
        "loras": "x.safetensors:0.8",
        "controls": [{"path": "n", "scale": 1}],
        "guess_mode": True,
    }
    assert type(first.settings["seed"]) is int and (first.id, first.line) == ("007", 2)
    assert second.settings == {"prompt": "cat", "seed": 1000, "sampler": "true", "image": "[1]"}
    assert (second.line, second.id) == (7, None)
    assert third.settings == {"prompt": "7", "seed": "07", "guidance_scale": "x"} and not third.error
    assert "column without a name" in nameless.error and "11 cells for 10 columns" in more.error
    with pytest.raises(UserError, match="'seed' is '07'"):
        Recipe.parse(third.settings, "")


def test_quotes_that_go_wrong_lose_no_rows_silently(folder: Path) -> None:
    path, many = folder / "some.csv", "a cat,1\n" * 1000
    assert ", line 3: a quote" in refused(path, f'prompt,seed\na,1\n"a cat,1\n{many}')
    assert ", line 3: a row of more than" in refused(path, f'prompt,seed\na,1\n"a cat,1\n{many * 200}')
    assert ", line 2: a row of more than" in refused(path, f"prompt,seed\n{'a' * LONGEST}a,1\n")
    assert not rows_of(path, f"prompt,seed\n{'a' * (LONGEST - 2)},1\n")[0].error
    wrong, right = rows_of(path, 'prompt,seed\n"a" cat,1\na dog,2\n')
    assert wrong.error.startswith("it is not valid CSV") and right.settings == {"prompt": "a dog", "seed": 2}
    wrong, right = rows_of(path, b"prompt,seed\n\xff,1\na dog,2\n")
    assert "not valid UTF-8" in wrong.error and (wrong.line, right.line) == (2, 3)


def test_parquet_of_all_kinds_of_columns(parquet: Callable[..., list[Row]]) -> None:
    struct = [{"path": "n", "image": "a.png", "scale": None}]
    first, second, third = parquet(
        {
            "prompt": pa.array(["a", "b", "c"]).dictionary_encode(),
            "seed": [7.0, None, math.nan],
            "count": [2.0, math.nan, 2.5],
            "height": pa.array([64, None, 32], pa.int16()),
            "guidance_scale": pa.array([Decimal("7.5"), Decimal("7.0"), None]),
            "original_size": [[64.0, 32.0], None, [1.5, 2.0]],
            "controls": [struct, None, []],
            "loras": pa.array([[("a.safetensors", 0.5)], None, []], pa.map_(pa.string(), pa.float32())),
            "sampler": [b"ddim", None, None],
            "id": [7.0, 8.0, None],
            "__index_level_0__": [5, 6, 7],
        }
    )
    assert first.settings == {
        "prompt": "a",
        "seed": 7,
        "height": 64,
        "guidance_scale": 7.5,
        "original_size": [64, 32],
        "controls": [{"path": "n", "image": "a.png"}],
        "loras": {"a.safetensors": 0.5},
        "sampler": "ddim",
    }
    assert all(type(each) is int for each in (first.settings["seed"], *first.settings["original_size"]))
    assert (first.id, first.count, first.line, third.line) == ("7", 2, 1, 3)
    assert second.settings == {"prompt": "b", "guidance_scale": 7.0} and not first.error + second.error
    assert third.settings["original_size"] == [1.5, 2] and third.error.startswith("'count' is 2.5")
    large, when = (
        parquet({"prompt": ["a", "b"], "seed": [2.0**60, None]}),
        pa.array([0, 2**60], pa.timestamp("ms")),
    )
    assert (
        large[0].settings["seed"] == 2.0**60 and type(large[0].settings["seed"]) is float
    )  # rounded: no seed
    first, second = parquet({"prompt": ["a", "b"], "seed": when})
    assert first.settings["seed"].startswith("1970") and second.error.startswith("it can't be read")
    wrong = pa.Array.from_buffers(
        pa.utf8(),
        2,
        [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xffb")],
    )
    first, second = parquet(pa.table({"prompt": wrong}))
    assert first.error.startswith("it can't be read") and second.settings == {"prompt": "b"}
    assert parquet({"prompt": ["a" * (LONGEST + 1)]})[0].error.startswith("it is longer than")


def test_a_damaged_parquet_file_stops_when_it_is_met(folder: Path) -> None:
    path = folder / "damaged.parquet"
    table = pa.table({"prompt": [f"a cat {k}" for k in range(4000)]})
    how: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(table, path, row_group_size=1000, **how)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a cat 2500", b"a cat 2x00"))
    seen = 0
    with pytest.raises(UserError, match="is damaged after row 1792"):
        for row in read_rows(path):
            assert row.settings["prompt"] == f"a cat {row.number}"
            seen += 1
    assert seen == 1792  # what was decoded before the bad page
    for broken in (b"", whole[:-100], b"PAR1" + bytes(100), whole[:4] + whole[500:]):
        assert "parquet file" in refused(path, broken) or "damaged" in refused(path, broken)
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    assert "has the column 'prompt' twice" in refused(path, path.read_bytes())
    pq.write_table(pa.table({"Prompt": ["a"]}), path)
    assert "has no column named prompt: what it has is 'Prompt'" in refused(path, path.read_bytes())


# A mistake of the whole file


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "[]", ": prompts come one a line, or as .jsonl"),
        ("a.txt", "", "holds no prompt"),
        ("a.txt", "\ufeff\r\n \t\n", "holds no prompt"),
        ("a.jsonl", "\n\n", "holds no prompt"),
        ("a.csv", "prompt,seed\n,\n", "holds no prompt"),
        ("a.txt", "a cat".encode("utf-16"), "save it as UTF-8"),
        ("a.csv", "prompt\na".encode("utf-16-le"), "save it as UTF-8"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16-be"), "save it as UTF-8"),
        ("a.txt", "a cat".encode("utf-32"), "save it as UTF-8"),
        ("a.csv", "prompt;seed\na;1\n", "has no column named prompt: what it has is 'prompt;seed'"),
        ("a.csv", "prompt,seed,seed\na,1,2\n", "has the column 'seed' twice"),
        ("a.tsv", 'pro"mpt"\tx\n"a', "has no column named prompt"),
        ("a.csv", '"prompt\na\nb\n', "a quote"),
        ("a.csv", b"\xff,prompt\n", "a column's name can't be read"),
    ],
)
def test_a_mistake_of_the_whole_file(folder: Path, name: str, content: str | bytes, words: str) -> None:
    assert words in refused(folder / name, content)


def test_what_is_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("txt", "jsonl", "csv", "parquet"):
        with pytest.raises(UserError, match="can't be read: No such file"):
            list(read_rows(folder / f"none.{kind}"))
        (folder / f"folder.{kind}").mkdir()
        with pytest.raises(UserError, match="can't be read: it is no regular file"):
            list(read_rows(folder / f"folder.{kind}"))
        if hasattr(os, "mkfifo"):
            os.mkfifo(folder / f"pipe.{kind}")
            with pytest.raises(UserError, match="can't be read: it is no regular file"):
                list(read_rows(folder / f"pipe.{kind}"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "ldm-text-to-image\[batch\]"'):
        list(read_rows(folder / "any.parquet"))


# Jobs of ldm-generate


def test_jobs_of_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "jobs.jsonl"
    path.write_text(
        '{"prompt": "a", "seed": 5, "count": 2, "id": "x"}\n{"prompt": "b", "count": 2, "seed": null}\n'
    )
    found = read_prompts(path, {"seed": 3, "num_inference_steps": 4})
    assert [(job.recipe.prompt, job.recipe.seed) for job in found] == [
        ("a", 5),
        ("a", 6),
        ("b", None),
        ("b", None),
    ]
    assert all(job.recipe.num_inference_steps == 4 for job in found) and found[3].where == f"{path}, line 2"
    for line, words in (
        ('{"prompt": "a", "model": "b"}', ", line 1: 'model' holds for the whole run, not for a row"),
        ("{", ", line 1 is not valid JSON"),
        ('{"prompt": "a", "seed": "x"}', ", line 1: 'seed' is 'x'"),
        ('{"prompt": "a", "image": "none.png"}', ", line 1: "),
    ):
        path.write_text(line)
        with pytest.raises(UserError) as error:
            read_prompts(path, {})
        assert str(error.value).startswith(f"{path}{words}")
    monkeypatch.setattr(jobs, "MOST", 100)
    path.write_text('{"prompt": "a", "count": 50}\n' * 3)
    with pytest.raises(UserError, match="more than the 100 pictures"):
        read_prompts(path, {})


# Memory


def write(path: Path, count: int) -> Path:
    prompts = [f"a cat {k} {'-' * 60}" for k in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": prompts}), path)
    elif path.suffix == ".csv":
        path.write_text("prompt\n" + "\n".join(prompts))
    else:
        path.write_text("\n".join(f'{{"prompt": "{prompt}"}}' for prompt in prompts))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    def traced(rows: Iterator[Row]) -> int:
        tracemalloc.start()
        try:
            deque(rows, maxlen=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = traced(read_rows(write(tmp_path / f"few.{kind}", 2_000)))
    rows = read_rows(
        write(tmp_path / f"many.{kind}", 100_000)
    )  # of 8 MB; traced to the last would take seconds
    deque(islice(rows, 2_000), maxlen=0)
    blocks = sys.getallocatedblocks()
    deque(islice(rows, 88_000), maxlen=0)
    assert sys.getallocatedblocks() - blocks < 4_000  # each row that were held would have some
    assert traced(rows) < few + 2**18  # of its last 10,000 rows, which have 800 KB


def test_the_process_s_own_limit_of_csv_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("prompt\n" + "x" * (before + 10) + "\ny\n")
    rows = read_rows(tmp_path / "rows.csv")
    assert len(next(rows).settings["prompt"]) == before + 10 and csv.field_size_limit() == before
    assert [row.settings["prompt"] for row in rows] == ["y"] and csv.field_size_limit() == before
