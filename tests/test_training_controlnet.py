"""Training a ControlNet: the loss of diffusers' script, an export that diffusers loads, pictures of a column."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controls import saved_controlnet
from PIL import Image
from test_training_finetune import built, setup
from tiny import Family

from ldm.conditioning.controlnets import load_controlnet
from ldm.data.pictures import open_pictures
from ldm.errors import UserError
from ldm.preprocess import canny
from ldm.system import System
from ldm.training.distributed import BatchGenerator
from ldm.training.run import read_run, train

TRAIN = {"kind": "controlnet"}
COLUMN = {"conditioning_column": "conditioning_image", "encoding": "float32"}


def control_setup(tmp: Path, family: Family = "sd1", **objective: Any) -> tuple[Path, Path]:
    """A config with control pictures in a column: those of the pictures, upside down and of twice their size."""
    data = COLUMN | objective.pop("data", {})
    path, base = setup(tmp, family, data=data, **{"train": TRAIN, **objective})
    add_column(tmp / "pictures")
    return path, base


def add_column(folder: Path, column: str = "conditioning_image") -> None:
    (folder / "control").mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        picture = Image.open(folder / row["file_name"])
        row[column] = f"control/{row['file_name']}"
        picture.rotate(180).resize((80, 80), Image.Resampling.NEAREST).save(folder / row[column])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_the_export_may_be_a_control_lora(tmp_path: Path) -> None:
    """Of full rank it is the network, but for float16."""
    path, base = control_setup(tmp_path, train={**TRAIN, "rank": 10_000})
    ours = built(path)
    network = ours.model.controlnet
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in network.parameters():
            each += 0.05 * torch.randn(each.shape, generator=generator)
    ours.export(ours.model, tmp_path / "export", "")
    (file,) = (tmp_path / "export").iterdir()
    again = load_controlnet(file, unet=System.load(base).network).state_dict()
    for name, each in network.state_dict().items():
        assert (again[name] - each).norm() <= 1e-3 * each.norm(), name


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_loss_and_gradients_are_those_of_diffusers_script(tmp_path: Path, family: Family) -> None:
    """Its formula, written out over diffusers' networks, on the same weights, noise and timesteps."""
    import diffusers

    start = saved_controlnet(tmp_path / "start", family)
    train = {**TRAIN, "base": str(start)}
    path, base = control_setup(tmp_path, family, train=train, condition_dropout=0.0, data={"flip": True})
    ours = built(path)
    batch = ours.batch(0, 8, slice(0, 8))
    value, _ = ours.loss(ours.model, batch, BatchGenerator(5, 8, slice(0, 8)))
    value.backward()

    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(base)
    controlnet = diffusers.ControlNetModel.from_pretrained(start)
    draws = BatchGenerator(5, 8, slice(0, 8))
    draws.uniform()
    noise, timesteps = draws.normal(4, 16, 16), (draws.uniform() * 1000).long()
    added: dict[str, Any] = {}
    with torch.no_grad():
        if family == "sdxl":
            hidden, _, pooled, _ = pipe.encode_prompt(batch.captions, do_classifier_free_guidance=False)
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.time_ids}}
        else:
            hidden, _ = pipe.encode_prompt(batch.captions, "cpu", 1, do_classifier_free_guidance=False)
    training = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    noisy = training.add_noise(batch.latents, noise, timesteps)
    down, mid = controlnet(noisy, timesteps, hidden, batch.conditioning, return_dict=False, **added)
    output = pipe.unet(
        noisy,
        timesteps,
        hidden,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        **added,
    ).sample
    loss = torch.nn.functional.mse_loss(output, noise)
    loss.backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    found = {name: each.grad for name, each in ours.model.controlnet.named_parameters()}
    for name, each in controlnet.named_parameters():
        torch.testing.assert_close(found[name], each.grad, rtol=1e-3, atol=1e-6)
    assert all(each.grad is None for each in ours.system.network.parameters())


def test_the_column_gives_each_picture_its_own_cut_alike(tmp_path: Path) -> None:
    """Each control picture is the picture upside down, mirrored where that is; with a cache as without."""
    path, _ = control_setup(tmp_path, data={"flip": True})
    ours = built(path)
    ours.source.with_pictures = True
    for start in range(0, 48, 8):
        batch = ours.batch(start, 8, slice(None))
        assert batch.pictures is not None and batch.conditioning is not None
        assert batch.conditioning.min() >= 0 and batch.conditioning.max() <= 1
        upright = batch.conditioning.flip(2, 3) * 2 - 1
        apart = (upright - batch.pictures).abs().mean((1, 2, 3))
        mirrored = (upright - batch.pictures.flip(3)).abs().mean((1, 2, 3))
        assert apart.max() < 0.01 and mirrored.min() > 0.03
    cached, _ = control_setup(tmp_path, data={"flip": True, "cache": str(tmp_path / "cache")})
    again = built(cached).batch(40, 8, slice(None))
    assert torch.equal(again.conditioning, batch.conditioning) and again.captions == batch.captions
    part = built(cached).batch(40, 8, slice(2, 5))
    assert torch.equal(part.conditioning, batch.conditioning[2:5])


def test_a_run_trains_exports_and_goes_on(tmp_path: Path) -> None:
    """From the U-Net's encoder, which stays as it was, to a folder of diffusers'; and from there on edges."""
    from diffusers import ControlNetModel

    loop = {"pictures": 16, "ema_half_life": 8, "gradient_checkpointing": True, "validate_every": 16}
    validation = {"prompts": ["a cat"], "seeds": 2, "steps": 2}
    path, base = control_setup(tmp_path, loop=loop, validation=validation)
    before = {k: v.clone() for k, v in System.load(base).network.state_dict().items()}
    assert train(path)
    export = tmp_path / "run" / "export"
    assert sorted(each.name for each in export.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    theirs, network = ControlNetModel.from_pretrained(export), load_controlnet(export)
    assert network.state_dict().keys() == theirs.state_dict().keys()
    assert all(each.abs().max() > 0 for each in network.controlnet_mid_block.parameters())
    assert network.config.factor == 2 and network.config.conditioning_embedding_out_channels == (16, 32)
    assert (tmp_path / "run" / "drawn-00000016.png").is_file()
    after = System.load(base).network.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())

    pytest.importorskip("cv2")
    more = {**TRAIN, "base": str(export), "edges": "canny", "thresholds": [50, 150]}
    (tmp_path / "more").mkdir()
    again, _ = setup(tmp_path / "more", loop=loop, train=more, data={"encoding": "float32"})
    ours = built(again)
    batch = ours.batch(0, 8, slice(None))
    edges = ours.config.train.control_pictures(batch)
    assert batch.pictures is not None and batch.conditioning is None
    pixels = ((batch.pictures[3] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert edges is not None and edges.shape == (8, 3, 32, 32)
    assert (
        np.array_equal(edges[3].permute(1, 2, 0).numpy() * 255, canny(pixels, 50, 150)) and edges.max() == 1
    )
    assert train(again)
    moved = load_controlnet(tmp_path / "more" / "run" / "export").state_dict()
    assert (
        sum(not torch.equal(moved[name], each) for name, each in network.state_dict().items())
        > len(moved) / 2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"conditioning_column": ""}},
            "name their column in data.conditioning_column, or set train.edges",
        ),
        ({"train": {**TRAIN, "edges": "canny"}}, "and not both"),
        (
            {"train": {"kind": "unet"}},
            "conditioning_column is for a ControlNet: set train.kind to controlnet",
        ),
        ({"inpainting": True}, "inpainting trains the whole U-Net, not a ControlNet"),
        ({"prior": {"prompt": "a dog", "folder": "x"}}, "leave prior out, or set train.edges"),
        (
            {"data": {"conditioning_column": "conditioning"}},
            "has no column 'conditioning', did you mean",
        ),
        ({"train": {**TRAIN, "base": "nowhere"}}, "nowhere: no such folder or file"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, _ = control_setup(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        read_run(path).objective()


def test_a_controlnet_of_another_family_is_no_base(tmp_path: Path) -> None:
    other = saved_controlnet(tmp_path / "other", "sdxl")
    path, _ = control_setup(tmp_path, train={**TRAIN, "base": str(other)})
    with pytest.raises(UserError, match=r"text_to_image\.train\.base is of another family than the model"):
        read_run(path).objective()


# Pictures with control pictures, on disk


def test_broken_and_missing_control_pictures_are_told_apart(tmp_path: Path) -> None:
    setup(tmp_path)
    folder = tmp_path / "pictures"
    add_column(folder)
    (folder / "control" / "3.png").write_bytes(b"no picture")
    Image.new("RGB", (80, 40)).save(folder / "control" / "4.png")
    index = tmp_path / "index.json"

    def found() -> Any:
        return open_pictures(folder, conditioning_column="conditioning_image", index=index)

    pictures = found()
    assert len(pictures) == len(pictures.conditionings) == 10 and not pictures.notes
    assert "not a picture of a kind" in pictures.broken["3.png"]
    assert "80 x 40 pixels, another shape than the picture's 40 x 40" in pictures.broken["4.png"]
    assert np.array_equal(pictures.read_conditioning(0)[::-2, ::-2], pictures.read(0))
    Image.new("RGB", (80, 80)).save(folder / "control" / "4.png")  # the index sees that it has changed
    assert len(found()) == 11
    (folder / "control" / "0.png").unlink()
    with pytest.raises(UserError, match=r"control picture of 0\.png can't be read any more"):
        pictures.read_conditioning(0)
    with pytest.raises(UserError, match=r"line 1 names control/0\.png, which is not there"):
        found()
    lines = (folder / "metadata.jsonl").read_text().replace('"control/0.png"', '"../../0.png"')
    (folder / "metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match="outside of"):
        found()
    (folder / "metadata.jsonl").write_text(lines.replace('"../../0.png"', "3"))
    with pytest.raises(UserError, match="line 1 has '3' for conditioning_image, which is no text"):
        found()
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"0\.png has no conditioning_image: control pictures are a column of"
    ):
        found()


def test_a_saved_dataset_has_a_column_of_control_pictures(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [Image.new("RGB", (40, 40), (20 * k, 90, 30)) for k in range(4)]
    controls = [Image.new("RGB", (80, 80), (30, 90, 20 * k)) for k in range(4)]
    features = datasets.Features(
        {"image": datasets.Image(), "conditioning_image": datasets.Image(), "text": datasets.Value("string")}
    )
    made = {"image": rows, "conditioning_image": controls, "text": ["a cat"] * 4}
    datasets.Dataset.from_dict(made, features=features).save_to_disk(str(tmp_path / "saved"))
    found = open_pictures(tmp_path / "saved", conditioning_column="conditioning_image")
    assert found.read_conditioning(2)[0, 0].tolist() == [30, 90, 40] and found.read(2)[0, 0].tolist() == [
        40,
        90,
        30,
    ]
