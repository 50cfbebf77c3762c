"""Diffusion without text: its loss by the papers' formulas, labels from any data, exact resume, what it refuses."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from killed import BATCHES, same_bits_after_kills
from PIL import Image
from training_runs import LOOP, TINY_VAE

from ldm.checkpoints.folder import write_component
from ldm.condition import Condition
from ldm.config import from_dict
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.sampling import plain
from ldm.system.plain import PlainSystem
from ldm.training.data.arrays import MIXTURE_RADIUS, MIXTURE_STD, SHAPES, ToysConfig, digits
from ldm.training.data.on_disk import classes_of
from ldm.training.distributed import BatchGenerator
from ldm.training.objectives import diffusion
from ldm.training.run import read_run, train

ALL = slice(None)
UNET = {
    "kind": "unet2d",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def objective(**settings: Any) -> diffusion.Objective:
    settings = {"data": {"kind": "digits"}, "network": UNET, **settings}
    made = diffusion.Objective(from_dict(diffusion.Config, settings))
    made.prepare(torch.device("cpu"), 8)
    for parameter in made.model.parameters():  # at its start it puts out zeros
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def test_the_loss_is_that_of_ho_et_al_with_labels_left_out_by_chance() -> None:
    """Eq. 14 of Ho et al. 2020, and of classifier-free guidance alg. 1, of the same draws."""
    made = objective(condition={"kind": "labels", "dropout": 0.5})
    batch = made.batch(0, 8, ALL)
    value, _ = made.loss(made.model, batch, BatchGenerator(3, 8, ALL))

    draws = BatchGenerator(3, 8, ALL)
    dropped = draws.uniform() < 0.5
    noise, timestep = draws.normal(1, 8, 8), (draws.uniform() * 1000).long()
    assert 0 < int(dropped.sum()) < 8
    alpha_bar = (
        NoiseSchedule.build("linear", 1e-4, 0.02).alphas_cumprod[timestep].float()[:, None, None, None]
    )
    noised = alpha_bar.sqrt() * batch.pictures + (1 - alpha_bar).sqrt() * noise
    assert batch.labels is not None
    labels = torch.where(dropped, 10, batch.labels)  # the eleventh row: no class
    from ldm.condition import Condition

    output = made.model(noised, timestep.float(), Condition(labels=labels))
    assert value.item() == pytest.approx(float((output.detach() - noise).square().mean()), rel=1e-5)


def test_digits_are_scikit_learns_and_those_held_out_are_never_trained_on() -> None:
    from sklearn.datasets import load_digits

    pictures, labels = digits()
    found: Any = load_digits()
    pixels = {
        (tuple((8 * (p[0] + 1)).round().int().flatten().tolist()), int(c))
        for p, c in zip(pictures, labels, strict=True)
    }
    assert pixels == {
        (tuple(i.astype(int).ravel()), int(c)) for i, c in zip(found.images, found.target, strict=True)
    }
    made = objective(validation_pictures=100).examples
    seen = torch.cat([made.cuts(start, 64).pictures for start in range(0, 64 * 60, 64)]).flatten(1)
    kept = made.whole(0, 100).pictures.flatten(1)
    everything = {tuple(each.tolist()) for each in seen}
    assert len(everything) > 1600  # in more than two turns all of them
    assert not everything & {tuple(each.tolist()) for each in kept}
    assert made.cuts(0, 64, slice(10, 12)).pictures.equal(made.cuts(0, 64).pictures[10:12])


def test_held_out_toys_are_the_same_in_any_batch() -> None:
    made = ToysConfig("two_moons", seed=3).examples("data", None, 10)
    whole, parts = made.whole(0, 6), [made.whole(0, 4), made.whole(4, 2)]
    assert whole.pictures.equal(torch.cat([each.pictures for each in parts]))
    assert whole.labels is not None
    assert whole.labels.tolist() == [
        k for each in parts if each.labels is not None for k in each.labels.tolist()
    ]
    assert len(whole.pictures.flatten(1).unique(dim=0)) == 6
    # They are of the shape, not of the first number that each generator gives.
    many = made.whole(0, 4000).pictures.flatten(1)
    drawn = made.cuts(0, 4000).pictures.flatten(1)
    for moment in (lambda x: x.mean(0), lambda x: x.square().mean(0)):
        assert (moment(many) - moment(drawn)).abs().max() < 6 * 1.5 / 4000**0.5


def test_toys_have_the_moments_of_their_shapes() -> None:
    points, labels = SHAPES["mixture"][0](np.random.default_rng(0), 40_000)
    for k in range(8):
        own = points[labels == k]
        centre = MIXTURE_RADIUS * np.array([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)])
        assert abs(own.mean(0) - centre).max() < 4 * MIXTURE_STD / len(own) ** 0.5
        assert abs(own.std(0) - MIXTURE_STD).max() < 4 * MIXTURE_STD / (2 * len(own)) ** 0.5
    for shape, (draw, names) in SHAPES.items():
        points, labels = draw(np.random.default_rng(1), 20_000)
        assert set(labels.tolist()) == set(range(len(names))), shape
        assert np.abs(points.std(0) - 1).max() < 0.4, shape


@pytest.mark.parametrize("loss", [{"variance": True}, {"weighting": "min_snr"}])
def test_it_learns_in_latents_of_a_first_stage_and_its_export_draws(
    tmp_path: Path, loss: dict[str, Any]
) -> None:
    vae = AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE))
    write_component(tmp_path / "first", "vae", vae.config.to_diffusers(), vae.state_dict())
    write_folder_of_classes(tmp_path / "pictures")
    made = objective(
        data={
            "kind": "pictures",
            "path": str(tmp_path / "pictures"),
            "resolution": 16,
            "label_column": "folder",
        },
        autoencoder=str(tmp_path / "first"),
        condition={"kind": "labels"},
        loss=loss,
        process={"kind": "ddpm", "variance_type": "learned_range" if "variance" in loss else "fixed_small"},
        validation={"pictures": 4, "steps": 2, "guidance": 2.0},
    )
    assert made.system.shape == (4, 8, 8)
    value, _ = made.loss(made.model, made.batch(0, 8, ALL), BatchGenerator(0, 8, ALL))
    value.backward()
    assert all(each.grad is not None for each in made.model.parameters())
    figures = made.validate(made.model.eval(), tmp_path, 0)
    assert figures["held_out_loss"] > 0
    assert Image.open(tmp_path / "drawn-00000000.png").size == (4 * 64, 64)
    made.export(made.model, tmp_path / "export", "")
    assert PlainSystem.load(tmp_path / "export").labels == ["cat", "dog"]


def write_folder_of_classes(folder: Path, side: int = 16) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        place = folder / ("cat" if number % 3 else "dog") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(place)


def labels_of(path: Path, **settings: Any) -> tuple[list[str], list[int]]:
    """The classes, and those of all pictures in the order of their names."""
    made = objective(
        data={"kind": "pictures", "path": str(path), "resolution": 16, **settings},
        condition={"kind": "labels"},
    ).examples
    numbers = made.whole(0, made.count).labels
    assert numbers is not None
    return made.labels, numbers.tolist()[::-1]


def test_labels_are_a_column_of_any_data_source(tmp_path: Path) -> None:
    wanted = ["9", "10", "9", "2"]
    contents = []
    for number in range(len(wanted)):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    expected = (["2", "9", "10"], [1, 2, 1, 0])  # numbers by their value

    for kind, quote in (("jsonl", int), ("jsonl", str), ("csv", str)):
        folder = tmp_path / f"{kind}-{quote.__name__}"
        folder.mkdir()
        for number, content in enumerate(contents):
            (folder / f"{number}.png").write_bytes(content)
        if kind == "jsonl":
            rows = [
                json.dumps({"file_name": f"{k}.png", "label": quote(each)}) for k, each in enumerate(wanted)
            ]
        else:
            rows = ["file_name,label", *(f"{k}.png,{each}" for k, each in enumerate(wanted))]
        (folder / f"metadata.{kind}").write_text("\n".join(rows))
        assert labels_of(folder, label_column="label") == expected

    for member in ("cls", "json"):
        with tarfile.open(tmp_path / f"{member}.tar", "w") as tar:
            for number, (content, label) in enumerate(zip(contents, wanted, strict=True)):
                told = label if member == "cls" else json.dumps({"label": int(label)})
                for ending, data in (("png", content), (member, told.encode()), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{number}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        assert labels_of(tmp_path / f"{member}.tar", label_column="label") == expected

    write_folder_of_classes(tmp_path / "folders")
    assert labels_of(tmp_path / "folders", label_column="folder")[0] == ["cat", "dog"]


def test_labels_of_a_saved_dataset_have_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (16, 16), (60 * k, 0, 0)) for k in range(4)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "ant"])}
    )
    datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1, 0]}, features=features).save_to_disk(
        str(tmp_path / "saved")
    )
    assert labels_of(tmp_path / "saved", label_column="label") == (["ant", "owl"], [1, 0, 0, 1])


def config(folder: Path, **changes: Any) -> Path:
    settings = {
        "output": str(folder / "run"),
        "loop": {**LOOP, "pictures": 8 * BATCHES, "save_every": 8, "validate_every": 24},
        "diffusion": {
            "data": {"kind": "digits"},
            "network": UNET,
            "condition": {"kind": "labels"},
            "validation": {"pictures": 4, "steps": 2},
            "validation_pictures": 8,
            **changes,
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


@pytest.mark.parametrize("kind", ["digits", "toys"])
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {}
    if kind == "toys":
        changes = {"data": {"kind": "toys", "shape": "mixture"}, "network": {"kind": "points"}}
    whole, killed = (config(tmp_path / name, **changes) for name in ("whole", "killed"))
    same_bits_after_kills(whole, killed, 2)


PROCESSES = {
    "ncsn": {"kind": "ncsn", "sigma_max": 5.0, "levels": 6, "steps_per_level": 2},
    "ve": {"kind": "ve", "sigma_max": 5.0},
    "vp": {"kind": "vp"},
    "subvp": {"kind": "subvp", "beta_max": 15.0},
    "edm": {"kind": "edm", "p_mean": -0.8, "timestep_scale": 1000.0},
}


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_run_of_continuous_noise_and_what_it_exports(tmp_path: Path, kind: str) -> None:
    """What is exported has the process, and draws the same of the same seeds."""
    fourier = {"time_embedding_type": "fourier"} if kind in ("ncsn", "ve") else {}
    path = config(
        tmp_path,
        process=PROCESSES[kind],
        network={**UNET, **fourier},
        condition={"kind": "nothing"},
        loss={"weighting": "unit" if kind == "edm" else "snr"},
    )
    assert train(path)
    system = PlainSystem.load(tmp_path / "run" / "export")
    assert system.process == read_run(path).settings.process
    request = plain.prepare(system, system.process.plan(4), Condition(), [0, 1])
    drawn = plain.draw(system, request)
    assert drawn.shape == (2, 1, 8, 8) and drawn.isfinite().all()
    again = plain.prepare(system, system.process.plan(4), Condition(), [0, 1])
    assert torch.equal(drawn, plain.draw(system, again))


def test_a_run_from_its_file_and_what_it_exports(tmp_path: Path) -> None:
    assert train(config(tmp_path))
    system = PlainSystem.load(tmp_path / "run" / "export")
    assert system.labels == [str(k) for k in range(10)] and system.null_label == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"kind": "digits"}, "crop": 4}, "not cut: leave the crop out"),
        ({"network": {**UNET, "block_out_channels": [8] * 5, "down_block_types": ["DownBlock2D"] * 5,
                      "up_block_types": ["UpBlock2D"] * 5}}, "take fewer levels"),
        ({"autoencoder": "nowhere"}, "there is no folder nowhere"),
        ({"process": {"kind": "ddpm", "beta_schedule": "linaer"}}, "did you mean linear"),
        ({"process": {"kind": "ddpm", "rescale_betas_zero_snr": True}}, "undefined at zero terminal SNR"),
        ({"process": {"kind": "dpm"}}, "ddpm"),
        ({"process": {"kind": "ve"}}, "tells noise levels"),
        ({"network": {**UNET, "time_embedding_type": "fourier"}}, "tells timesteps"),
        ({"process": {"kind": "ve", "embedding": "positional"}}, "take ve_score there"),
        ({"process": {"kind": "ncsn", "levels": 1}}, "two or more levels"),
        ({"condition": {"kind": "labels", "dropout": 2}}, "dropout is 2"),
        ({"validation": {"steps": 0}}, "steps is 0"),
        ({"validation": {"sampler": "eulr"}}, "euler"),
        ({"validation": {"guidance": 3.0}}, "set it to 1, or give diffusion.condition a dropout"),
        ({"validation": {"guidance": 3.0}, "condition": {"kind": "labels", "dropout": 0.0}}, "set it to 1"),
        ({"validation": {"guidance": float("nan")}, "condition": {"kind": "labels"}}, "guidance is nan"),
        ({"loss": {"timestep_shift": 0.0}}, "timestep_shift is 0.0"),
        ({"loss": {"timestep_shift": -1.0}}, "timestep_shift is -1.0"),
        ({"loss": {"weighting": "min_snr", "gamma": 0.0}}, "gamma is 0.0"),
        ({"loss": {"offset_noise": float("nan")}}, "offset_noise is nan"),
        ({"loss": {"variance": True}}, "goes with diffusion.process.variance_type"),
        ({"process": {"kind": "ddpm", "variance_type": "learned_range"}}, "goes with diffusion.process"),
        ({"network": {"kind": "points"}}, "kind points is of points"),
        ({"network": {**UNET, "kind": "unet"}}, "wants hidden in its condition"),
    ],
)  # fmt: skip
def test_settings_that_can_not_be_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        objective(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("named", "order"),
    [
        (["10", "2", "-3"], ["-3", "2", "10"]),
        (["10", "2", "-3", "a"], ["-3", "10", "2", "a"]),
        (["9" * 5000, "8"], ["8", "9" * 5000]),
    ],
)
def test_numbers_are_sorted_by_value_and_names_by_name(named: list[str], order: list[str]) -> None:
    assert classes_of(named, named, "data")[0] == order


def test_classes_that_are_not_there_are_refused_in_one_line(tmp_path: Path) -> None:
    write_folder_of_classes(tmp_path)
    pictures = {"kind": "pictures", "path": str(tmp_path), "resolution": 16}
    for data, message in (
        (pictures, "data.label_column"),
        ({**pictures, "label_column": "species"}, "has no class"),
        ({**pictures, "path": str(tmp_path / "dog"), "label_column": "folder"}, "no class|one class"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            objective(data=data, condition={"kind": "labels"})
        assert "\n" not in str(caught.value)


def test_crops_larger_than_the_pictures_are_refused_in_one_line(tmp_path: Path) -> None:
    write_folder_of_classes(tmp_path)
    pictures = {"kind": "pictures", "path": str(tmp_path), "resolution": 16}
    with pytest.raises(UserError, match=r"crop is 32, more than diffusion\.data\.resolution"):
        objective(data=pictures, crop=32)


@pytest.mark.parametrize("told", [{"kind": "low_resolution", "resolution": 4}, {"kind": "blurred"}])
def test_validation_of_crops_and_of_more_pictures_than_there_are(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    """It is of squares of the size that is trained on, and those that it draws begin again after the last."""
    write_folder_of_classes(tmp_path)
    made = objective(
        data={"kind": "pictures", "path": str(tmp_path), "resolution": 16},
        crop=8,
        condition=told,
        validation={"pictures": 64, "steps": 1},
    )
    count = made.examples.count
    assert np.isfinite(made.validate(made.model, tmp_path, 0)["held_out_loss"])
    twice = made.examples.whole(0, 2 * count).pictures
    assert torch.equal(twice[:count], twice[count:])


def test_every_lecture_config_can_be_read() -> None:
    files = sorted((Path(__file__).parent.parent / "configs" / "lectures").glob("*.yaml"))
    assert files
    for path in files:
        run = read_run(path)
        run.settings.check()
        assert run.output.parts[0] == "runs", path
