"""Training and writing on a machine that fails: states that don't fit, full disks, kills, signals, two runs at once."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import TOY, Toy, state

import ldm.files
from ldm.checkpoints.files import write_tensors
from ldm.checkpoints.folder import whole_folder
from ldm.errors import UserError
from ldm.files import replaced_folder, whole_file, write_text
from ldm.training.folders import held
from ldm.training.loop import Trainer
from ldm.training.optimization import odd_moments
from ldm.training.state import newest
from ldm.training.stop import noted_signals, raised_signals

Tensors = dict[str, torch.Tensor]


def in_a_child(act: Callable[[], object]) -> int:
    """Run it in a process of its own; the exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# States


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 64 pictures that nothing happened to, with a state in its middle."""
    folder = tmp_path_factory.mktemp("whole")
    assert Trainer(Toy(), replace(TOY, save_every=32), folder).run()
    return folder


def spoiled(whole: Path, folder: Path, spoil: Callable[[Tensors, dict[str, str]], object]) -> Path:
    """A copy of a run's states, the newest with other content."""
    first, last = sorted(whole.glob("state-*"))
    (folder / first.name).write_bytes(first.read_bytes())
    with safe_open(last, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(last)
    spoil(tensors, metadata)
    save_file(tensors, folder / last.name, metadata)
    return folder / last.name


A = "optimizer.0.weight."


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t, m: t.update({A + "exp_avg": torch.ones(1)}), r"0.weight.exp_avg is \(1,\).* for \(4, 3\)"),
        (lambda t, m: t.update({A + "exp_avg_sq": torch.ones(5, 3)}), r"exp_avg_sq is \(5, 3\)"),
        (lambda t, m: t.update({A + "exp_avg": torch.ones(3, 4)}), r"exp_avg is \(3, 4\)"),
        (lambda t, m: t.update({A + "exp_avg": torch.ones(4, 3).double()}), "torch.float64 for"),
        (lambda t, m: t.update({A + "exp_avg_sq": -torch.ones(4, 3)}), "exp_avg_sq is negative"),
        (lambda t, m: t.update({A + "exp_avg": torch.full((4, 3), torch.nan)}), "NaN .*0.weight.exp_avg"),
        (lambda t, m: t.update({A + "step": torch.tensor(0.0)}), "step is 0 after 64"),
        (lambda t, m: t.update({A + "step": torch.ones(4)}), r"step is \(4,\)"),
        (lambda t, m: t.update({A + "max_exp_avg_sq": torch.ones(4, 3)}), "it has 21 tensors and says 20"),
        (lambda t, m: [t.pop(k) for k in list(t) if k.startswith("optim")], "it has .* tensors and says"),
        (lambda t, m: (t.pop(A + "step"), m.update(tensors=str(len(t)))), "step is missing"),
        (lambda t, m: t.update({"model.0.weight": torch.ones(4, 3).half()}), "weight is torch.float16"),
        (lambda t, m: t.update({"ema.0.weight": torch.ones(3, 4)}), r"other weights.*ema.0.weight"),
        (lambda t, m: m.update(seen="63"), "another state's copy"),
        (lambda t, m: m.update(seen="9" * 5000), "damaged, or no state"),
        (lambda t, m: m.update(best="nan"), "best loss nan"),
        (lambda t, m: m.update(scaler="[" * 5000), r"\.safetensors"),
        (lambda t, m: m.update(scaler='{"scale": "x"}'), "gradient scaler"),
        (lambda t, m: m.pop("best"), "no state of a run"),
        (lambda t, m: m.clear(), "no state of a run"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    whole: Path, tmp_path: Path, spoil: Callable[[Tensors, dict[str, str]], object], said: str
) -> None:
    """And the older one is named, from which the run ends with the bits of one that nothing happened to."""
    bad = spoiled(whole, tmp_path, spoil)
    trainer = Trainer(Toy(), TOY, tmp_path)
    before = [each.clone() for each in trainer.plain.parameters()]
    trainer.step = lambda: pytest.fail("a step was made")  # type: ignore[method-assign]
    with pytest.raises(UserError, match=said) as caught:
        trainer.run()
    assert f"000032.safetensors beside it is whole: delete {bad.name}" in str(caught.value)
    assert "\n" not in str(caught.value) and not trainer.optimizer.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.plain.parameters(), strict=True))


def test_what_a_library_keeps_of_a_parameter_is_what_it_would_make() -> None:
    """As bitsandbytes' optimizers do: eight bits, and a scale for each block of their version's size."""

    class Blocks(torch.optim.SGD):
        def init_state(self, group: dict, parameter: torch.Tensor, *place: int) -> None:  # type: ignore[type-arg]
            assert parameter is group["params"][place[1]]
            eight = torch.zeros_like(parameter, dtype=torch.uint8)
            self.state[parameter] = {"step": 0, "state1": eight, "absmax1": torch.zeros(3)}

    parameter = torch.nn.Parameter(torch.zeros(2, 300))
    optimizer = Blocks([torch.nn.Parameter(torch.zeros(1)), parameter])
    good = {
        "step": torch.tensor(3),
        "state1": torch.zeros(2, 300, dtype=torch.uint8),
        "absmax1": torch.ones(3),
    }
    assert odd_moments(optimizer, parameter, good, 8) == [] and not optimizer.state
    assert odd_moments(optimizer, parameter, good | {"absmax1": torch.ones(2)}, 8)[0].startswith(
        "absmax1 is (2,)"
    )
    assert odd_moments(optimizer, parameter, good | {"state1": torch.zeros(2, 300)}, 8)


def test_a_cut_state_is_refused_and_without_it_the_run_goes_on_to_the_same_bits(
    whole: Path, tmp_path: Path
) -> None:
    bad = spoiled(whole, tmp_path, lambda t, m: None)
    bad.write_bytes(bad.read_bytes()[:-7])
    (tmp_path / "state-best.safetensors").write_bytes(b"one's own")  # no state of the run's
    with pytest.raises(UserError, match=f"000032.safetensors beside it is whole: delete {bad.name}"):
        Trainer(Toy(), TOY, tmp_path).run()
    bad.unlink()
    assert Trainer(Toy(), TOY, tmp_path).run()
    one, other = state(whole), state(tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# The machine


def no_memory(seen: int) -> None:
    if seen == 24:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


def full(seen: int) -> None:
    if seen == 24:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "drawn.png")


@pytest.mark.parametrize(
    ("meddle", "said"),
    [
        (no_memory, "out of memory after 24 pictures: make loop.batch_size"),
        (full, "drawn.png: No space left"),
    ],
)
def test_what_was_trained_is_saved_before_the_machines_fault_is_told(
    whole: Path, tmp_path: Path, meddle: Callable[[int], None], said: str
) -> None:
    with pytest.raises(
        UserError, match=f"{said}.*; all 24 pictures are saved: run the same command"
    ) as caught:
        Trainer(Toy(meddle=meddle), TOY, tmp_path).run()
    assert "\n" not in str(caught.value)
    assert Trainer(Toy(), TOY, tmp_path).run()
    one, other = state(whole), state(tmp_path)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_at_a_line_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    def fill(seen: int) -> None:
        if seen == 16:
            log.unlink()
            log.symlink_to("/dev/full")

    with pytest.raises(
        UserError, match=r"can't write .*log.jsonl: No space left .* all 24 pictures are saved"
    ):
        Trainer(Toy(meddle=fill), TOY, tmp_path).run()


def test_a_full_disk_at_a_state_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(*names: object) -> None:
        calls.append(names)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = replace(TOY, save_every=24)
    trainer = Trainer(
        Toy(meddle=lambda s: monkeypatch.setattr(os, "replace", failing) if s == 40 else None),
        config,
        tmp_path,
    )
    with pytest.raises(
        UserError, match=r"No space left .*; .*state-0{10}24.safetensors is whole: run the same"
    ):
        trainer.run()
    assert len(calls) == 1  # not tried once more
    assert [each.name for each in tmp_path.glob("*state*")] == ["state-000000000024.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_grows_too_large_leaves_the_old_one(tmp_path: Path) -> None:
    """Of the system's own error, in the middle of a writing by a library."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(8)})
    before = path.read_bytes()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(UserError, match=r"can't write .*a.safetensors"):
            write_tensors(path, {"a": torch.zeros(100_000)})
        with pytest.raises(UserError, match=r"can't write .*b: File too large"):
            write_text(tmp_path / "b", "x" * 100_000)

    assert in_a_child(limited) == 0
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_system_that_becomes_read_only_is_the_error_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("replace", "rename", "unlink", "rmdir", "remove"):
        monkeypatch.setattr(os, name, read_only)
    with pytest.raises(UserError, match=r"can't write .*x: Read-only file system; give"):
        write_text(tmp_path / "x", "x")
    refused = pytest.raises(UserError, match=r"can't write .*folder: Read-only file system")
    with refused, whole_folder(tmp_path / "folder") as new:
        (new / "model_index.json").touch()


# Kills


def test_what_a_kill_left_goes_with_the_next_write_and_what_is_being_written_stays(tmp_path: Path) -> None:
    def killed_in_a_file() -> None:
        with whole_file(tmp_path / "a") as temporary:
            (temporary.parent / "a library's own").write_bytes(b"half")
            die()

    def killed_in_a_folder() -> None:
        with replaced_folder(tmp_path / "f") as new:
            (new / "weights").write_bytes(b"half")
            die()

    (tmp_path / ".old.0123abcd.tmp").write_bytes(b"of an older version")
    (tmp_path / ".mine.tmp").write_bytes(b"nobody's business")
    assert [in_a_child(killed_in_a_file), in_a_child(killed_in_a_folder)] == [-9, -9]
    assert (
        len(list(tmp_path.glob(".f.*.tmp"))) == 1 and len(list(tmp_path.iterdir())) == 2
    )  # the first is gone
    with whole_file(tmp_path / "b") as temporary:
        assert sorted(each.name for each in tmp_path.iterdir()) == [temporary.parent.name, ".mine.tmp"]
        assert in_a_child(lambda: write_text(tmp_path / "c", "c")) == 0
        temporary.write_text("b")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".mine.tmp", "b", "c"]
    write_text(tmp_path / ("ä" * 120), "long")  # 240 bytes of name


@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    """Killed after each of the system's renamings; where names can't be swapped, the next write puts the old back."""
    target = tmp_path / "f"
    with replaced_folder(target) as new:
        (new / "is").write_text("old")
    rename = os.rename
    if not swaps:
        monkeypatch.setattr(ldm.files, "_swapped", lambda *_: False)

    def replaced() -> None:
        os.rename = lambda *names: (rename(*names), die())
        with replaced_folder(target) as new:
            (new / "is").write_text("new")

    status = in_a_child(replaced)
    if target.exists():  # a system that swaps
        assert swaps and status == 0 and (target / "is").read_text() == "new"
    else:
        assert status == -9
    write_text(tmp_path / "x", "x")
    assert (target / "is").read_text() == ("new" if status == 0 else "old")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["f", "x"]


# Two runs, and signals


def test_a_second_training_into_one_output_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    holding = f"""
        import time
        from pathlib import Path
        from ldm.training.folders import held
        with held(Path({str(tmp_path)!r})) as locked:
            print(locked, flush=True)
            time.sleep(60)
        """
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", textwrap.dedent(holding)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as other:
        assert other.stdout and other.stdout.readline().strip() == "True"
        with pytest.raises(UserError, match=f"another training writes to {tmp_path}"):
            Trainer(Toy(), TOY, tmp_path)
        other.kill()
    assert not list(tmp_path.iterdir())
    trainer = Trainer(Toy(), TOY, tmp_path)
    with pytest.raises(UserError, match="another training"), held(tmp_path):
        pass
    assert trainer.run() and newest(tmp_path)
    with held(tmp_path) as locked:  # it has let go
        assert locked


def test_a_run_that_fails_lets_go_of_its_output(tmp_path: Path) -> None:
    class Broken(Toy):
        def prepare(self, device: torch.device, batch_size: int) -> None:
            raise UserError("no pictures")

    with pytest.raises(UserError, match="no pictures") as caught:
        Trainer(Broken(), TOY, tmp_path)
    with held(tmp_path) as locked:
        assert locked and caught


def test_a_terminal_that_closes_ends_a_run_with_its_state_saved(tmp_path: Path) -> None:
    toy = Toy(meddle=lambda seen: os.kill(os.getpid(), signal.SIGHUP) if seen == 24 else None)
    assert not Trainer(toy, TOY, tmp_path).run()
    assert json.loads(newest(tmp_path).stem.removeprefix("state-").lstrip("0")) == 32  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_outside_of_the_loop_a_signal_ends_what_was_begun(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    ended = pytest.raises(KeyboardInterrupt, match=f"stopped by {number.name}")
    with ended, raised_signals(), whole_file(tmp_path / "a"):
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 1)
    assert not list(tmp_path.iterdir()) and signal.getsignal(number) is before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised_signals(), noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and noted == []
    finally:
        signal.signal(signal.SIGHUP, before)
