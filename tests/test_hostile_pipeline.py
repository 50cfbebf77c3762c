"""Threads, forks, strangers' pictures, streams and counts: one line, and every picture with the recipe that drew it."""

import copy
import errno
import io
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline_folder

from ldm import console
from ldm.errors import UserError
from ldm.pictures import LARGEST_SHEET, grid_size
from pipelines import TextToImagePipeline
from pipelines import cli as generate
from pipelines.recipe import Recipe, read_recipe, recipes_for
from pipelines.trust import on_network

ROOT = Path(__file__).resolve().parents[1]
DRAW: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "latent", "progress": False}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
QUERIES = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("model"), "sd1")


@pytest.fixture
def pipe(model: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(model, device="cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    layers = {
        f"{QUERIES}{q}.lora_{h}.weight": torch.randn(*size)
        for q in "qkv"
        for h, size in (("A", (4, 64)), ("B", (64, 4)))
    }
    save_file(layers, path)
    return path


def beside(work: Callable[[], None], other: Callable[[], None]) -> None:
    """Run `work` while another thread does `other` again and again."""
    stop = threading.Event()

    def again() -> None:
        while not stop.is_set():
            other()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()


# Turns


def test_recipes_name_what_drew_beside_a_thread_that_loads(pipe: TextToImagePipeline, lora: Path) -> None:
    plain = pipe("a cat", **DRAW).images
    pipe.adapters.load_lora(lora)
    changed = pipe("a cat", **DRAW).images
    pipe.adapters.unload_loras()
    assert not torch.equal(plain, changed)

    def toggle() -> None:
        pipe.adapters.load_lora(lora)
        time.sleep(0.002)
        pipe.adapters.unload_loras()
        time.sleep(0.002)

    def work() -> None:
        for _ in range(10):
            output = pipe("a cat", **DRAW)
            assert torch.equal(output.images, changed if output.recipes[0].loras else plain)

    beside(work, toggle)


@pytest.mark.parametrize("single", [False, True])
def test_what_is_saved_beside_a_merge_is_merged_or_not(
    pipe: TextToImagePipeline, lora: Path, tmp_path: Path, single: bool
) -> None:
    def saved() -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is saved of adapters
            if single:
                pipe.save_single_file(tmp_path / "one.safetensors")
                return load_file(tmp_path / "one.safetensors")
            pipe.save_pretrained(tmp_path / "folder")
            return load_file(tmp_path / "folder" / WEIGHTS)

    pipe.adapters.load_lora(lora)
    plain = saved()
    pipe.adapters.merge()
    merged = saved()
    pipe.adapters.unmerge()
    differ = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert len(differ) == 3  # to_q, to_k and to_v

    def toggle() -> None:
        pipe.adapters.merge()
        pipe.adapters.unmerge()

    def work() -> None:
        for _ in range(8):
            found = saved()
            assert len({torch.equal(found[name], merged[name]) for name in differ}) == 1

    beside(work, toggle)


def test_a_lora_that_fails_half_way_leaves_nothing(
    pipe: TextToImagePipeline, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipe("a cat", **DRAW).images

    def fail(self: object, parts: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.adapters.Adapters._place", fail)
        with pytest.raises(RuntimeError):
            pipe.adapters.load_lora(lora, 100.0)
    assert torch.equal(pipe("a cat", **DRAW).images, plain)
    assert pipe.adapters.load_lora(lora) == "style"


def test_a_callback_may_look_but_not_change(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    def look(owner: TextToImagePipeline, *state: Any) -> None:
        assert owner.complete(Recipe("a dog", seed=1)).recipe.sampler

    pipe("a cat", callback_on_step_end=look, **DRAW)
    for change in (
        lambda: pipe.save_pretrained(tmp_path / "m"),
        lambda: pipe.save_single_file(tmp_path / "m"),
    ):
        with pytest.raises(UserError, match="can't use the pipeline that called it"):
            pipe("a cat", callback_on_step_end=lambda *state: change(), **DRAW)  # noqa: B023
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_say_why_not(pipe: TextToImagePipeline, how: Callable[[Any], Any]) -> None:
    with pytest.raises(
        TypeError, match=r"^a pipeline can't be copied or pickled: load it .*from_pretrained.*$"
    ):
        how(pipe)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_draws_the_same(pipe: TextToImagePipeline) -> None:
    expected = pipe("a cat", **DRAW).images
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send_bytes(_drawn(pipe)))
    process.start()
    assert ours.poll(60), "the forked process hangs"
    drawn = torch.frombuffer(bytearray(ours.recv_bytes()), dtype=torch.float32)
    process.join(10)
    # Not bit for bit: sums in one thread and in several differ.
    torch.testing.assert_close(drawn, expected.flatten().float(), atol=1e-4, rtol=1e-4)


def _drawn(pipe: TextToImagePipeline) -> bytes:
    return pipe("a cat", **DRAW).images.float().numpy().tobytes()


# Strangers' pictures


def picture(path: Path, **recipe: Any) -> Path:
    kind = Recipe(**{"prompt": "a cat", "seed": 1, "num_inference_steps": 2, **recipe})
    Image.new("RGB", (8, 8)).save(path, pnginfo=kind.png_info())
    return path


def again(png: Path, *more: str) -> int:
    return generate.main(["--from-image", str(png), "--quiet", "--out", str(png.with_name("new.png")), *more])


def test_a_pictures_files_are_loaded_where_the_user_allows_it(
    model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.uses import LoRAUse

    png = picture(tmp_path / "p.png", model=str(model), loras=(LoRAUse(str(lora)),))
    for allowed in ([], ["--trust", str(model)], ["--trust", str(lora.parent)], ["--model", str(model)]):
        assert again(png, *allowed) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--trust FOLDER" in error
        assert (str(lora) in error) == (str(lora.parent) not in allowed)
    assert not (tmp_path / "new.png").exists()
    for allowed in (["--trust"], ["--trust", str(model), "--trust", str(lora.parent)]):
        assert again(png, *allowed) == 0
        error = capsys.readouterr().err
        assert str(model) in error and str(lora) in error  # said what is loaded
        assert [each.path for each in read_recipe(tmp_path / "new.png").loras] == [str(lora)]
    assert again(png, "--model", str(model), "--lora", str(lora)) == 0  # what the user names needs no leave
    assert "has loaded" not in capsys.readouterr().err
    link = tmp_path / "inside" / "link.safetensors"
    link.parent.mkdir()
    link.symlink_to(lora)
    png = picture(tmp_path / "q.png", model=str(model), loras=(LoRAUse(str(link)),))
    assert again(png, "--model", str(model), "--trust", str(link.parent)) == 2  # it leads out of the folder


@pytest.mark.parametrize(
    "name",
    [
        "evil-org/evil-model",
        r"\\evil\share\m",
        "//evil/share/m",
        r"/\evil\m",
        "https://evil/m",
        "file:///etc/m",
    ],
)
def test_nothing_is_asked_of_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *each, **more: asked.append(each))
    png = picture(tmp_path / "p.png", model=name)
    for allowed in ([], ["--trust"], ["--trust", "/"]):
        assert again(png, *allowed) == 2
        error = capsys.readouterr().err
        assert "error: " in error and error.count("\n") == 1
    assert not asked
    assert on_network(name) == ("org" not in name)
    assert not any(map(on_network, ("/a/b", "a/b", r"C:\a", "C:/a", "a:1.safetensors")))


def test_the_bundled_model_needs_no_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ldm.system import bundled_model

    for name in (None, str(bundled_model().resolve())):
        assert again(picture(tmp_path / "p.png", model=name, height=32, width=32)) == 0
    assert again(picture(tmp_path / "p.png", variant="../../x")) == 2
    assert "for a variant" in capsys.readouterr().err
    assert generate.main(["a cat", "--trust"]) == 2


# Counts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-images", str(10**12)], "more than the 1,000,000 of one run"),
        (["--num-images", "9" * 4000], "of about 4,000 digits pictures are more"),
        (["--num-images", "9" * 5000], "invalid int value"),
        (["--columns", str(10**9), "--grid", "g.png"], "fewer columns"),
        (["--num-images", "20000", "--grid", "g.png", "--height", "16384"], "a grid of 20,000 pictures"),
        (["--seed", "9" * 400], "the seed of about 400 digits does not fit in 64 bits"),
        (["--seed", str(2**64 - 1), "--num-images", "2"], "does not fit in 64 bits"),
        (["--steps", "9" * 400], "num_inference_steps"),
        (["--height", "9" * 400], "height of about 400 digits is not a multiple"),
        (["--clip-skip", "9" * 400], "clip_skip is of about 400 digits"),
        (["--negative-prompt", "x" * 5_000_000], "has 5,000,000 characters, where 20,000 are the most"),
        (["--negative-prompt", "cat , " * 3000], "tokens, where 8,192 are the most"),
    ],
)
def test_absurd_sizes_are_refused_before_drawing(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if words.endswith("most") and "tokens" in words:
        arguments = ["--negative-prompt", "<! ? ;" * 3300]
    started = time.perf_counter()
    try:
        assert generate.main(["a cat", "--model", str(model), "--quiet", *arguments]) == 2
    except SystemExit as end:  # argparse's
        assert end.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and len(error) < 2100
    assert time.perf_counter() - started < 20 and not list(tmp_path.rglob("*.png"))


def test_a_large_batch_and_few_pictures(model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model), "--steps", "1", "--quiet", "--num-images", "3", "--seed", "4"]
    assert generate.main(["a cat", *arguments, "--batch-size", str(10**30), "--out", str(tmp_path)]) == 0
    assert [read_recipe(each).seed for each in sorted(tmp_path.glob("*.png"))] == [4, 5, 6]


def test_counts_of_python_are_bounded_too(pipe: TextToImagePipeline) -> None:
    with pytest.raises(UserError, match="more than the 1,000,000 of one call"):
        recipes_for("a", None, 0, 10**12, {})
    for settings in (
        {"seed": 10**5000},
        {"height": 10**5000},
        {"num_inference_steps": 10**5000},
        {"guidance_scale": 10**400},
        {"num_images_per_prompt": 10**5000},
    ):
        with pytest.raises(UserError) as caught:
            pipe("a cat", **settings)
        assert len(str(caught.value)) < 300 or "guidance_scale" in settings
    assert grid_size(10, 4, 3, 5) == (12, 15)
    with pytest.raises(UserError, match="fewer columns"):
        grid_size(1, LARGEST_SHEET + 1, 1, 1)


# Streams


@pytest.mark.parametrize(
    "kind",
    [
        "ascii",
        "full",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("cp1252", "closed", "error full", "error closed")
        ),
    ],
)
def test_a_stream_that_takes_no_more_ends_no_batch(model: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "rows.txt").write_text("a 猫\na cat\n", encoding="utf-8")
    arguments = f"--file {tmp_path}/rows.txt --model {model} --steps 1 --quiet --out {tmp_path}/out"
    ends = {
        "full": ">/dev/full",
        "closed": ">&-",
        "error closed": "2>&-",
        "error full": "2>/dev/full",
    }
    if "full" in kind and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    encoding = {"PYTHONIOENCODING": kind} if kind not in ends else {}
    run = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} {ROOT}/scripts/generate.py {arguments} {ends.get(kind, '')}"],
        env={**os.environ, **encoding},
        capture_output=True,
        timeout=120,
    )
    error = run.stderr.decode("ascii")
    assert (run.returncode, len(list((tmp_path / "out").glob("*.png")))) == (0, 2), error
    assert error.splitlines() == (
        ["note: standard output takes no more (No space left on device): nothing more is printed there"]
        if kind == "full"
        else []
    )
    if not ends.get(kind, "").startswith(">"):
        named = run.stdout.decode("ascii" if kind in ("ascii", "cp1252") else "utf-8").splitlines()
        assert len(named) == 2 and ("\\u732b" in named[0]) == (kind in ("ascii", "cp1252"))


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def ended(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command that does `work`."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    @console.command(stopped="stopped here", memory="take less")
    def main() -> int:
        return work() or 0

    status = main()
    assert (sys.stdout, sys.stderr) == (out, err)
    return status, out.getvalue(), err.getvalue()


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("a\x1b[2J\nb"), 2, "error: a\\x1b[2J\\nb\n"),
        (KeyboardInterrupt(), 130, "stopped here\n"),
        (MemoryError(), 2, "error: out of memory: take less\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "error: out of memory: take less\n"),
        (RuntimeError("std::bad_alloc"), 2, "error: out of memory: take less\n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "error: out of memory: take less\n"),
        (caused(UserError("m is corrupt"), MemoryError()), 2, "error: m is corrupt (out of memory)\n"),
        (OSError(errno.EROFS, "Read-only file system", "a\nb"), 2, "error: a\\nb: Read-only file system\n"),
        (UserError("x" * 10**6), 2, f"error: {'x' * 1593} ... {'x' * 390}\n"),
    ],
)
def test_every_end_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str
) -> None:
    assert ended(monkeypatch, raising(error)) == (status, "", words)


def test_a_bug_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        ended(monkeypatch, raising(KeyError("ours")))


def test_what_is_printed_is_escaped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    def work() -> None:
        console.line("a\x1b[2J\n\udc83é猫")
        console.note("n\r\x07")
        warnings.warn("w\n\x1b]0;x\x07", stacklevel=1)
        print("table\tof\nours \x9b2J")
        tqdm.write("t\x1b[1A")
        with tqdm(total=2, desc="bar \x1b[2J", file=sys.stderr, mininterval=0) as bar:
            bar.update()

    status, out, err = ended(monkeypatch, work)
    assert status == 0
    assert out == "a\\x1b[2J\\n\\udc83é猫\ntable\tof\nours \\x9b2J\nt\\x1b[1A\n"
    assert err.startswith("note: n\\r\\x07\nwarning: w\\n\\x1b]0;x\\x07\n")
    assert "\rbar \\x1b[2J:" in err and "\x1b[2J" not in err and "\x07" not in err


def test_a_full_stream_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Full(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    @console.command()
    def main() -> int:
        for _ in range(3):
            console.line("a")
        return 0

    assert main() == 0
    assert err.getvalue().count("\n") == 1 and "No space left on device" in err.getvalue()


# Every command line


COMMANDS = ("generate", "train", "finetune", "evaluate", "benchmark", "prepare_data")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_costs_one_line_and_no_import(name: str, tmp_path: Path) -> None:
    """Arguments are read before torch is imported, so `--help` is quick; a bad one is escaped."""
    program = (
        f"import runpy, sys; sys.argv = ['x', '--nonsense\\x1b[2J\\n']\n"
        f"try: runpy.run_path({str(ROOT / 'scripts' / name)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2 and 'torch' not in sys.modules, end.code"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and "\x1b" not in run.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("evaluate", ["--prompts", str(10**12)]),
        ("evaluate", ["--config", "missing.yaml"]),
        ("benchmark", ["parts", "--pictures", "-1"]),
        ("benchmark", ["parts", "--rounds", str(10**12)]),
        ("benchmark", ["training"]),
        ("benchmark", ["parts", "--model", "missing"]),
        ("prepare_data", ["--pictures", str(10**12)]),
        ("prepare_data", ["--config", "missing.yaml"]),
        ("train", ["--config", "missing.yaml"]),
    ],
)
def test_mistakes_of_the_other_commands(
    name: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    status = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]()
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_during_the_imports(tmp_path: Path) -> None:
    """A module of the heavy ones sends the signal while it is imported."""
    (tmp_path / "torch.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(signal.SIGINT)})\ntime.sleep(5)\n"
    )
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate.py"), "a cat"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (run.returncode, run.stderr) == (130, "stopped; what is written is whole\n")


def test_recipes_that_are_nested_or_huge_cost_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL.PngImagePlugin import PngInfo

    for text in ("[" * 100_000, json.dumps({"prompt": "a", "model": "a" * 10**5}), json.dumps(["a"])):
        info = PngInfo()
        info.add_itxt("ldm-recipe", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "p.png", pnginfo=info)
        for allowed in ([], ["--trust"]):
            assert again(tmp_path / "p.png", *allowed) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and len(error) < 2100
