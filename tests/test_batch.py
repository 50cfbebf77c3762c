"""A batch of rows: complete, each row once, the same bytes after any death, and one clear line for every trouble."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from random_lora import CASES, made
from tiny import tiny_pipeline_folder

from ldm.checkpoints.lora import write_lora
from ldm.data.webdataset import list_shards
from ldm.errors import UserError
from pipelines import TextToImagePipeline
from pipelines.batch import run as runs
from pipelines.batch.cli import main
from pipelines.batch.items import items_of
from pipelines.batch.ledger import MANIFEST, Ledger
from pipelines.batch.progress import Progress, duration
from pipelines.batch.setup import Setup
from pipelines.batch.views import picture_of
from pipelines.batch.work import Work
from pipelines.recipe import read_recipe

ROWS: list[Any] = [
    {"prompt": "a cat", "num_inference_steps": 2},
    {"prompt": "a dog", "num_inference_steps": 3, "sampler": "euler", "guidance_scale": 1.0},
    {"prompt": "the dog", "sampler": "dpmpp_2m", "count": 3},
    {"prompt": "a cat", "seed": 2**63 + 1, "width": 48},
    "not JSON",
    {"prompt": "a cat", "id": "kitten"},
    {"prompt": "a cat", "id": "kitten", "seed": 1},
    {"prompt": "a cat", "image": "one.png", "strength": 0.7},
    {"prompt": "a cat", "image": "none.png"},
    {"prompt": "a cat", "num_inference_steps": 0},
    {"prompt": "a cat", "loras": {"ink.safetensors": 0.5}, "seed": 5},
    {"prompt": "a cat", "hires_scale": 1.5, "hires_strength": 0.5},
    {"prompt": "a cat", "sampler": "dmpp_2m"},
    {"prompt": "a cat", "loras": ["more/ink.safetensors:0.7", "ink.safetensors:0.2"], "seed": 6},
    {"prompt": "a cat", "loras": ["broken.safetensors"]},
]
FAILED = [5, 7, 9, 10, 13, 15]  # lines


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a picture, a LoRA and rows."""
    folder = tmp_path_factory.mktemp("batch")
    tiny_pipeline_folder(folder, "sd1").rename(folder / "model")
    pipe = TextToImagePipeline.from_pretrained(folder / "model", device="cpu")
    (folder / "more").mkdir()
    write_lora(folder / "ink.safetensors", made(pipe, CASES["sd1"]))
    write_lora(folder / "more/ink.safetensors", made(pipe, CASES["sd1"], rank=2))
    (folder / "broken.safetensors").write_bytes(b"no LoRA")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "one.png")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """What an uninterrupted run gives."""
    assert batch(place, place / "alone") == 1
    return place / "alone"


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows))
    return path


def batch(place: Path, out: Path, *more: str, rows: Path | None = None) -> int:
    fixed = ("--steps", "2", "--together", "2", "--workers", "1", "--quiet", "--model", str(place / "model"))
    return main([str(rows or place / "rows.jsonl"), "--out", str(out), *fixed, *more])


def lines(out: Path) -> list[dict[str, Any]]:
    with (out / MANIFEST).open("rb") as file:
        return pyarrow.parquet.read_table(file).to_pylist()


def state(out: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The pictures' hashes by file, and the manifest but for its times."""
    files = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("images", "shards")
        for path in (out / kind).rglob("*.*")
        if path.is_file()
    }
    return files, [
        {name: value for name, value in line.items() if name not in ("time", "seconds")}
        for line in lines(out)
    ]


def test_every_row_is_drawn_or_told(place: Path, alone: Path) -> None:
    found = lines(alone)
    assert [(line["line"], line["index"]) for line in found] == [
        (k + 1, index) for k, row in enumerate(ROWS) for index in range(3 if "the dog" in str(row) else 1)
    ]
    assert [line["line"] for line in found if line["error"]] == FAILED
    reasons = [line["error"] for line in found if line["error"]]
    assert "JSON" in reasons[0] and "kitten" in reasons[1] and "none.png" in reasons[2]
    assert "num_inference_steps" in reasons[3] and "dpmpp_2m" in reasons[4]
    for line in found:
        if line["error"]:
            assert line["file_name"] is line["sha256"] is None
            continue
        path = alone / line["file_name"]
        assert path.stem == line["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.stat().st_size == line["bytes"] and Image.open(path).size == (
            line["width"],
            line["height"],
        )
        recipe = read_recipe(path)
        settings = json.loads(line["settings"])
        assert (recipe.prompt, recipe.seed) == (line["prompt"], line["seed"])
        assert settings["sampler"] == recipe.sampler and settings["seed"] == recipe.seed
        assert line["device"] == "cpu" and line["seconds"] > 0
    sizes = {line["line"]: line["width"] for line in found}
    assert (sizes[1], sizes[4], sizes[12]) == (32, 48, 48)
    assert next(line for line in found if line["line"] == 4)["seed"] == 2**63 + 1
    assert len({line["sha256"] for line in found}) == len(found) - len(FAILED) + 1  # and None
    assert not list((alone / ".ldm-batch/blocks").glob("*.part"))


def test_a_picture_is_what_its_recipe_says(place: Path, alone: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(place / "model", device="cpu")
    for number in (2, 11, 14):
        path = alone / next(line for line in lines(alone) if line["line"] == number)["file_name"]
        recipe = read_recipe(path)
        pipe.adapters.unload_loras()
        pipe.adapters.load_again(recipe.loras, ())
        drawn = np.asarray(pipe.draw([recipe]).images[0]).astype(int)
        assert np.abs(drawn - np.asarray(Image.open(path))).max() <= 1


def test_a_finished_run_has_nothing_left_to_do(
    place: Path, alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (alone / MANIFEST).stat().st_mtime_ns
    monkeypatch.setattr(TextToImagePipeline, "draw_each", None)
    assert batch(place, alone) == 1
    said = capsys.readouterr()
    assert said.out.strip() == str(alone / MANIFEST) and "nothing was left to do" in said.err
    assert "rows.jsonl, line 5: " in said.err and (alone / MANIFEST).stat().st_mtime_ns == before


# Deaths

Life = Callable[[], object]


def died(life: Life) -> bool:
    """Live in a forked process, which may kill itself; returns whether it did."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            life()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def die_at(name: str, number: int, life: Life) -> Life:
    """Die at the call of that number of a function of `os`, half of the time after it."""

    def living() -> None:
        function, left = getattr(os, name), [number]

        def dying(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            given = function(*arguments, **named)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return given

        setattr(os, name, dying)
        life()

    return living


@pytest.mark.parametrize("form", [(), ("--format", "wds", "--shard", "4")], ids=["files", "wds"])
def test_deaths_at_every_step_change_nothing(
    place: Path, alone: Path, tmp_path: Path, form: tuple[str]
) -> None:
    whole = alone
    if form:
        whole = tmp_path / "whole"
        assert batch(place, whole, *form) == 1
    out, deaths = tmp_path / "killed", 0
    for turn in range(200):  # each life comes a little further: to a renaming, or to something on the disk
        name, number = (("fsync", turn % 7 + 1), ("replace", turn % 3 + 1))[turn % 2]
        if not died(die_at(name, number, lambda: batch(place, out, *form))):
            break
        deaths += 1
    assert deaths > 12 and state(out) == state(whole)
    assert not [path for path in out.rglob("*.tmp")] and not list(out.rglob(".*.tmp"))


def test_a_record_that_was_half_written_is_cut_off(place: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert died(die_at("fsync", 25, lambda: batch(place, out)))
    part = next((out / ".ldm-batch/blocks").glob("*.part"))
    with part.open("ab") as file:
        file.write(b'[{"item": 3, "error": nu\0\0\0\0')
    assert batch(place, out) == 1 and state(out) == state(alone)


def test_two_that_join_share_the_work(place: Path, alone: Path, tmp_path: Path) -> None:
    out, pids = tmp_path / "out", list[int]()
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            os._exit(batch(place, out, "--join"))
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [1, 1]
    assert state(out) == state(alone)


def test_a_second_run_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, told = tmp_path / "out", os.pipe()
    pid = os.fork()
    if pid == 0:
        Ledger(out).enter(join=False)
        os.write(told[1], b".")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(told[0], 1)
        assert batch(place, out) == 2
        assert "--join" in capsys.readouterr().err and not (out / MANIFEST).exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert batch(place, out) == 1  # the claim ended with its process


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_processes_share_the_work(place: Path, alone: Path, tmp_path: Path, engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    how = ["--steps", "2", "--together", "2", "--workers", "3", "--quiet", "--model", str(place / "model")]
    how += ["--engine", engine]
    script = [sys.executable, "scripts/batch.py", str(place / "rows.jsonl"), "--out", str(tmp_path / "out")]
    done = subprocess.run([*script, *how], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert state(tmp_path / "out") == state(alone)


# Troubles


def test_another_command_is_not_the_same_run(
    place: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(alone)
    changed = write_rows(place / "changed.jsonl", [*ROWS, {"prompt": "a dog"}])
    for more, rows, said in (
        (("--guidance-scale", "3"), None, "settings"),
        (("--together", "3"), None, "together"),
        (("--format", "wds"), None, "format"),
        ((), changed, "the rows have changed"),
    ):
        assert batch(place, alone, *more, rows=rows) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and "another folder" in error
    assert state(alone) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / MANIFEST).write_bytes(b"mine")
    assert batch(place, foreign) == 2 and "something else" in capsys.readouterr().err
    assert (foreign / MANIFEST).read_bytes() == b"mine"
    assert batch(place, tmp_path / "wrong", "--eta", "2") == 1  # of which nothing is drawn, and it gives way
    assert batch(place, tmp_path / "wrong") == 1 and state(tmp_path / "wrong") == state(alone)
    capsys.readouterr()
    (tmp_path / "file").write_bytes(b"")
    assert batch(place, tmp_path / "file") == 2 and "can't write" in capsys.readouterr().err


def test_a_disk_that_fills_within_a_record_leaves_none_of_it(tmp_path: Path) -> None:
    """Of a record longer than the room that is left, no part stays behind, whoever writes it once more."""
    ledger = Ledger(tmp_path / "out")
    ledger.begin({"items": 2, "block size": 2, "blocks": 1, "threads": 1})
    record = {"item": 0, "file_name": None, "error": "a" * 20_000, "where": "", "time": 0.0}
    ledger.add(0, [{**record, "error": "short"}])
    code = """
import resource, signal, sys
from pathlib import Path
from pipelines.batch.ledger import Ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    Ledger(Path(sys.argv[1])).add(0, [{"item": 1, "file_name": None, "error": "a" * 20_000, "where": "", "time": 0.0}])
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "UserError"
    assert list(ledger.begun(0)) == [0]
    ledger.add(0, [{**record, "item": 1}])
    assert list(ledger.begun(0)) == [0, 1]
    ledger.close()


def test_a_full_disk_costs_a_line_and_nothing_that_is_drawn(
    place: Path,
    alone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsync, left = os.fsync, [0]

    def full(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(number)

    for turn in range(100):
        with monkeypatch.context() as patch:
            left[0] = turn % 9
            patch.setattr(os, "fsync", full)
            if batch(place, tmp_path / "out") != 2:
                break
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "No space left" in error
    assert turn > 5 and state(tmp_path / "out") == state(alone)


@pytest.mark.parametrize("form", [(), ("--format", "wds", "--shard", "4")], ids=["files", "wds"])
def test_what_is_gone_is_drawn_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: tuple[str]
) -> None:
    out = tmp_path / "out"
    assert batch(place, out, *form) == 1
    before = state(out)
    paths = sorted(path for kind in ("images", "shards") for path in (out / kind).rglob("*.*"))
    paths[1].unlink()
    capsys.readouterr()
    assert batch(place, out, *form) == 1
    said = capsys.readouterr().err
    assert "gone" in said and paths[1].name in said and state(out) == before


@pytest.mark.parametrize("form", [(), ("--format", "wds")], ids=["files", "wds"])
def test_a_row_that_failed_is_drawn_on_wish(place: Path, tmp_path: Path, form: tuple[str]) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a cat"}, {"prompt": "a cat", "image": "later.png"}]
    )
    assert batch(place, tmp_path / "out", *form, rows=rows) == 1
    (tmp_path / "later.png").write_bytes((place / "one.png").read_bytes())
    assert batch(place, tmp_path / "out", "--join", "--retry", rows=rows) == 2
    assert batch(place, tmp_path / "out", *form, "--retry", "--contact-sheet", rows=rows) == 0
    found = lines(tmp_path / "out")
    assert [line["error"] for line in found] == [None, None]
    assert batch(place, tmp_path / "whole", *form, rows=rows) == 0
    # The first row was drawn without the second beside it, which its last bits may show.
    assert found[1]["sha256"] == lines(tmp_path / "whole")[1]["sha256"]
    for line, other in zip(found, lines(tmp_path / "whole"), strict=True):
        drawn = [
            np.asarray(picture_of(tmp_path / out, each["file_name"])).astype(int)
            for out, each in (("out", line), ("whole", other))
        ]
        assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_strict_check_and_retry(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    rows = write_rows(place / "later.jsonl", [{"prompt": "a cat"}, {"prompt": "a cat", "image": "later.png"}])
    assert batch(place, out, "--check", rows=rows) == 1 and not out.exists()
    assert "later.jsonl, line 2: image" in capsys.readouterr().err
    assert batch(place, out, "--strict", rows=rows) == 2
    error = capsys.readouterr().err
    assert "later.jsonl, line 2: image" in error and not (out / MANIFEST).exists()
    assert batch(place, out, rows=rows) == 1 and len(lines(out)) == 2
    (place / "later.png").write_bytes((place / "one.png").read_bytes())
    assert batch(place, out, rows=rows) == 1
    assert batch(place, out, "--retry", rows=rows) == 0
    assert [line["error"] for line in lines(out)] == [None, None]


def test_a_fault_of_ours_is_no_row_s(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldm.models.unet import UNet

    forward, limit = UNet.forward, [0]

    def small(self: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
        if x.shape[-1] > 16 or len(x) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB" if limit[0] else "a bug")
        return forward(self, x, *more)

    rows = write_rows(place / "large.jsonl", [{"prompt": "a cat", "width": width} for width in (32, 80, 32)])
    monkeypatch.setattr(UNet, "forward", small)
    with pytest.raises(RuntimeError, match="a bug"):
        batch(place, tmp_path / "out", rows=rows)
    limit[0] = 1
    assert batch(place, tmp_path / "out", rows=rows) == 1
    found = lines(tmp_path / "out")
    assert [bool(line["error"]) for line in found] == [False, True, False] and "out of memory" in found[1][
        "error"
    ]


# What a user expects


def test_a_seed_is_of_its_row_alone(tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": "a", "id": "x", "count": 2}, {"prompt": "b"}])
    more = write_rows(
        tmp_path / "more.jsonl",
        [{"prompt": "a", "id": "y"}, {"prompt": "b"}, {"prompt": "c", "id": "x", "count": 3}],
    )
    seeds = [[item.seed(None) for item in items_of(path)] for path in (few, more)]
    assert seeds[0] == [seeds[1][2], seeds[1][3], seeds[1][1]]
    assert len(set(seeds[1])) == 5 and all(0 <= seed < 2**32 for seed in seeds[1])
    item = list(items_of(few))[1]
    assert item.seed(7) == 8 and item.seed("seven") == "seven"


def test_kinds_of_files_defaults_and_wildcards(place: Path, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words/animal.txt").write_text("cat\ndog\n")
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,seed,guidance_scale\n{a|the} __animal__,3,1.5\n{a|the} __animal__,4,\n")
    more = ("--wildcards", str(tmp_path / "words"), "--guidance-scale", "2", "--contact-sheet", "--plot")
    assert batch(place, tmp_path / "out", *more, rows=rows) == 0
    found = lines(tmp_path / "out")
    assert [line["seed"] for line in found] == [3, 4]
    assert [json.loads(line["settings"])["guidance_scale"] for line in found] == [1.5, 2.0]
    assert all(line["prompt"] in ("a cat", "a dog", "the cat", "the dog") for line in found)
    assert Image.open(tmp_path / "out/contact-sheet.png").size == (2 * 96, 96)
    (tmp_path / "prompts.txt").write_text("a cat {x}\na dog\n")
    assert batch(place, tmp_path / "text", "--seed", "9", rows=tmp_path / "prompts.txt") == 0
    assert [(line["prompt"], line["seed"]) for line in lines(tmp_path / "text")] == [
        ("a cat {x}", 9),
        ("a dog", 9),
    ]
    assert batch(place, tmp_path / "out", "--wildcards", rows=rows) == 2  # other words


def test_shards_are_what_our_training_reads(place: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert batch(place, out, "--format", "wds", "--shard", "4", "--contact-sheet") == 1
    shards = sorted((out / "shards").glob("*.tar"))
    assert len(shards) == 4
    listing, _ = list_shards(out, shards, "caption", {})
    drawn = [line for line in lines(out) if not line["error"]]
    assert [(each.name, each.captions) for each in listing.entries] == [
        (line["file_name"], (line["prompt"],)) for line in drawn
    ]
    assert not listing.broken and not list((out / ".ldm-batch/waiting").rglob("*.png"))
    for each, line in zip(listing.entries, drawn, strict=True):
        assert hashlib.sha256(each.content()).hexdigest() == line["sha256"]
    assert [line["sha256"] for line in lines(out)] == [line["sha256"] for line in lines(alone)]


def test_bad_options_cost_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (
        ("--together", "0"),
        ("--workers", "-1"),
        ("--lora", "none.safetensors"),
        ("--wildcards", "none"),
        ("--negative-prompt", "a\udcff"),
    ):
        assert batch(place, tmp_path / "out", *more) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert batch(place, tmp_path / "out", rows=tmp_path / "none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_names_that_are_no_unicode(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d\udcff"
    folder.mkdir()
    (folder / "one.png").write_bytes((place / "one.png").read_bytes())
    rows = write_rows(
        folder / "rows.jsonl", [{"prompt": "a", "image": "none.png"}, {"prompt": "a", "image": "one.png"}]
    )
    assert batch(place, folder / "out", rows=rows) == 1
    assert [bool(line["error"]) for line in lines(folder / "out")] == [True, True]
    assert batch(place, folder / "out", rows=write_rows(rows, [{"prompt": "a"}])) == 0


def test_no_machine_begins_a_run_beside_the_one_it_should_join(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is in"):
        Work.joined(Setup(place / "rows.jsonl", tmp_path / "elsewhere", model=str(place / "model")))
    assert not (tmp_path / "elsewhere").exists()


def test_a_damaged_folder_costs_a_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a cat"}]), tmp_path / "out"
    assert batch(place, out, rows=rows) == 0
    for path, content in (
        (".ldm-batch/run.json", "{}"),
        (".ldm-batch/blocks/000000.done", "{}\n"),
        (MANIFEST, "no parquet"),
    ):
        before = (out / path).read_bytes()
        (out / path).write_text(content)
        capsys.readouterr()
        assert batch(place, out, "--contact-sheet", rows=rows) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and path.rpartition("/")[2] in error
        (out / path).write_bytes(before)
    assert batch(place, out, rows=rows) == 0


def test_progress_is_a_line_a_minute_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress(1000, 100, 5, clock=lambda: now[0], terminal=False)
    for second in range(1, 121):
        now[0] = second
        progress.add([{"error": None}, {"error": "no"} if second == 7 else {"error": None}])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "219 of 1,000 drawn, 6 failed, 775 left; 2 pictures a second; 6 min 28 s left",
        "339 of 1,000 drawn, 6 failed, 655 left; 2 pictures a second; 5 min 28 s left",
    ]
    assert (
        progress.end()
        == "1,000 pictures: 339 drawn, 6 failed; 240 of them now, in 2 min 0 s, 2 pictures a second"
    )
    assert [duration(s) for s in (0.4, 61, 200, 7000)] == ["0 s", "61 s", "3 min 20 s", "1 h 56 min"]
    Progress(1, shown=False, clock=lambda: now[0]).add([{"error": None}])
    assert not capsys.readouterr().err


def test_the_same_from_python(place: Path, alone: Path, tmp_path: Path) -> None:
    setup = Setup(
        place / "rows.jsonl",
        tmp_path / "out",
        {"num_inference_steps": 2},
        model=str(place / "model"),
        together=2,
    )
    made = runs.run(setup, workers=1, verbose=False)
    assert (made.drawn, made.failed) == (11, 6) and state(tmp_path / "out") == state(alone)
    with pytest.raises(UserError, match="rows have changed"):
        runs.run(Setup(place / "one.txt", tmp_path / "out", model=str(place / "model")), workers=1) if (
            place / "one.txt"
        ).write_text("a cat") else None
