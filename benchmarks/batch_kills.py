"""Is a batch that is killed again and again the same, byte for byte, as one that is left alone?

    python benchmarks/batch_kills.py runs/kills --rows 1000 --kills 20

Rows of three samplers, six numbers of steps, four scales, two sizes, from nothing and from a picture, and twenty that
can't be drawn, of ten kinds. One run is left alone; the other's processes are killed by SIGKILL, all of them or one, at
moments drawn by a seed, until it is done. Then all pictures and all of the manifest but the times are compared.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
BAD: list[str] = [
    '{"prompt": "a fox", ',
    '["a fox"]',
    '{"seed": 3}',
    '{"prompt": "a fox", "num_inference_steps": 0}',
    '{"prompt": "a fox", "sampler": "dmpp_2m"}',
    '{"prompt": "a fox", "height": 130}',
    '{"prompt": "a fox", "image": "not-there.png"}',
    '{"prompt": "a fox", "image": "no-picture.png"}',
    '{"prompt": "a fox", "guidance": 3}',
    '{"prompt": "a fox", "seed": "seven"}',
]
THINGS = ("fox", "cat", "owl", "apple", "house", "car", "rocket", "tree", "cake", "boat")
WEARING = ("", " wearing a top hat", " with a red background", " next to a tree")


def write_rows(folder: Path, count: int) -> Path:
    """Write the rows, and the picture that some are drawn from."""
    from PIL import Image

    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(folder / "grey.png")
    (folder / "no-picture.png").write_bytes(b"no picture")
    lines = list[str]()
    for k in range(count - 2 * len(BAD)):
        row: dict[str, Any] = {
            "prompt": f"a {rng.choice(THINGS)}{rng.choice(WEARING)}",
            "sampler": rng.choice(("ddim", "dpmpp_2m", "euler_ancestral")),
            "num_inference_steps": rng.choice((4, 5, 6, 8, 10, 12)),
            "guidance_scale": rng.choice((1.0, 2.5, 3.5, 5.0)),
            "width": rng.choice((128, 160)),
            "height": 128,
        }
        if k % 5 == 0:
            row |= {"image": "grey.png", "strength": rng.choice((0.5, 0.8))}
        if k % 7 == 0:
            row["seed"] = rng.randrange(2**32)
        if k % 11 == 0:
            row["negative_prompt"] = "blurry"
        lines.append(json.dumps(row))
    for each in BAD * 2:
        lines.insert(rng.randrange(len(lines)), each)
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(rows: Path, out: Path, more: list[str]) -> list[str]:
    """The command, the same at every start."""
    return [sys.executable, str(ROOT / "scripts/batch.py"), str(rows), "--out", str(out), *more]


def kill(process: subprocess.Popen[bytes], which: str) -> str:
    """Kill a run's processes: "all", the "first", or one that is a "helper" to it, if it has one. Returns which."""
    first = psutil.Process(process.pid)
    helpers = [each for each in first.children(recursive=True) if "spawn_main" in " ".join(_line(each))]
    which = which if helpers else "first"
    doomed = {"all": [first, *helpers], "first": [first], "helper": helpers[:1]}[which]
    for each in doomed:
        os.kill(each.pid, signal.SIGKILL)
    return which


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def live(arguments: list[str], seconds: float | None = None, which: str = "") -> tuple[int | None, str]:
    """Start the command, and kill it after so long; returns its status, None where it was killed, and what died."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(seconds), ""
    except subprocess.TimeoutExpired:
        which = kill(process, which)
        if which == "helper":  # the run goes on, and starts another one: then it is the first one's turn
            time.sleep(3)
            process.kill()
        process.wait()
        return None, which


def state(out: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """All that was drawn: the pictures' bytes by name, and the manifest but for its times."""
    import pyarrow.parquet

    files = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("images", "shards")
        for path in sorted((out / kind).rglob("*"))
        if path.is_file()
    }
    table = pyarrow.parquet.read_table(out / "metadata.parquet").drop_columns(["time", "seconds"])
    return files, table.to_pylist()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", nargs="*", default=[], help="options of ldm-batch, without their dashes")
    chosen = parser.parse_args()
    rng, more = random.Random(chosen.seed), [f"--{each}" for each in chosen.more]
    rows = write_rows(chosen.folder, chosen.rows)
    alone, killed = chosen.folder / "alone", chosen.folder / "killed"
    begun = time.monotonic()
    status, _ = live(command(rows, alone, more))
    whole = time.monotonic() - begun
    print(f"left alone: status {status} after {whole:.0f} s", flush=True)
    lives = list[str]()
    while len(lives) < chosen.kills:
        seconds = rng.uniform(1.0, 1.2 * whole / chosen.kills + 8)  # some die before they have drawn anything
        which = ("all", "first", "helper")[len(lives) % 3]
        ended, which = live(command(rows, killed, more), seconds, which)
        if ended is not None:
            print(f"done, with status {ended}, after {len(lives)} kills", flush=True)
            break
        lives.append(which)
        parts = list((killed / ".ldm-batch/blocks").glob("*.done"))
        print(f"killed ({which}) after {seconds:.1f} s: {len(parts)} blocks done", flush=True)
    last, _ = live(command(rows, killed, more))
    (files, lines), (files_killed, lines_killed) = state(alone), state(killed)
    items = [(line["line"], line["index"]) for line in lines_killed]
    reasons = {line["error"].split(":")[0] for line in lines_killed if line["error"]}
    checks = {
        f"both end with the same status ({status})": status == last,
        f"{len(files)} pictures, the same bytes": files == files_killed,
        f"{len(lines)} lines of the manifest, the same": lines == lines_killed,
        f"{len(lines)} lines for {chosen.rows} rows, each once": len(set(items)) == len(items) == chosen.rows,
        f"{sum(bool(each['error']) for each in lines)} rows failed, {len(reasons)} kinds of reasons": sum(
            bool(line["error"]) for line in lines_killed
        )
        == 2 * len(BAD),
        f"killed {len(lives)} times": len(lives) == chosen.kills,
    }
    for check, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {check}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
