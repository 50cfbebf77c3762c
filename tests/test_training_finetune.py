"""Fine-tuning tiny pipelines on pictures made here: whole, LoRA, a token, inpainting, DreamBooth, several processes."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import BATCHES, same_bits_after_kills
from PIL import Image
from tiny import Family, tiny_pipeline_folder
from training_runs import LOOP, side_by_side, state, write_config

from ldm.checkpoints.files import read_tensors
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.training import cli
from ldm.training.distributed import BatchGenerator
from ldm.training.loop import LoopConfig, Trainer
from ldm.training.objectives import text_to_image
from ldm.training.optimization import OptimizerConfig
from ldm.training.run import read_run, train
from pipelines import TextToImagePipeline

TRAIN = "text_to_image.train"
LORA = f"{TRAIN}={{kind: lora, rank: 2}}"
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def pictures(folder: Path, count: int = 12, side: int = 40) -> Path:
    """Coloured squares with captions; with one that is broken."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for k in range(count):
        pixels = np.full((side, side, 3), rng.integers(0, 256, 3), np.uint8)
        pixels[8:24, 8:24] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        lines.append(
            json.dumps({"file_name": f"{k}.png", "text": ["a cat", "the dog", "a photo of a cat"][k % 3]})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def setup(
    tmp: Path, family: Family = "sd1", loop: dict[str, Any] | None = None, **objective: Any
) -> tuple[Path, Path]:
    """A config file and the folder of the model it starts from."""
    base = tmp / "models" / family
    if not base.exists():
        tiny_pipeline_folder(tmp / "models", family, objective.pop("saved_scheduler", None))
    cut = {
        "kind": "pictures",
        "path": str(pictures(tmp / "pictures")),
        "resolution": 32,
        **objective.pop("data", {}),
    }
    optimizer = {"learning_rate": 1e-3, "warmup": 0}
    sections = {
        "loop": {**LOOP, "optimizer": optimizer, "validate_every": 1000, **(loop or {})},
        "text_to_image": {"base": str(base), "data": cut, **objective},
    }
    return write_config(tmp, sections), base


def built(path: Path, batch: int = 8) -> text_to_image.Objective:
    objective = read_run(path).objective()
    assert isinstance(objective, text_to_image.Objective)
    objective.prepare(torch.device("cpu"), batch)
    return objective


def psnr(ours: Any, theirs: Any) -> float:
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(10 * np.log10(1 / max(np.square(difference).mean(), 1e-20)))


# The numbers


@pytest.mark.parametrize(
    ("family", "scheduler", "loss"),
    [
        ("sd1", {}, {}),
        ("sd1", {}, {"weighting": "min_snr"}),
        ("sd2", {"prediction_type": "v_prediction"}, {}),
        ("sd2", {"prediction_type": "v_prediction"}, {"weighting": "min_snr"}),
        ("sd2", V, {}),
        ("sdxl", {}, {}),
        ("refiner", {}, {}),
        ("sd1", {}, {"offset_noise": 0.1, "input_perturbation": 0.1}),
    ],
)
def test_loss_and_gradients_are_those_of_diffusers_scripts(
    tmp_path: Path, family: Family, scheduler: dict[str, Any], loss: dict[str, Any]
) -> None:
    """Their formulas, modules, scheduler and conditions, written out, on the same weights, noise and timesteps."""
    import diffusers
    from diffusers.training_utils import compute_snr

    flip = {"flip": family == "sdxl"}
    path, base = setup(
        tmp_path, family, saved_scheduler=scheduler, loss=loss, data=flip, condition_dropout=0.0
    )
    ours = built(path)
    batch = ours.batch(0, 8, slice(0, 8))
    value, _ = ours.loss(ours.model, batch, BatchGenerator(5, 8, slice(0, 8)))
    value.backward()

    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(base)
    draws = BatchGenerator(5, 8, slice(0, 8))
    draws.uniform()
    noise, timesteps = draws.normal(4, 16, 16), (draws.uniform() * 1000).long()
    if shift := loss.get("offset_noise"):
        noise = noise + shift * draws.normal(4, 1, 1)
    seen = noise + 0.1 * draws.normal(4, 16, 16) if loss.get("input_perturbation") else noise
    training = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    added: dict[str, Any] = {}
    with torch.no_grad():
        if family in ("sdxl", "refiner"):
            hidden, _, pooled, _ = pipe.encode_prompt(batch.captions, do_classifier_free_guidance=False)
            sizes = batch.time_ids
            assert sizes[0].tolist() == [40, 40, 0, 0, 32, 32]
            if family == "refiner":  # the aesthetic score of pictures that are not rated
                sizes = torch.cat([sizes[:, :4], torch.full((8, 1), 6.0)], dim=1)
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        else:
            hidden, _ = pipe.encode_prompt(batch.captions, "cpu", 1, do_classifier_free_guidance=False)
    output = pipe.unet(training.add_noise(batch.latents, seen, timesteps), timesteps, hidden, **added).sample
    is_v = training.config.prediction_type == "v_prediction"
    target = training.get_velocity(batch.latents, noise, timesteps) if is_v else noise
    errors = torch.nn.functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    if loss.get("weighting"):
        snr = compute_snr(training, timesteps)
        errors = errors * snr.clamp(max=5.0) / (snr + 1 if is_v else snr)
    errors.mean().backward()

    assert value.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    theirs = {name: each.grad for name, each in pipe.unet.named_parameters()}
    found = {name: each.grad for name, each in ours.trained.unet.named_parameters()}
    assert theirs.keys() == found.keys()
    difference = torch.cat([(found[n] - theirs[n]).flatten() for n in theirs])
    assert difference.norm() < 1e-5 * torch.cat([each.flatten() for each in theirs.values()]).norm()


def test_captions_are_left_out_as_at_sampling(tmp_path: Path) -> None:
    """The empty prompt; zeros where the pipeline has them for no negative prompt, as SDXL's."""
    for family in ("sd1", "sdxl"):
        path, _ = setup(tmp_path / family, family, data={"cache": str(tmp_path / family / "cache")})
        conditions = built(path).conditions
        dropped = torch.tensor([True, False])
        found = conditions(["a cat", "a cat"], dropped)
        empty, kept = conditions.text.encode(["", "a cat"])[0].hidden
        expected = torch.zeros_like(empty) if family == "sdxl" else empty
        torch.testing.assert_close(found.hidden[0], expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.hidden[1], kept, atol=1e-3, rtol=1e-3)


# Kinds of fine-tuning


def test_a_lora_draws_the_same_picture_in_diffusers(tmp_path: Path) -> None:
    import diffusers

    lora = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "attention+conv", "text_encoder": True}
    path, base = setup(tmp_path, train=lora)
    before = {p: p.read_bytes() for p in base.rglob("*.safetensors")}
    assert train(path)
    trained = state(tmp_path / "run")
    assert {name.split(".")[0] for name in trained} == {"model", "ema", "optimizer"}
    assert all("adapters." in name for name in trained)
    assert all(p.read_bytes() == content for p, content in before.items())
    file = tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors"
    ours = TextToImagePipeline.from_pretrained(base, device="cpu")
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    plain = ours("a cat", seed=1, **call).images
    ours.adapters.load_lora(file)
    changed = ours("a cat", seed=1, **call).images
    assert psnr(plain, changed) < 40
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    theirs.load_lora_weights(str(file.parent))
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs("a cat", generator=torch.Generator().manual_seed(1), height=32, width=32, **call).images
    assert psnr(changed, drawn) > 60


def test_a_word_is_all_that_textual_inversion_trains(tmp_path: Path) -> None:
    import diffusers

    token = {"placeholder_token": "<toy>", "initializer_token": "cat", "num_vectors": 2}
    path, base = setup(
        tmp_path, train={"kind": "textual_inversion", **token}, data={"captions": ["a <toy>", "the <toy>"]}
    )
    assert train(path)
    names = {name for name in state(tmp_path / "run") if name.startswith("model.")}
    assert len(names) == 1 and next(iter(names)).endswith("rows")
    file = tmp_path / "run" / "export" / "learned_embeds.safetensors"
    (vectors,) = read_tensors(file).values()
    start = TextToImagePipeline.from_pretrained(base, device="cpu").system.text.modules["text_encoder"]
    table = start.get_input_embeddings().weight  # type: ignore[operator]
    assert vectors.shape == (2, table.shape[1]) and not (vectors[:, None] == table).all(-1).any()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_textual_inversion(str(file))
    assert pipe.tokenizer.convert_tokens_to_ids("<toy>_1") > pipe.tokenizer.convert_tokens_to_ids("<toy>")


def test_the_text_encoder_trains_with_the_whole(tmp_path: Path) -> None:
    path, base = setup(
        tmp_path, train={"kind": "unet", "text_encoder": True}, validation={"prompts": ["a cat"], "steps": 2}
    )
    assert train(path, ["loop.validate_every=64"])
    exported = TextToImagePipeline.from_pretrained(tmp_path / "run" / "export", device="cpu")
    before = TextToImagePipeline.from_pretrained(base, device="cpu")
    for part in ("unet", "text_encoder"):
        old, new = (p.system.modules()[part].state_dict() for p in (before, exported))
        assert any(not torch.equal(old[name], new[name]) for name in old), part
    assert Image.open(tmp_path / "run" / "drawn-00000064.png").size == (32, 64)


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_inpainting_starts_from_either_and_is_what_diffusers_takes(tmp_path: Path, family: Family) -> None:
    import diffusers

    validation = {"prompts": ["a cat", "the dog"], "steps": 2}
    path, _ = setup(tmp_path, family, inpainting=True, validation=validation)
    objective = built(path)
    before = objective.trained.network.conv_in.weight.detach().clone()
    assert before.shape[1] == 9
    if family == "sd1":
        assert not before[:, 4:].any()  # so that training starts from the picture that the base would draw
    batch = objective.batch(0, 8, slice(0, 8))
    known = objective._masked(batch, BatchGenerator(0, 8, slice(0, 8)))
    masks, latents = known[:, :1], known[:, 1:]
    assert masks.shape == (8, 1, 16, 16) and set(masks.unique().tolist()) <= {0.0, 1.0} and masks.any()
    assert latents.shape == batch.latents.shape
    assert train(path, ["loop.validate_every=64"])
    ours = TextToImagePipeline.from_pretrained(tmp_path / "run" / "export", device="cpu")
    assert ours("a cat", num_inference_steps=2, progress=False).images[0].size == (32, 32)
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "run" / "export")
    pipe.set_progress_bar_config(disable=True)
    picture = Image.open(tmp_path / "pictures" / "0.png").resize((32, 32))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    drawn = pipe("a cat", picture, mask, height=32, width=32, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3) and np.isfinite(drawn).all()


def test_class_pictures_stand_beside_the_instances(tmp_path: Path) -> None:
    """Drawn once; the loss is the sum of both means, the class's weighed; rows alternate however they are shared."""
    prior = {"prompt": "a cat", "folder": str(tmp_path / "class"), "pictures": 5, "weight": 0.5, "steps": 2}
    path, _ = setup(
        tmp_path,
        train={"kind": "lora", "rank": 2},
        prior=prior,
        data={"captions": ["the dog"]},
        condition_dropout=0.0,
    )
    objective = built(path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "class").glob("*.png")}
    assert len(files) == 5 and Image.open(next(iter(files))).size == (32, 32)
    batch = objective.batch(0, 8, slice(0, 8))
    assert batch.draw_captions(BatchGenerator(0, 8, slice(0, 8))) == ["the dog", "a cat"] * 4
    part = objective.batch(0, 8, slice(4, 8))
    assert torch.equal(part.latents, batch.latents[4:])
    value, logs = objective.loss(objective.model, batch, BatchGenerator(0, 8, slice(0, 8)))
    assert value.item() == pytest.approx((logs["instance"] + 0.5 * logs["prior"]).item())
    assert train(path, ["loop.pictures=16"])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "class").glob("*.png")} == files
    with pytest.raises(UserError, match="in pairs"):
        objective.batch(0, 8, slice(3, 8))


def test_a_learned_variance_trains_from_nothing_and_draws(tmp_path: Path) -> None:
    base = tiny_pipeline_folder(tmp_path / "models", "sd1")
    unet = json.loads((base / "unet" / "config.json").read_text())
    named = {
        key: unet[key] for key in ("sample_size", "block_out_channels", "down_block_types", "up_block_types")
    }
    named |= {"layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 32}
    new = {
        "autoencoder": str(base),
        "text_encoder": str(base),
        "unet": {**named, "out_channels": 8},
        "steps": 2,
    }
    data = {"kind": "pictures", "path": str(pictures(tmp_path / "pictures")), "resolution": 32}
    settings = {"base": new, "loss": {"variance": 0.001}, "data": data}
    path = write_config(tmp_path, {"loop": LOOP, "text_to_image": settings})
    assert train(path)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "export", device="cpu")
    assert pipe("a cat", seed=0).images[0].size == (32, 32)
    with pytest.raises(UserError, match="set out_channels to 4"):
        train(path, ["text_to_image.loss.variance=0"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["text_to_image.base=null"], "expected str or keys and values"),
        (["text_to_image.data=null"], "expected keys and values"),
        (["text_to_image.inpainting=true", LORA], "inpainting trains the whole"),
        (
            [f"{TRAIN}={{kind: textual_inversion, placeholder_token: <x>, rank: 2}}"],
            "goes with text_to_image",
        ),
        (
            [f"{TRAIN}={{kind: textual_inversion, word: <x>}}"],
            "is called text_to_image.train.placeholder_token",
        ),
        (["text_to_image.data.path=nowhere"], "nowhere"),
        ([LORA, "text_to_image.train.targets=to_z"], "match no layer"),
        # Keys of before
        (["text_to_image.pictures.path=x"], "text_to_image.data, with kind: pictures now"),
        (["text_to_image.lora.rank=2"], "text_to_image.train, with kind: lora now"),
        (["text_to_image.word.word=x"], "text_to_image.train, with kind: textual_inversion now"),
        (["text_to_image.text_encoder=true"], "text_to_image.train.text_encoder, with kind: unet now"),
        (["text_to_image.new.steps=2"], "'text_to_image.new' is called text_to_image.base now"),
        (["text_to_image.windows=2"], "text_to_image.caption_windows now"),
        (
            [
                "text_to_image.scheduler.prediction_type=epsilon",
                "text_to_image.scheduler.rescale_betas_zero_snr=true",
            ],
            "zero terminal SNR",
        ),
        (["text_to_image.data.resolution=33"], "33"),
        ([LORA, "text_to_image.train.rnak=2"], "did you mean rank"),
        (["loop.batch_size=9", "loop.gradient_accumulation_steps=2"], "multiple of 2"),
        (["loop.batch_size=0"], "make it 1 or more"),
        (["loop.precision=fp16"], "is for GPUs"),
        (["text_to_image.frozen=float16"], "is for GPUs"),
    ],
)
def test_what_cannot_be_is_said_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], complaint: str
) -> None:
    path, _ = setup(tmp_path)
    assert cli.main(["--config", str(path), "--set", *changes]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and complaint in error


# Data


def test_caches_change_nothing_and_are_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = setup(tmp_path)
    without = built(path)
    plain = without.batch(0, 8, slice(0, 8))
    path, _ = setup(tmp_path, data={"cache": str(tmp_path / "cache")})
    first = built(path).batch(0, 8, slice(0, 8))
    assert first.captions == plain.captions
    torch.testing.assert_close(first.latents, plain.latents, rtol=1e-2, atol=2e-2)
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    again = built(path)
    monkeypatch.setattr(type(again.conditions.text), "encode", None)
    assert torch.equal(again.batch(0, 8, slice(0, 8)).latents, first.latents)
    assert again.conditions(first.captions, torch.zeros(8, dtype=torch.bool)).hidden.shape[0] == 8


def test_broken_pictures_are_named_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = setup(tmp_path, train={"kind": "lora", "rank": 2})
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    assert train(path, ["loop.pictures=16"])
    out = capsys.readouterr().out
    assert "3.png" in out and "1 broken pictures were skipped" in out


# Ends and processes


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("lora", 1),
        pytest.param("lora", 2, marks=pytest.mark.slow),
        pytest.param("full", 1, marks=pytest.mark.slow),
        pytest.param("bf16", 2, marks=pytest.mark.slow),
        *(pytest.param(kind, 5, marks=pytest.mark.slow) for kind in ("lora", "full", "bf16")),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, kind: str, kills: int) -> None:
    objective: dict[str, Any] = (
        {"train": {"kind": "lora", "rank": 2, "dropout": 0.1}} if kind == "lora" else {}
    )
    loop = {"pictures": 2 * BATCHES * kills, "batch_size": 2, "save_every": 2}
    loop |= {"precision": "bf16" if kind == "bf16" else "no"}
    paths: list[Path] = []
    for name in ("whole", kind):
        cache = {"cache": str(tmp_path / name / "cache")} if kind == "bf16" else {}
        drawn = {"flip": True, "sample_posterior": kind == "full"}
        paths.append(setup(tmp_path / name, loop=loop, data={**cache, **drawn}, **objective)[0])
    same_bits_after_kills(*paths, kills)


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_do_what_one_does(tmp_path: Path, sharded: bool) -> None:
    """With DDP, and with FSDP2, which saves, stops and resumes: every figure, and the averages, but for rounding."""
    loop = {
        "pictures": 8,
        "batch_size": 4,
        "log_every": 4,
        "save_every": 1000,
        "optimizer": {"learning_rate": 1e-4, "warmup": 4},
    }
    paths = [setup(tmp_path / name, loop=loop)[0] for name in ("one", "two")]
    assert train(paths[0])
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "TransformerBlock,ResnetBlock",
    }
    side_by_side(
        f"""
        import os
        os.environ.update({environment if sharded else {}!r})
        from ldm.training.loop import Trainer
        import ldm.emoji.pools
        from ldm.training.run import train
        from torch.distributed.tensor import DTensor
        step = Trainer.step
        def checked(self):
            assert {sharded} == any(isinstance(p, DTensor) for p in self.model.parameters())
            return step(self)
        Trainer.step = checked
        assert not train({str(paths[1])!r}, ["loop.max_seconds=0"])
        assert train({str(paths[1])!r})
        """
    )
    logs = [[json.loads(x) for x in (path.parent / "run" / "log.jsonl").open()] for path in paths]
    assert [line["seen"] for line in logs[0]] == [line["seen"] for line in logs[1]] == [4, 8]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    ends = [state(path.parent / "run") for path in paths]
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        if name.startswith("ema.") or name.endswith(".exp_avg"):
            torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-3, atol=2e-6, msg=name)
    assert (tmp_path / "two" / "run" / "export" / "model_index.json").exists()


def test_a_dry_run_says_what_is_to_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = setup(tmp_path, train={"kind": "lora", "rank": 2})
    assert cli.main(["--config", str(path), "--dry-run", "--set", "loop.pictures=80"]) == 0
    out = capsys.readouterr().out
    assert "rank: 2" in out and "pictures: 80" in out  # the whole config, overrides and defaults in it
    count = sum(p.numel() for p in read_run(path).objective().model.parameters() if p.requires_grad)
    assert f"{count:,} trained" in out and "10 to come, of 8 pictures" in out and "GiB" in out
    assert not (tmp_path / "run").exists()


def test_recomputing_activations_changes_no_bit(tmp_path: Path) -> None:
    ends = []
    for name, flag in (("plain", "false"), ("recomputed", "true")):
        path, _ = setup(tmp_path / name)
        assert train(path, [f"loop.gradient_checkpointing={flag}", "loop.pictures=16"])
        ends.append(state(tmp_path / name / "run"))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_trains_on_a_gpu(tmp_path: Path, precision: str) -> None:
    path, _ = setup(
        tmp_path, train={"kind": "lora", "rank": 4}, frozen="float16" if precision == "fp16" else "float32"
    )
    assert not train(path, [f"loop.precision={precision}", "loop.max_seconds=0"])
    assert train(path, [f"loop.precision={precision}"])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in log)


def test_the_optimizer_in_8_bits_needs_its_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is there")
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        optimizer = OptimizerConfig(kind="adamw8bit")
        config = LoopConfig(pictures=8, batch_size=8, precision="no", optimizer=optimizer)
        Trainer(built(setup(tmp_path)[0]), config, tmp_path / "run")


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "lora", "rank": 2},
        {"kind": "textual_inversion", "placeholder_token": "<toy>", "initializer_token": "cat"},
    ],
    ids=lambda kind: kind["kind"],
)
def test_what_is_frozen_survives_the_validations_on_the_way(tmp_path: Path, kind: dict[str, Any]) -> None:
    """They draw with the same frozen weights, which a CPU packs for drawing."""
    validation = {"prompts": ["a cat"], "seeds": 1, "steps": 2}
    loop = {"pictures": 48, "validate_every": 16, "log_every": 16}
    data = {"captions": ["a <toy>"]} if "placeholder_token" in kind else {}
    path, _ = setup(tmp_path, loop=loop, train=kind, validation=validation, data=data)
    train(path)  # it ends with an error where the loss is no number
