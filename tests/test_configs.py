"""Every file in configs/: it parses, and what it trains can be built."""

from pathlib import Path

import pytest
from test_training_finetune import pictures

from ldm.models.critics import EfficientNetLite0
from ldm.training.objectives import autoencoder, text_to_image
from ldm.training.run import read_run

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
BUNDLED = [path for path in FILES if "base: bundled" in path.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_parses_and_its_settings_go_together(path: Path) -> None:
    run = read_run(path)
    run.settings.check()
    assert run.output.parts[0] == "runs"


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_what_starts_from_the_bundled_model_can_be_built(path: Path, tmp_path: Path) -> None:
    overrides = [f"text_to_image.pictures.path={pictures(tmp_path / 'pictures', count=4)}"]
    settings = read_run(path).settings
    if settings.pictures.cache:
        overrides.append(f"text_to_image.pictures.cache={tmp_path / 'cache'}")
    if settings.prior:
        overrides.append(f"text_to_image.prior.folder={tmp_path / 'class'}")
    objective = read_run(path, overrides).objective()
    assert isinstance(objective, text_to_image.Objective) and objective.found and len(objective.found) == 4
    assert any(each.requires_grad for each in objective.model.parameters())


def test_a_first_stage_on_pictures_of_ones_own_as_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its comment's words; and the second stage's config takes what comes out."""
    monkeypatch.setattr(autoencoder, "load_critic", lambda packages: EfficientNetLite0())
    by_name = {path.stem: path for path in FILES}
    text = by_name["autoencoder-kl"].read_text()
    (line,) = (line for line in text.splitlines() if "--set autoencoder.pictures.path" in line)
    overrides = line.partition("--set ")[2].replace("=...", f"={pictures(tmp_path / 'pictures', 4)}").split()
    run = read_run(by_name["autoencoder-kl"], overrides)
    objective = run.objective()
    assert isinstance(objective, autoencoder.Objective)
    assert objective.batch(0, 2, slice(None)).pictures.shape == (2, 3, 64, 64)
    second = read_run(by_name["latent-diffusion"]).settings
    assert second.new.autoencoder == f"{run.output}/export"
    assert second.new.unet.in_channels == objective.channels
    assert second.new.unet.sample_size * objective.factor == second.pictures.resolution
