"""`from pipelines import TextToImagePipeline` stays cheap: the heavy packages wait until they are needed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "diffusers", "accelerate", "open_clip", "huggingface_hub", "PIL", "lark")
PROGRAM = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
from pipelines import TextToImagePipeline
print(f"{time.perf_counter() - start:.3f} s beyond torch", file=sys.stderr)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_the_pipeline_imports_nothing_heavy() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    print(run.stderr)  # shown with -s: a time is no ground to fail on, the machine may be busy
    imported = set(run.stdout.split())
    assert "pipelines" in imported and "ldm" in imported
    assert not imported & set(HEAVY)
