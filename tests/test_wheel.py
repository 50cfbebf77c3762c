"""The wheel: it carries all that draws, and draws away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRAW = """
import sys, ldm
from pipelines import TextToImagePipeline
print(ldm.__file__)
TextToImagePipeline.from_pretrained()("a fox", seed=0, num_inference_steps=2, progress=False).save(sys.argv[1])
from pipelines import Upscaler
from PIL import Image
assert Upscaler.from_pretrained()(Image.open(sys.argv[1])).size == (512, 512)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return next(folder.glob("*.whl"))


def test_it_draws_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(
        [sys.executable, "-c", DRAW, str(tmp_path / "fox.png")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "site" / "ldm" / "__init__.py")
    assert (tmp_path / "fox.png").stat().st_size > 2_000


def test_it_carries_licences_types_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "ldm-generate = pipelines.cli:main" in archive.read(entry).decode()
        assert "ldm-batch = pipelines.batch.cli:main" in archive.read(entry).decode()
        assert "ldm-upscale = pipelines.upscale_cli:main" in archive.read(entry).decode()
    for end in ("licenses/LICENSE", "licenses/THIRD_PARTY_NOTICES", "ldm/py.typed", "pipelines/py.typed"):
        assert any(name.endswith(end) for name in names), end
    assert not any(name.startswith(("tests", "benchmarks", "runs", "scripts")) for name in names)
