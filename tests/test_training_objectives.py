"""What objectives make of captions, masks, posteriors, class pictures and settings, each against what it should be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training_finetune import built, pictures, setup
from tiny import tiny_clip_folder, tiny_t5_folder
from training_runs import first_stage_config, write_config

from ldm.checkpoints.files import read_metadata
from ldm.conditioning.load import load_text_encoder
from ldm.conditioning.tokenizer import text_ids
from ldm.data.masks import random_mask
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.packed import unpack
from ldm.models.perceptual import EfficientNetLite0
from ldm.training import cli, reconstruction
from ldm.training.data.conditions import Conditions
from ldm.training.distributed import BatchGenerator
from ldm.training.objectives import autoencoder
from ldm.training.run import read_run, train
from pipelines import TextToImagePipeline

WHOLE = slice(0, 8)
LONG = "a cat " * 100  # of more tokens than a window has

# What a loss is made of


def test_the_inpainting_loss_is_that_of_diffusers_scripts(tmp_path: Path) -> None:
    """The U-Net sees the noised latents, the mask (1: to be drawn) and the rest's latents, in this order."""
    import diffusers

    exact = {"encoding": "float32"}
    path, base = setup(tmp_path, "inpaint", inpainting=True, data=exact, condition_dropout=0.0)
    ours = built(path)
    batch = ours.batch(0, 8, WHOLE)
    value, _ = ours.loss(ours.model, batch, BatchGenerator(5, 8, WHOLE))

    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(base, safety_checker=None)
    draws = BatchGenerator(5, 8, WHOLE)
    draws.uniform()
    noise, timesteps = draws.normal(4, 16, 16), (draws.uniform() * 1000).long()
    seeds = (draws.uniform() * 2**24).long().tolist()
    masks = torch.from_numpy(np.stack([random_mask(32, 32, np.random.default_rng(s)) for s in seeds]))
    masks = masks[:, None].float()
    assert batch.pictures is not None
    with torch.no_grad():
        rest = batch.pictures * (masks < 0.5)
        known = pipe.vae.encode(rest).latent_dist.mean * pipe.vae.config.scaling_factor
        hidden, _ = pipe.encode_prompt(batch.captions, "cpu", 1, do_classifier_free_guidance=False)
        noisy = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).add_noise(
            batch.latents, noise, timesteps
        )
        seen = torch.cat([noisy, F.interpolate(masks, size=(16, 16)), known], dim=1)
        expected = F.mse_loss(pipe.unet(seen, timesteps, hidden).sample, noise)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_share_of_captions_that_is_left_out_is_the_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = setup(tmp_path, condition_dropout=0.25)
    objective = built(path)
    batch, left_out = objective.batch(0, 8, WHOLE), list[torch.Tensor]()
    plain = Conditions.__call__

    def noting(self: Conditions, captions: list[str], dropped: torch.Tensor) -> Any:
        left_out.append(dropped)
        return plain(self, captions, dropped)

    monkeypatch.setattr(Conditions, "__call__", noting)
    with torch.no_grad():
        for seed in range(12):
            objective.loss(objective.model, batch, BatchGenerator(seed, 8, WHOLE))
    share = torch.stack(left_out).float().mean().item()
    assert 0.15 < share < 0.35
    assert torch.equal(left_out[3], BatchGenerator(3, 8, WHOLE).uniform() < 0.25)


def test_captions_of_the_config_come_at_random(tmp_path: Path) -> None:
    given = ["a cat", "the dog", "a photo"]
    objective = built(setup(tmp_path, data={"captions": given})[0])
    batch = objective.batch(0, 8, WHOLE)
    chosen = [each for seed in range(30) for each in batch.draw_captions(BatchGenerator(seed, 8, WHOLE))]
    assert all(60 < chosen.count(each) < 100 for each in given) and len(chosen) == 240
    assert len(set(batch.draw_captions(BatchGenerator(0, 8, WHOLE)))) > 1  # within a batch, too


# Text


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("build", [tiny_clip_folder, tiny_t5_folder])
def test_every_caption_takes_the_same_windows(tmp_path: Path, build: Any, windows: int) -> None:
    """Beside a long one a short one's condition stays what it is; what is longer is cut and told, and all is cached."""
    text = load_text_encoder(build(tmp_path))
    conditions = Conditions(text, windows, tmp_path / "cache")
    plain = Conditions(text, windows)
    captions = ["a cat", LONG]
    for each in (conditions, plain):
        each.prepare(captions)
    kept = torch.tensor([False, False])
    both, alone = plain(captions, kept).hidden, plain(["a cat"], kept[:1]).hidden
    room = text.window.stretched(windows * text.window.capacity).size if text.stretches else None
    assert both.shape[1] == alone.shape[1] == (room or windows * text.window.size)
    torch.testing.assert_close(both[0], alone[0], rtol=1e-4, atol=1e-5)
    ids = text.tokenize(LONG)[: windows * text.window.capacity]
    first = Conditions(text, windows)
    first.text.tokenize = lambda caption: ids  # type: ignore[attr-defined]
    torch.testing.assert_close(both[1], first(["what fits"], kept[:1]).hidden[0], rtol=1e-4, atol=1e-5)
    text.module.forward = None  # type: ignore[assignment]
    torch.testing.assert_close(conditions(captions, kept).hidden, both, rtol=2e-3, atol=2e-3)  # float16
    (note,) = conditions.notes()
    size = text.window.size
    room = f"one window of {size}" if windows == 1 else f"2 windows of {size}"
    assert note.startswith(f"1 caption is longer than {room} tokens and was cut")
    assert 'first "a cat a cat' in note
    assert plain.notes() == conditions.notes()
    again = Conditions(text, windows, tmp_path / "cache")
    again.prepare(captions)
    assert again.notes() == conditions.notes()  # also where nothing was left to compute


def test_states_in_a_cache_are_of_the_very_tokens(tmp_path: Path) -> None:
    """A text that comes to be read otherwise (cleaned, say) is computed anew; one that is read alike is not."""
    text, kept = load_text_encoder(tiny_clip_folder(tmp_path)), torch.tensor([False])
    first = Conditions(text, cache=tmp_path / "cache")
    first.prepare(["don’t"])
    old = first(["don’t"], kept).hidden
    text.tokenize = lambda caption: text_ids(text.tokenizer, caption.replace("’", " "))
    other = Conditions(text, cache=tmp_path / "cache")
    other.prepare(["don’t"])
    assert (other(["don’t"], kept).hidden - old).abs().max() > 1e-2
    text.module.forward = None  # type: ignore[assignment]
    other.prepare(["don t"])  # the same tokens


def test_states_in_a_cache_are_of_the_very_encoder(tmp_path: Path) -> None:
    text, kept = load_text_encoder(tiny_clip_folder(tmp_path)), torch.tensor([False])

    def cached() -> torch.Tensor:
        conditions = Conditions(text, cache=tmp_path / "cache")
        conditions.prepare(["a cat"])
        return conditions(["a cat"], kept).hidden

    before = cached()
    unpack(text.module)
    with torch.no_grad():
        for parameter in text.module.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(cached(), before, atol=0.1)
    torch.testing.assert_close(cached(), Conditions(text)(["a cat"], kept).hidden, rtol=2e-3, atol=2e-3)
    one, two = (Conditions(text, windows, tmp_path / "cache") for windows in (1, 2))
    two.prepare(["a cat"])
    assert two(["a cat"], kept).hidden.shape[1] == 2 * one(["a cat"], kept).hidden.shape[1]


def test_a_run_tells_which_captions_it_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = setup(tmp_path, train={"kind": "lora", "rank": 2})
    lines = [{"file_name": f"{k}.png", "text": "a cat" if k % 3 else f"{k} {LONG}"} for k in range(12)]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert train(path, ["loop.pictures=8"])
    told = "4 captions are longer than one window of 77 tokens and were cut"
    assert told in capsys.readouterr().out
    assert train(path, ["loop.pictures=8", "text_to_image.caption_windows=9", f"output={tmp_path / 'more'}"])
    assert "were cut" not in capsys.readouterr().out


def test_a_pair_of_vectors_keeps_its_word(tmp_path: Path) -> None:
    """SDXL's names leave no room for it."""
    token = {"placeholder_token": "<toy>", "initializer_token": "cat", "num_vectors": 2}
    path, base = setup(
        tmp_path, "sdxl", train={"kind": "textual_inversion", **token}, data={"captions": ["a <toy>"]}
    )
    assert train(path, ["loop.pictures=8"])
    file = tmp_path / "run" / "export" / "learned_embeds.safetensors"
    assert read_metadata(file).keys() == {"format", "config", "word"}
    pipe = TextToImagePipeline.from_pretrained(base, device="cpu")
    assert pipe.load_textual_inversion(file) == ["<toy>"]


# Latents


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_latents_are_drawn_from_the_posterior_where_that_is_asked_for(tmp_path: Path, family: Any) -> None:
    """With a cache and without; the same draw at the same place, another in the next turn and for another seed."""
    options: dict[str, Any] = {"sample_posterior": True, "encoding": "float32", "flip": True}
    path, _ = setup(tmp_path, family, data=options)
    plain = built(path)
    cached = built(setup(tmp_path, family, data={**options, "cache": str(tmp_path / "cache")})[0])
    mean = built(setup(tmp_path, family, data={**options, "sample_posterior": False})[0])
    batches = [plain.batch(start, 8, WHOLE) for start in (0, 8, 16)]
    for start in (16, 0, 8):
        batch = cached.batch(start, 8, WHOLE)
        torch.testing.assert_close(batch.latents, batches[start // 8].latents, rtol=2e-2, atol=2e-2)
        assert torch.equal(batch.latents, cached.batch(start, 8, WHOLE).latents)
    part = plain.batch(8, 8, slice(2, 5)).latents
    torch.testing.assert_close(part, batches[1].latents[2:5], rtol=1e-4, atol=1e-5)
    # Far from the mean by what the encoder's own deviation says, seen as the U-Net sees it
    given = plain.source._pictures(0, 8, WHOLE)  # type: ignore[attr-defined]
    vae = plain.system.autoencoder
    with torch.no_grad():
        posterior = vae.encode(given)
    noise = plain.source._noise(0, 8, WHOLE, (4, 16, 16))  # type: ignore[attr-defined]
    torch.testing.assert_close(batches[0].latents, vae.scale(posterior.sample(noise)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        mean.batch(0, 8, WHOLE).latents, vae.scale(posterior.mean), rtol=1e-4, atol=1e-5
    )
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    turns = torch.stack([plain.source._noise(start, 8, WHOLE, (4,)) for start in (0, 8, 16)])  # type: ignore[attr-defined]
    assert len(turns.flatten().unique()) == turns.numel()


def test_pictures_are_encoded_in_the_precision_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, used = AutoencoderKL.encode, list[torch.dtype | None]()

    def encode(self: AutoencoderKL, picture: torch.Tensor) -> Any:
        used.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return plain(self, picture)

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    for encoding, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        objective = built(setup(tmp_path, inpainting=True, data={"encoding": encoding})[0])
        batch = objective.batch(0, 8, WHOLE)
        objective._masked(batch, BatchGenerator(0, 8, WHOLE))
        assert len(used) >= 2 and set(used) == {dtype}
        used.clear()


# Class pictures


def test_class_pictures_of_something_else_are_not_taken(tmp_path: Path) -> None:
    prior = {"prompt": "a cat", "folder": str(tmp_path / "class"), "pictures": 3, "steps": 1}
    path, _ = setup(tmp_path, train={"kind": "lora", "rank": 2}, prior=prior)
    built(path)
    built(path)
    for key, value in (("prompt", "the dog"), ("steps", 2), ("guidance", 2.0)):
        with pytest.raises(UserError, match=rf"drawn otherwise \({key} is .*another folder, or delete it"):
            read_run(path, [f"text_to_image.prior.{key}={value}"]).objective()
    origin = tmp_path / "class" / "class.json"
    assert json.loads(origin.read_text())["prompt"] == "a cat"
    origin.write_text(origin.read_text().replace('"model": "', '"model": "f'))
    with pytest.raises(UserError, match=r"drawn otherwise \(model is"):
        read_run(path).objective()
    origin.write_text("{half")
    with pytest.raises(UserError, match="drawn otherwise"):
        read_run(path).objective()
    # Pictures of one's own are for any prompt.
    for k, drawn in enumerate(sorted((tmp_path / "class").glob("class-*.png"))):
        drawn.rename(tmp_path / "class" / f"mine-{k}.png")
    objective = built(path)
    assert objective.batch(0, 8, WHOLE).captions[1] == "a cat"
    assert not list((tmp_path / "class").glob("class-*.png"))


# Settings


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["data.resolution=33"], "text_to_image.data: resolution is 33: make it a multiple of 4"),
        (["data.resolution=0"], "text_to_image.data.resolution is 0"),
        (["data.max_ratio=0.5"], "text_to_image.data: max_ratio is 0.5"),
        (["data.crop=random", "data.cache=cache"], "can't be cached"),
        (["data.path=nowhere"], "text_to_image.data.path: nowhere is not there"),
        (["data.caption_column=words"], "text_to_image.data: "),
        (["data.seed=-1"], "text_to_image.data.seed is -1"),
        (["frozen=float16"], "is for GPUs"),
        (["frozen=bfloat16", "data.encoding=float32"], "encoding float32 needs"),
        (["validation.prompts=[a cat]", "validation.steps=2000"], "text_to_image.validation.steps: "),
        (["validation.steps=0"], "text_to_image.validation.steps is 0"),
        (["validation.seeds=0"], "text_to_image.validation.seeds is 0"),
        (["condition_dropout=5"], "condition_dropout is 5"),
        (["caption_windows=0"], "text_to_image.caption_windows is 0"),
        (["loss.gamma=-1"], "text_to_image.loss.gamma is -1"),
        (["loss.variance=-1"], "text_to_image.loss.variance is -1"),
        (["scheduler.beta_start=x"], "beta_start must be like"),
        (["scheduler.beta_start=2"], "betas of a noise schedule"),
        (["prior.prompt=a cat", "prior.folder=class", "prior.steps=0"], "text_to_image.prior.steps is 0"),
        (
            ["prior.prompt=a cat", "prior.folder=class", "prior.steps=2000"],
            "text_to_image.prior.steps: ",
        ),
    ],
)
def test_a_dry_run_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], complaint: str
) -> None:
    path, _ = setup(tmp_path)
    changes = [f"text_to_image.{each}" for each in changes]
    assert cli.main(["--config", str(path), "--dry-run", "--set", *changes]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and complaint in error


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"text_encoder", "text_encoder_2", "vae"}),
        ({"train": {"kind": "lora", "rank": 2}}, {"text_encoder", "text_encoder_2", "vae"}),
        ({"train": {"kind": "lora", "rank": 2, "text_encoder": True}}, {"vae"}),
    ],
)
def test_the_helpers_are_what_is_frozen_beside_the_model(
    tmp_path: Path, settings: dict[str, Any], names: set[str]
) -> None:
    objective = read_run(setup(tmp_path, "sdxl", **settings)[0]).objective()
    helpers = objective.helpers()
    assert helpers.keys() == names
    inside = {id(each) for each in objective.model.parameters()}
    assert not any(p.requires_grad or id(p) in inside for each in helpers.values() for p in each.parameters())


# A first stage on pictures of one's own


@pytest.fixture
def perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())


def first_stage(folder: Path, sprites: str, **changes: Any) -> autoencoder.Objective:
    from test_training_first_stage import MODELS

    from ldm.training.data.on_disk import PicturesConfig

    cut = {"path": str(pictures(folder / "pictures", 25)), "resolution": 32, "crop": "random", "flip": True}
    settings = {"data": PicturesConfig(**{**cut, **changes.pop("data", {})})}
    settings |= {"model": MODELS["model"], "perceptual": 0.0, **changes}
    return autoencoder.Objective(first_stage_config(sprites, **settings))


def test_a_first_stage_learns_from_pictures_of_ones_own(
    tmp_path: Path, sprites: str, perceptual: None
) -> None:
    """Random cuts, anew in each turn, of all but the last tenth, which it is validated on."""
    objective = first_stage(tmp_path, sprites)
    assert set(objective.helpers()) == {"perceptual"}
    batches = [objective.batch(start, 8, WHOLE).pictures for start in range(0, 8 * 23, 8)]
    assert all(each.shape == (8, 3, 16, 16) for each in batches)
    fresh = first_stage(tmp_path, sprites)
    assert torch.equal(fresh.batch(64, 8, slice(3, 5)).pictures, batches[8][3:5])
    # 25 pictures, of one colour around another: two are held out, each of the others comes eight times
    corners = torch.cat(batches)
    assert len(corners.flatten(1).unique(dim=0)) > 100
    order = objective.examples._order  # type: ignore[attr-defined]
    shown = [index for _, index in order.places(0, 8 * 23)]
    assert {shown.count(i) for i in range(23)} == {8} and max(shown) == 22
    assert objective.examples.held_out == 2 and objective.examples.count == 25
    (held,) = objective._whole(objective.model, 2)
    found = objective.examples.found  # type: ignore[attr-defined]
    assert held.pictures.shape == (2, 3, 32, 32) and found.items[24].name == "24.png"
    corner = (held.pictures[0, :, 0, 0] * 127.5 + 127.5).round()
    assert corner.tolist() == found.read(24)[0, 0].tolist()
    assert objective.validate(objective.model.eval(), tmp_path, 7).keys() == {"psnr", "perceptual_distance"}
    objective.export(objective.model, tmp_path / "export")  # fewer than the statistics would like
    assert objective.notes()[-1] == "the last 2 of 25 pictures were kept for validation"
    whole = first_stage(tmp_path, sprites, crop=None).batch(0, 8, WHOLE)
    assert whole.pictures.shape == (8, 3, 32, 32) and whole.labels is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": {"path": "nowhere"}}, "autoencoder.data.path: nowhere is not there"),
        ({"data": {"captions": ("a cat",)}}, "autoencoder.data.captions is for a U-Net"),
        ({"data": {"max_ratio": 2.0}}, "autoencoder.data.max_ratio is for a U-Net"),
        (
            {"data": {"resolution": 33}, "crop": None},
            "data.resolution is 33: make it a multiple of 2",
        ),
        ({"crop": 34}, "autoencoder.crop is 34, more than autoencoder.data.resolution, 32"),
        ({"crop": 15}, "autoencoder.crop is 15: make it a multiple of 2"),
        ({"noise": -1.0}, "autoencoder.noise is -1"),
    ],
)
def test_first_stages_on_pictures_that_cannot_be_are_refused(
    tmp_path: Path, sprites: str, perceptual: None, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        first_stage(tmp_path, sprites, **changes)


def test_a_first_stage_needs_more_than_one_picture_and_new_keys(tmp_path: Path, sprites: str) -> None:
    sections = {"loop": {"pictures": 8}, "autoencoder": {"pictures": {"path": "p", "resolution": 32}}}
    with pytest.raises(
        UserError, match=r"'autoencoder.pictures' is called autoencoder.data, with kind: pictures"
    ):
        read_run(write_config(tmp_path, sections))
    folder = pictures(tmp_path / "one", 1)
    with pytest.raises(UserError, match="there is one picture, and one is held out"):
        first_stage(tmp_path, sprites, data={"path": str(folder)})
