"""Files that strangers made to do harm: each is one line that names it, soon, in little memory, and runs nothing."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline_folder, tiny_t5_folder

from ldm.checkpoints.files import read_tensors
from ldm.checkpoints.lora import read_lora
from ldm.conditioning.inversion import NewWords, read_inversion
from ldm.conditioning.load import load_text_encoder
from ldm.config import load_mapping, override
from ldm.errors import UserError
from ldm.foreign import parse_json, plain_status
from ldm.system import System

SECONDS, MEMORY = 5, 2**20  # kB
UNET = "unet/diffusion_pytorch_model.safetensors"
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
seen: list[str] = []
watching = False


def _hook(event: str, _: object) -> None:
    if watching and event in FORBIDDEN:
        seen.append(event)


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline_folder(folder, "sd1")
    System.load(folder / "sd1").save_single_file(folder / "one.safetensors")
    return folder


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "sd1", tmp_path / "m"))


@pytest.fixture(autouse=True)
def bounded(models: Path) -> Iterator[None]:
    """No test takes long or much memory, starts a program or connects to anything."""
    global watching

    def late(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} seconds")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)  # of a busy machine
    watching = True
    yield
    watching = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)
    assert not seen
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


# Pickles


def _zip(path: Path, *members: tuple[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(name, content)


def _holds_itself(path: Path) -> None:
    found: dict[str, Any] = {"x": torch.zeros(1)}
    found["state_dict"] = found
    torch.save(found, path)


def _shared_member(path: Path) -> None:
    """1,000 names in the zip's list for the same megabyte."""
    _zip(path, ("m/data.pkl", b"\x80\x02}."), ("m/data/0", bytes(2**20)), kind=zipfile.ZIP_STORED)
    content = path.read_bytes()
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entries = content[start:end]
    second = entries.index(b"PK\1\2", 4)
    more = entries + entries[second:] * 1000
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1002, 1002, len(more), start, 0)
    path.write_bytes(content[:start] + more + tail)


def _tuples(path: Path) -> None:
    """A key of tuples of tuples by the memo, whose hash takes 2**60 steps."""
    path.write_bytes(b"\x80\x02}K\x01q\x00" + _doubled(60) + b"K\x01s.")


def _doubled(levels: int) -> bytes:
    return b"".join(b"0h%ch%c\x86q%c" % (k, k, k + 1) for k in range(levels))


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "holds itself": (_holds_itself, ""),
    "code": (lambda path: torch.save({"state_dict": Payload()}, path), "code in it"),
    "old code": (lambda path: path.write_bytes(pickle.dumps(Payload(), 2)), "code in it"),
    "deflated": (lambda path: _zip(path, ("m/data.pkl", bytes(2**28))), "would unpack"),
    "members that share": (_shared_member, "would unpack"),
    "tuples": (_tuples, "tuples within tuples"),
    "bytearray": (
        lambda path: path.write_bytes(
            b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (2**36).to_bytes(5, "little") + b"\x85R."
        ),
        "bytearray",
    ),
    "cut opcode": (lambda path: path.write_bytes(b"\x80\x02}X\x0a\x00"), ""),
    "memo not put": (lambda path: path.write_bytes(b"\x80\x02h\x07."), ""),
    "underflow": (lambda path: path.write_bytes(b"\x80\x02ss."), ""),
    "deep": (lambda path: path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), ""),
    "stride 0": (lambda path: torch.save({"a": torch.zeros(1).expand(2**40)}, path), "repeat a few numbers"),
    "views": (
        lambda path: torch.save(dict.fromkeys(map(str, range(2000)), torch.zeros(2**18)), path),
        "repeat a few numbers",
    ),
    "sparse": (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "sparse"),
    "complex": (lambda path: torch.save({"a": torch.zeros(3, dtype=torch.complex64)}, path), "complex"),
    "meta": (lambda path: torch.save({"a": torch.zeros(3, device="meta")}, path), "without numbers"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_one_line(name: str, models: Path, tmp_path: Path) -> None:
    make, words = PICKLES[name]
    for ending in (".ckpt", ".safetensors"):
        path = tmp_path / f"x{ending}"
        make(path)
        for act in (lambda path=path: System.load(path), lambda path=path: read_inversion(path)):
            said = refusal(act)
            assert str(path) in said and (words in said or "no embedding" in said)


def test_pickles_of_honest_makers_pass_the_bounds(tmp_path: Path) -> None:
    shared = torch.randn(1000, 1000)
    torch.save(
        {"state_dict": {"a": shared, "b": shared, "c": shared[:10]}, "epoch": 3}, tmp_path / "new.ckpt"
    )
    torch.save({"a": shared}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert set(read_tensors(tmp_path / "new.ckpt")) == {"a", "b", "c"}
    assert torch.equal(read_tensors(tmp_path / "old.pt")["a"], shared)


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_in_a_pickle_is_at_most_one_line(seed: int, tmp_path: Path) -> None:
    torch.save({"<w>": torch.ones(2, 8), "n": torch.tensor([[1.0, 2.0]])}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(60):
        at, byte = (int(torch.randint(high, (), generator=generator)) for high in (len(whole), 256))
        (tmp_path / "y.pt").write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            read_inversion(tmp_path / "y.pt")
        except UserError as error:
            assert "\n" not in str(error)


# Settings


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("text_encoder/config.json", {"num_hidden_layers": 900}, "num_hidden_layers"),
    ("text_encoder/config.json", {"max_position_embeddings": 10**9}, "max_position_embeddings"),
    ("text_encoder/config.json", {"hidden_size": 10**30}, "hidden_size"),
    ("text_encoder/config.json", {"eos_token_id": 10**30}, "eos_token_id"),
    ("text_encoder/config.json", {"layer_norm_eps": math.nan}, "layer_norm_eps"),
    ("text_encoder/config.json", {"quantization_config": {"quant_method": "x"}}, "quantization_config"),
    ("text_encoder/config.json", {"text_config": [1]}, "text_config"),
    ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": 900}, "layers"),
    ("unet/config.json", {"transformer_layers_per_block": 10**9}, "transformer_layers_per_block"),
    ("unet/config.json", {"block_out_channels": [8 * 10**30] * 2}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [8] * 10**5}, "block_out_channels"),
    ("unet/config.json", {"norm_eps": math.nan}, "norm_eps"),
    ("unet/config.json", {"freq_shift": 10**9}, "freq_shift"),
    ("vae/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
    ("vae/config.json", {"latent_channels": 10**12}, "latent_channels"),
    ("vae/config.json", {"num_class_embeds": 10**12}, "num_class_embeds"),
    ("vae/config.json", {"shift_factor": math.inf}, "shift_factor"),
    ("vae/config.json", {"scaling_factor": 10**400}, "400|401"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.001] * 10**6}, "timesteps|trained_betas|bytes"),
    ("scheduler/scheduler_config.json", {"beta_start": 0.9999, "beta_end": 0.9999}, "betas"),
    ("scheduler/scheduler_config.json", {"beta_start": 1e-12, "beta_end": 1e-12}, "betas"),
    ("scheduler/scheduler_config.json", {"sample_max_value": -1.0}, "sample_max_value"),
    (
        "scheduler/scheduler_config.json",
        {"dynamic_thresholding_ratio": math.nan},
        "dynamic_thresholding_ratio",
    ),
    ("scheduler/scheduler_config.json", {"sigma_max": [1]}, "sigma_max"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": -5}, "model_max_length"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": math.nan}, "model_max_length"),
    ("model_index.json", {"": ["diffusers", "X"]}, "component ''"),
    ("model_index.json", {"../../evil": ["diffusers", "X"]}, "component"),
]


@pytest.mark.parametrize(("file", "change", "words"), SETTINGS)
def test_settings_that_no_model_can_have_are_one_line(
    file: str, change: dict[str, Any], words: str, model: Path
) -> None:
    path = model / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    said = refusal(lambda: System.load(model))
    assert any(each in said for each in words.split("|"))


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_a_config_names_no_code_of_the_hub(key: str, model: Path) -> None:
    path = model / "text_encoder/config.json"
    asked = {key: "evil-org/kernel@main", "auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    loaded = System.load(model)
    config: Any = loaded.text.modules["text_encoder"].config
    assert not set(asked) & set(config.to_dict()) and not any(hasattr(config, each) for each in asked)


def test_a_config_for_transformers_names_no_code_of_the_hub(tmp_path: Path) -> None:
    path = tiny_t5_folder(tmp_path) / "text_encoder/config.json"
    asked = {"attn_implementation": "evil-org/kernel@main", "auto_map": {"AutoModel": "evil.Evil"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    config: Any = load_text_encoder(tmp_path).module.config
    assert config._attn_implementation in ("sdpa", "eager")
    assert not set(asked) & set(config.to_dict())


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no unet": lambda said: said["configs"].pop("unet"),
    "no scheduler": lambda said: said["configs"].pop("scheduler"),
    "no text encoder": lambda said: said["configs"].pop("text_encoder"),
    "no types": lambda said: said["configs"]["unet"].pop("down_block_types"),
    "types a number": lambda said: said["configs"]["unet"].update(down_block_types=3),
    "types of lists": lambda said: said["configs"]["unet"].update(down_block_types=[["a"], ["b"]]),
    "layers": lambda said: said["configs"]["unet"].update(layers_per_block=10**9),
    "layers of text": lambda said: said["configs"]["unet"].update(layers_per_block="x"),
    "layers of the vae": lambda said: said["configs"]["vae"].update(layers_per_block=10**9),
    "no widths": lambda said: said["configs"]["vae"].pop("block_out_channels"),
    "options": lambda said: said.update(options=[["num_inference_steps", 1]]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_metadata_of_a_single_file_is_checked(name: str, models: Path, tmp_path: Path) -> None:
    with safe_open(models / "one.safetensors", "pt") as file:
        metadata = dict(file.metadata())
    said = json.loads(metadata["ldm.configs"])
    CONFIGS[name](said)
    metadata["ldm.configs"] = json.dumps(said)
    save_file(load_file(models / "one.safetensors"), tmp_path / "m.safetensors", metadata)
    assert "m.safetensors" in refusal(lambda: System.load(tmp_path / "m.safetensors"))


# JSON and YAML


JSON_FILES = [
    "model_index.json",
    "unet/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
]


@pytest.mark.parametrize("file", JSON_FILES)
def test_odd_json_is_one_line_that_names_the_file(file: str, model: Path) -> None:
    for text in ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"a": ' + "[" * 200 + "]" * 200 + "}"):
        (model / file).write_text(text)
        said = refusal(lambda: System.load(model))
        assert file in said and "too deeply" in said
    (model / file).write_text('{"a": ' + "9" * 400 + "}")
    assert "400 digits" in refusal(lambda: System.load(model))
    (model / file).unlink()
    os.mkfifo(model / file)
    refusal(lambda: System.load(model))


def test_json_that_is_fine_is_read() -> None:
    text = '{"a": [NaN, -Infinity, 1000000000000000019884624838656], "b": ' + "[" * 90 + "]" * 90 + "}"
    assert parse_json(text, "x")["a"][2] == int(1e30)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join(['*' + chr(97 + k)] * 9)}]\n" for k in range(8)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} {{<<: [{', '.join(['*' + chr(97 + k)] * 9)}]}}\n" for k in range(8)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGES,
        "a: &a {q: *a}\n",
        "a: " + "[" * 100_000,
        "a: " + "[" * 150 + "]" * 150,
        "a: 2001-99-99\n",
        "a: !!int abc\n",
        "a: !!bool abc\n",
        "a: !!timestamp abc\n",
        "a: !!binary é\n",
        "a: !!python/name:os.system\n",
        "a: " + "9" * 5000,
        "a: 0x" + "f" * 5000,
        "a: " + ":".join(["1"] * 5000),
        "<<: 3\n",
        "? [a]\n: 1\n",
    ],
)
def test_odd_yaml_is_one_line_that_names_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert str(path) in refusal(lambda: load_mapping(path))
    if text.startswith("a: ") and "\na" not in text:
        assert "the value in" in refusal(lambda: override({"a": 1}, ["a=" + text[3:].strip()]))


def test_aliases_of_honest_configurations_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n")
    assert load_mapping(tmp_path / "c.yaml") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


# Files


@pytest.mark.parametrize(
    "shard", ["../../x.safetensors", "/etc/passwd", "..\\x.safetensors", "x\0", "C:x", "x.json"]
)
def test_an_index_names_only_weights_in_its_folder(shard: str, model: Path) -> None:
    tensors = load_file(model / UNET)
    shutil.move(model / UNET, model.parent / "x.safetensors")
    (model / f"{UNET}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    assert "index.json names the shard" in refusal(lambda: System.load(model))


def test_a_file_that_is_mostly_hole_is_refused(tmp_path: Path) -> None:
    head = json.dumps({"a": {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    os.truncate(path, 8 + len(head) + 2**35)
    if path.stat().st_blocks * 512 > 2**24:
        pytest.skip("this file system keeps no holes")
    assert "are on the disk" in refusal(lambda: read_tensors(path))
    with pytest.raises(OSError, match="no regular file"):
        plain_status("/dev/zero")


def test_a_lora_of_complex_numbers_is_refused(models: Path, tmp_path: Path) -> None:
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q."
    shapes = {f"{key}lora_A.weight": (2, 64), f"{key}lora_B.weight": (64, 2)}
    save_file(
        {k: torch.ones(v, dtype=torch.complex64) for k, v in shapes.items()}, tmp_path / "l.safetensors"
    )
    system = System.load(models / "sd1")
    assert "complex" in refusal(lambda: read_lora(tmp_path / "l.safetensors", {"unet": system.network}))


def test_thousands_of_words_are_learnt_in_one_go(models: Path, tmp_path: Path) -> None:
    vectors = torch.randn(2000, 32)
    save_file({f"<w{k}>": each.clone() for k, each in enumerate(vectors)}, tmp_path / "e.safetensors")
    words = read_inversion(tmp_path / "e.safetensors")
    encoder: Any = System.load(models / "sd1").text
    known = NewWords(encoder)
    known.add_all({word: each["text_encoder"] for word, each in words.items()})
    assert torch.equal(known.vectors("<w1234>")[0], vectors[1234])
    known.remove_all(list(words)[:-1])
    assert known.words == [list(words)[-1]]
    assert torch.equal(known.vectors(known.words[0]), words[known.words[0]]["text_encoder"])
    save_file({"<x>": torch.zeros(20_000, 32)}, tmp_path / "e.safetensors")
    assert "20,000 vectors" in refusal(lambda: read_inversion(tmp_path / "e.safetensors"))


def test_a_tokenizer_brings_no_endless_regular_expression(model: Path) -> None:
    path = model / "tokenizer/tokenizer.json"
    path.write_text(json.dumps({"pre_tokenizer": {"pattern": {"Regex": "(a|a)*b"}}}))
    assert "regular expression" in refusal(lambda: System.load(model))
