"""Every file in configs/: it parses, and what it trains can be built."""

from pathlib import Path

import pytest
from test_training_finetune import pictures

import ldm.emoji.pools  # noqa: F401 (the kind of data that some of them name)
from ldm.errors import UserError
from ldm.models.perceptual import EfficientNetLite0
from ldm.training import reconstruction
from ldm.training.distillation.text_model import TaughtTextToImage
from ldm.training.objectives import autoencoder, distillation, text_to_image
from ldm.training.run import read_run

FILES = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
# On pictures: compositions need sprites, which no checkout has.
BUNDLED = [
    path for path in FILES if all(each in path.read_text() for each in ("base: bundled", "kind: pictures"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_parses_and_its_settings_go_together(path: Path) -> None:
    run = read_run(path)
    run.settings.check()
    assert run.output.parts[0] == "runs"


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_what_starts_from_the_bundled_model_can_be_built(path: Path, tmp_path: Path) -> None:
    run = read_run(path)
    few, settings = run.name == "distillation", run.settings
    data, place = (settings.model.data, "distillation.model") if few else (settings.data, run.name)
    overrides = [f"{place}.data.path={pictures(tmp_path / 'pictures', count=4)}"]
    if data.cache:
        overrides.append(f"{place}.data.cache={tmp_path / 'cache'}")
    if not few and settings.prior:
        overrides.append(f"{place}.prior.folder={tmp_path / 'class'}")
    objective = read_run(path, overrides).objective()
    taught = objective.taught if isinstance(objective, distillation.Objective) else objective
    assert isinstance(taught, text_to_image.Objective | TaughtTextToImage) and taught.source.captions
    assert any(each.requires_grad for each in objective.model.parameters())


def test_a_first_stage_on_pictures_of_ones_own_as_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its comment's words; and the second stage's config takes what comes out."""
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())
    by_name = {path.stem: path for path in FILES}
    text = by_name["autoencoder-kl"].read_text()
    (line,) = (line for line in text.splitlines() if "autoencoder.data.path" in line)
    overrides = line.partition("--set ")[2].replace("=...", f"={pictures(tmp_path / 'pictures', 4)}").split()
    run = read_run(by_name["autoencoder-kl"], overrides)
    objective = run.objective()
    assert isinstance(objective, autoencoder.Objective)
    assert objective.batch(0, 2, slice(None)).pictures.shape == (2, 3, 64, 64)
    second = read_run(by_name["latent-diffusion"]).settings
    assert second.base.autoencoder == f"{run.output}/export"
    assert second.base.unet.in_channels == objective.channels
    assert second.base.unet.sample_size * objective.factor == second.data.resolution


def no_network(packages: str) -> EfficientNetLite0:
    raise UserError("cannot fetch it: is the network there?")


def test_without_the_perceptual_networks_package_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without a weight in the loss training goes on without it, which is noted."""
    monkeypatch.setattr(reconstruction, "load_efficientnet", no_network)
    own = [
        "autoencoder.data.kind=pictures",
        f"autoencoder.data.path={pictures(tmp_path / 'pictures', 4)}",
        "autoencoder.data.resolution=64",
    ]
    for path in (each for each in FILES if each.stem in ("autoencoder-kl", "autoencoder-vq")):
        with pytest.raises(UserError, match=r"network there.*--set autoencoder.perceptual=0"):
            read_run(path, own).objective()
        objective = read_run(path, [*own, "autoencoder.perceptual=0"]).objective()
        assert isinstance(objective, autoencoder.Objective) and objective.helpers() == {}
        assert any("without the perceptual distance: cannot fetch it" in note for note in objective.notes())
        assert objective.validate(objective.model.eval(), tmp_path, 0).keys() >= {"psnr"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autoencoder-kl", "no sprites at .*scripts/prepare_data.py"),
        ("autoencoder-vq", "no sprites at .*scripts/prepare_data.py"),
        ("latent-diffusion", "base.autoencoder: there is no folder .*scripts/train.py"),
        ("bundled-unet", "base.autoencoder: there is no folder .*scripts/train.py"),
    ],
)
def test_in_a_fresh_checkout_the_error_names_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (path,) = (each for each in FILES if each.stem == name)
    with pytest.raises(UserError, match=message):
        read_run(path).objective()
