"""Pictures with several captions in training: one comes each time, all are in the cache, odd ones end no run."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from picture_files import encoded, folder_of, noise
from tiny import tiny_pipeline_folder
from training_runs import LOOP, TINY_VAE, write_config

from ldm.data.pictures import PictureSet, open_pictures
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.training import cli
from ldm.training.data.latents import PictureLatents
from ldm.training.objectives import text_to_image
from ldm.training.run import read_run

CAPTIONS: dict[str, Any] = {
    "0.png": ["a cat", "a kitty", "the cat"],
    "1.png": ["a dog", "a hound", ""],
    "2.png": "x",
}


def data(folder: Path) -> Path:
    files: dict[str, bytes | str] = {name: encoded(noise(32, 32, i)) for i, name in enumerate(CAPTIONS)}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items()]
    return folder_of(folder, files | {"metadata.jsonl": "\n".join(lines)})


def latents(found: PictureSet, seed: int) -> PictureLatents:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE)).eval()
    return PictureLatents(found, autoencoder, resolution=32, step=2, seed=seed)


def test_one_of_a_pictures_captions_comes_each_time(tmp_path: Path) -> None:
    """Each as often as the others, as a function of the seed and the position."""
    found = open_pictures(data(tmp_path))
    source = latents(found, 3)
    batches = {start: source.read(start, 6).captions for start in range(0, 360, 6)}
    counts = Counter(each for batch in batches.values() for each in batch)
    # 120 times each picture: 40 of each of three captions, give or take 5.2; 60 of each of two, give or take 5.5.
    expected = {"a cat": 40, "a kitty": 40, "the cat": 40, "a dog": 60, "a hound": 60, "x": 120}
    assert counts.keys() == expected.keys()
    assert all(abs(counts[each] - expected[each]) < 20 for each in expected) and counts["x"] == 120
    again = latents(found, 3)
    for start in (348, 0, 120):
        assert again.read(start, 6).captions == batches[start]
        first, second = (again.read(start, 6, rows).captions for rows in (slice(0, 3), slice(3, 6)))
        assert [*first, *second] == batches[start]
    other = latents(found, 4)
    assert {start: other.read(start, 6).captions for start in batches} != batches


def run_of(tmp_path: Path, pictures: Path, **more: Any) -> Path:
    tiny_pipeline_folder(tmp_path / "models", "sd1")
    cut = {"kind": "pictures", "path": str(pictures), "resolution": 32, "encoding": "float32", **more}
    base = str(tmp_path / "models" / "sd1")
    loop = {**LOOP, "pictures": 8, "batch_size": 4, "validate_every": 1000}
    return write_config(
        tmp_path,
        {"loop": loop, "text_to_image": {"base": base, "data": cut, "train": {"kind": "lora", "rank": 2}}},
    )


def test_the_cache_holds_the_states_of_all_captions(tmp_path: Path) -> None:
    run = run_of(tmp_path, data(tmp_path / "data"), cache=str(tmp_path / "cache"))
    objective = read_run(run).objective()
    assert isinstance(objective, text_to_image.Objective)
    objective.prepare(torch.device("cpu"), 4)
    cache = objective.conditions.cache
    assert cache is not None
    captions = ["", *CAPTIONS["0.png"], "a dog", "a hound", "x"]
    assert set(cache.keys()) == {objective.conditions._key(each) for each in captions}


def test_odd_names_and_captions_end_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data(tmp_path / "data")
    line = {"file_name": "0.png", "text": "half of \ud83d"}
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line) + "\n" + json.dumps({"file_name": "\udc83e.png", "text": "x"}))
    (folder / "\udc83e.png").write_bytes(b"junk")
    run = run_of(tmp_path, folder, cache=str(tmp_path / "cache"))
    assert cli.main(["--config", str(run)]) == 0
    said = capsys.readouterr().out
    assert "skipped 0.png: in " in said and "half of a surrogate pair" in said
    assert "skipped \\udc83e.png: not a picture of a kind that can be read" in said


def test_a_config_with_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, data(tmp_path / "data"))
    sections = yaml.safe_load(run.read_text())
    sections["text_to_image"]["data"]["captions"] = ["a cat", "half of \ud83d"]
    run.write_text(json.dumps(sections))
    with pytest.raises(UserError, match=r"data\.captions: 'half of \\ud83d' holds half of a surrogate pair"):
        read_run(run).objective()
