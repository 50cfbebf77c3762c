"""Tensors on disk: read without running code, refused in one line, written whole or not at all."""

import json
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoints import files, folder, hub, read_folder
from ldm.checkpoints.files import (
    check_finite,
    file_in,
    load_strict,
    read_metadata,
    read_tensors,
    write_bytes,
    write_tensors,
    write_text,
)
from ldm.errors import UserError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return {str(kind): torch.randn(5, 7).to(kind) for kind in kinds} | {"ids": torch.arange(9)}


def refusal(*args, **kwargs) -> str:
    """Return the UserError's message that `read_tensors` gives, and see that it is one line."""
    with pytest.raises(UserError) as caught:
        read_tensors(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


# Reading


def test_safetensors_come_back_with_their_metadata(tmp_path: Path, tensors) -> None:
    path = tmp_path / "new folder" / "a.safetensors"
    write_tensors(path, tensors, {"made": "here"})
    same(read_tensors(path), tensors)
    assert read_metadata(path) == {"made": "here", "format": "pt"}


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: {"state_dict": each, "global_step": 3}])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_are_unwrapped(tmp_path: Path, tensors, wrap, zipped: bool) -> None:
    torch.save(wrap(tensors), tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    same(read_tensors(tmp_path / "a.ckpt"), tensors)
    assert read_metadata(tmp_path / "a.ckpt") == {}


class Payload:
    """Runs a command when it is unpickled by a loader that trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    path, mark = tmp_path / "bad.ckpt", tmp_path / "ran"
    torch.save(
        {"state_dict": {"a": torch.zeros(2)}, "x": Payload(mark)}, path, _use_new_zipfile_serialization=zipped
    )
    message = refusal(path)
    assert not mark.exists()
    assert "system" in message and "not run" in message and "safetensors" in message
    torch.load(path, weights_only=False)
    assert mark.exists(), "the payload is a real one"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_of_any_protocol_is_named_and_nothing_is_warned_of(
    tmp_path: Path, protocol: int
) -> None:
    path, mark = tmp_path / "bad.ckpt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Payload(mark), protocol))
    torch.save({"x": Payload(mark)}, tmp_path / "zip.pt", pickle_protocol=max(protocol, 2))
    tensors = {"a": torch.zeros(2), "x": Payload(mark)}
    torch.save(
        tensors, tmp_path / "old.pt", pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=False
    )
    for each in (path, tmp_path / "zip.pt", tmp_path / "old.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            message = refusal(each)
        assert "pickle with code in it (it calls for " in message and ".system)" in message
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the payload is a real one"


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, name: str, keep: float) -> None:
    path, big = tmp_path / name, {"a": torch.randn(300, 300)}
    write_tensors(path, big) if name.endswith("safetensors") else torch.save(big, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "get it again" in refusal(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.bin"])
def test_garbage_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"garbage" * 100)
    assert "get it again" in refusal(tmp_path / name)


def test_other_refusals(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "x.index.json").write_text("{}")
    assert "did you mean model.safetensors" in refusal(tmp_path / "modl.safetensors")
    assert "folder" in refusal(tmp_path)
    assert "git lfs pull" in refusal(tmp_path / "lfs.safetensors")
    assert "no tensors" in refusal(tmp_path / "none.pt")
    assert "list" in refusal(tmp_path / "list.pt")
    assert "weight_map" in refusal(tmp_path / "x.index.json")
    (tmp_path / "x.h5").write_text("who knows")
    assert ".safetensors" in refusal(tmp_path / "x.h5")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "no regular file" in refusal(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.pt", "model", "model.download"])
@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy", "deepspeed"])
def test_weights_are_known_by_their_content(tmp_path: Path, tensors, name: str, how: str) -> None:
    path, made = tmp_path / name, tmp_path / "made.safetensors"
    if how == "safetensors":
        write_tensors(made, tensors, {"modelspec.title": "a"})
        made.rename(path)
        assert read_metadata(path)["modelspec.title"] == "a"
    else:
        held = {"module": tensors, "epoch": 1} if how == "deepspeed" else {"state_dict": tensors}
        torch.save(held, path, _use_new_zipfile_serialization=how == "zip")
        assert read_metadata(path) == {}
    found = read_tensors(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.bin", "model"])
@pytest.mark.parametrize(
    "content,said",
    [
        (b"<!DOCTYPE html>\n<html><head><title>Log in</title>" * 20, "a web page"),
        (b"\n  <HTML>" * 90, "a web page"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b"GGUF\3\0\0\0" + b"\0" * 600, "GGUF"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 600, "picture"),
        (b"\x1f\x8b\x08" + b"x" * 600, "gzip"),
        (b"\0" * 4096, "zeros"),
        (b"", "empty"),
    ],
)
def test_what_is_no_weights_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


def test_archives_of_something_else_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("lora/readme.txt", "unpack me")
    assert "zip archive with lora/readme.txt in it" in refusal(tmp_path / "model.ckpt")
    with tarfile.open(tmp_path / "model.safetensors", "w") as archive:
        archive.add(tmp_path / "model.ckpt", "model.ckpt")
    assert "tar archive" in refusal(tmp_path / "model.safetensors")


def test_shards_are_put_together(tmp_path: Path, tensors) -> None:
    names = list(tensors)
    placed = {name: f"m-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(placed.values()):
        write_tensors(tmp_path / shard, {name: tensors[name] for name in names if placed[name] == shard})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    same(read_tensors(index), tensors)
    index.write_text(json.dumps({"weight_map": {**placed, "lost": placed[names[0]]}}))
    assert "lost" in refusal(index)
    for wrong in (names, {names[0]: 3}, {names[0]: ["a"]}, "x", None):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert f"{index} is no index" in refusal(index) and "weight_map" in refusal(index)


# Loading


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 2, 3))


def test_strict_loading_takes_the_tensors_themselves() -> None:
    weights = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 2, 3)).half().state_dict()
    module = on_meta()
    load_strict(module, weights, "a file")
    assert module[0].weight.data_ptr() == weights["0.weight"].data_ptr()
    assert module[0].weight.dtype == torch.float16 and module[0].weight.requires_grad


def test_weights_of_another_family_are_counted_and_named_with_both_shapes() -> None:
    weights = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(9, 2, 3)).state_dict()
    weights["other"] = weights.pop("0.bias")
    with pytest.raises(UserError) as caught:
        load_strict(on_meta(), weights, "x.safetensors")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("x.safetensors: ")
    assert "1 missing (0.bias)" in message and "1 not of this network (other)" in message
    assert "1 of another shape (1.weight is (2, 9, 3, 3) for (2, 4, 3, 3))" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_single_bad_number_is_found(bad: float, dtype: torch.dtype) -> None:
    if dtype == torch.float8_e4m3fn and bad == bad:
        pytest.skip("this type has no infinity")
    healthy = {"a": torch.full((8, 8), 1.0), "ids": torch.arange(3)}
    spoiled = torch.zeros(8, 8)
    spoiled[3, 4] = bad
    check_finite(healthy, "w")
    with pytest.raises(UserError, match=r"^w: NaN or infinity in 1 of 3 tensors \(b\)$"):
        check_finite({**healthy, "b": spoiled.to(dtype)}, "w")


def test_a_sum_that_overflows_is_no_fault() -> None:
    check_finite({"big": torch.full((64,), 3e38), "half": torch.full((64,), 6e4).half()}, "w")


def test_nan_weights_are_refused_on_loading() -> None:
    weights = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 2, 3)).state_dict()
    weights["1.bias"] = weights["1.bias"] * float("nan")
    with pytest.raises(UserError, match=r"NaN.*1\.bias"):
        load_strict(on_meta(), weights, "w")


def test_whole_numbers_for_weights_are_refused() -> None:
    weights = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 2, 3)).state_dict()
    weights["1.weight"] = weights["1.weight"].to(torch.int64)
    with pytest.raises(UserError, match=r"1 of another kind of number \(1\.weight is torch\.int64\)"):
        load_strict(on_meta(), weights, "w")


# Odd paths


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/x", "a\0b", "a/b\0c.safetensors"])
def test_paths_that_cannot_be_are_one_line(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (hub.resolve, read_tensors, read_metadata, read_folder, files.file_hash, files.read_text):
        with pytest.raises(UserError) as caught:
            read(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    if len(name) == 300:
        with pytest.raises(UserError, match="can't be read: File name too long"):
            file_in(name, "x.safetensors")


def test_what_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch) -> None:
    """Everything inside `secret` is refused, as a folder without permissions does to anybody but root."""
    secret = tmp_path / "secret"
    for name in ("unet", "tokenizer"):
        (secret / name).mkdir(parents=True)
    write_tensors(secret / "a.safetensors", {"a": torch.zeros(1)})

    def forbidden(which):
        real = getattr(Path, which)

        def call(self, *args, **kwargs):
            if secret in self.parents or (self == secret and which == "iterdir"):
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **kwargs)

        return call

    for which in ("stat", "is_dir", "is_file", "exists", "open", "iterdir"):
        monkeypatch.setattr(Path, which, forbidden(which))
    for read, path in (
        (read_tensors, secret / "a.safetensors"),
        (read_metadata, secret / "a.safetensors"),
        (files.read_text, secret / "model_index.json"),
        (files.file_hash, secret / "a.safetensors"),
        (read_folder, secret),
        (hub.resolve, secret / "a.safetensors"),
        (lambda path: file_in(path, "x"), secret / "unet"),
        (lambda path: folder.component_file(path, "unet"), secret),
        (lambda path: folder.read_component(path, "unet"), secret),
    ):
        with pytest.raises(UserError, match=r"secret.*can't be read: Permission denied$"):
            read(path)


def test_a_system_is_asked_for_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"give its folder, {tmp_path}$"):
        hub.resolve(tmp_path / "model_index.json")
    for empty in ("", " "):
        with pytest.raises(UserError, match="the model's name is empty"):
            hub.resolve(empty)


# Writing


def test_tied_and_strided_tensors_are_all_in_the_file(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    given = {
        "a": base,
        "b": base,
        "view": base[1:3],
        "turned": base.T,
        "empty": torch.zeros(0),
        "one": base[0, 0],
    }
    write_tensors(tmp_path / "t.safetensors", given)
    same(read_tensors(tmp_path / "t.safetensors"), given)


def test_a_failure_midway_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def half(tensors, name, metadata) -> None:
        Path(name).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(UserError, match="No space left"):
        write_tensors(path, {"a": torch.ones(3)})
    with pytest.raises(KeyboardInterrupt), files.whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_unwritable_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.txt", tmp_path):
        with pytest.raises(UserError, match="can't write"):
            write_text(path, "a")
    with pytest.raises(UserError, match="can't write"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="only"):
        write_tensors(tmp_path / "x.ckpt", {"a": torch.zeros(1)})


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    write_tensors(tmp_path / "ours.safetensors", {"a": torch.zeros(1)})
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "ours", "ours.safetensors")}
    assert len(modes) == 1


# The hub


def test_paths_come_before_the_hub_and_typos_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "animals").mkdir(parents=True)
    assert hub.resolve("weights/animals") == Path("weights/animals")
    for typo in ("weights/animal", str(tmp_path / "weights" / "animls")):
        with pytest.raises(UserError, match="did you mean animals"):
            hub.resolve(typo)
    with pytest.raises(UserError, match="no such folder or file"):
        hub.resolve("some thing")


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as caught:
        hub.resolve("some-org/some-model")
    message = str(caught.value)
    assert "\n" not in message
    assert "hf download some-org/some-model" in message and "HF_HOME" in message


def test_the_cache_is_enough_when_it_is_whole(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = []

    def download(name, **kwargs):
        asked.append(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.resolve("some-org/encoder")
    assert [each.get("local_files_only") for each in asked] == [True, None], "an empty copy is not taken"
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked.clear()
    assert hub.resolve("some-org/encoder", variant="fp16") == tmp_path
    assert [each.get("local_files_only") for each in asked] == [True]


def test_what_is_fetched_has_no_second_copies(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "model_index.json",
        "all-in-one.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "safety_checker/model.safetensors",
        "tokenizer/merges.txt",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
    ]
    fetched = []

    def download(name, allow_patterns=None, ignore_patterns=None, **kwargs):
        fetched[:] = filter_repo_objects(
            there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    small = {"model_index.json", "unet/config.json", "tokenizer/merges.txt"}
    hub.resolve("some-org/model")
    plain = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00002.safetensors"}
    assert set(fetched) == small | plain
    hub.resolve("some-org/model", variant="fp16")
    half = {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
    }
    assert set(fetched) == small | half
