"""Does the memory of a batch stay the same, however many rows it has?

    python benchmarks/batch_memory.py runs/memory --rows 1000 100000

A process for each number of rows draws them with the bundled model, whose denoiser and decoder are stood in for by what
takes no time; its peak of resident memory is read from the system. The manifest is written as always.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_ONE = """
import resource, sys, torch
from pathlib import Path
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from pipelines.batch.run import run
from pipelines.batch.setup import Setup

UNet.forward = lambda self, x, *more: torch.zeros_like(x)
AutoencoderKL.decode = lambda self, z: torch.zeros(len(z), 3, 16, 16)
folder = Path(sys.argv[1])
made = run(Setup(folder / "rows.jsonl", folder / "out", {"num_inference_steps": 1}), workers=1)
print(made.drawn, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000])
    chosen = parser.parse_args()
    print("| rows | drawn | peak, MB |\n|---|---|---|")
    for rows in chosen.rows:
        folder = chosen.folder / str(rows)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "rows.jsonl").open("w") as file:
            for k in range(rows):
                file.write(json.dumps({"prompt": f"a fox number {k}", "id": f"fox-{k}"}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", _ONE, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        if done.returncode:
            return done.returncode
        drawn, peak = done.stdout.split()
        print(f"| {rows:,} | {int(drawn):,} | {int(peak):,} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
