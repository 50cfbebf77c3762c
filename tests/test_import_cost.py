"""What is imported costs time before the first picture: the heavy packages wait until they are needed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEVER = ("transformers", "diffusers", "accelerate", "open_clip", "huggingface_hub")
HEAVY = (*NEVER, "tokenizers", "PIL", "lark")
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


DRAWN = """
import sys
from pipelines.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(*sorted(sys.modules), sep="\\n")
"""


def test_a_picture_is_drawn_without_transformers(tmp_path: Path) -> None:
    """By the command line and the bundled model; torch._dynamo, with sympy behind it, takes as long to be imported."""
    arguments = ["a red heart", "--steps", "1", "--out", str(tmp_path / "one.png")]
    run = subprocess.run(
        [sys.executable, "-c", DRAWN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "one.png").is_file()
    imported = set(run.stdout.split("\n"))
    assert {"torch", "tokenizers", "ldm.models.bert"} <= imported
    assert not imported & {*NEVER, "torch._dynamo", "torch._inductor", "sympy", "scipy", "pandas"}
