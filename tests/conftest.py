"""What every test starts from: one thread a worker, no network, fixed seeds, no GPU tests without a GPU."""

import os
import random
import signal
from pathlib import Path

# Before torch and huggingface_hub are first imported: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# What is drawn where nobody names a precision is float32, whatever this processor is fastest with.
os.environ["LDM_DTYPE"] = "float32"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# A shell that starts the tests in the background, and nohup, have these ignored, which all they start inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Each test draws the same numbers alone, in any order and on any worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def sprites(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    pixels = {}
    for name in ("tree", "star", "rocket"):
        pixels[name, "3d"] = np.full((128, 128, 4), 255, np.uint8)
        pixels[name, "3d"][20:100, 20:100, :3] = rng.integers(0, 255, 3)
    from ldm.emoji.sprites import SpriteSet

    SpriteSet(pixels, 128).save(tmp_path / "sprites.npz")
    return str(tmp_path / "sprites.npz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
