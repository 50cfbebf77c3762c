"""A fuzzer: command lines, rows of prompts, overrides of configs, files of every kind, put out of order.

python tests/fuzz.py [--seed 0] [--minutes 10]     rounds of all of them, with a count; tests/test_fuzz.py has a few

What is asked of each: it ends in time, with status 0 or 2 or with a UserError of one line, and with no other exception.
Hypothesis draws the examples and makes those that fail smaller; the seed makes a run the same again.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from random_lora import made, networks, unet_config
from tiny import WIDTH, tiny_pipeline_folder

from ldm.checkpoints.lora import read_lora_file, write_lora
from ldm.checkpoints.single_file import read_single_file
from ldm.conditioning.inversion import read_inversion, write_inversion
from ldm.data.pictures import decode, open_pictures
from ldm.errors import UserError
from ldm.system import System
from ldm.training.run import read_run
from pipelines import TextToImagePipeline, cli
from pipelines.recipe import read_recipe

SECONDS = 10  # an example may take so long; the 5 s, on a machine that is busy with others
MEMORY = 6 * 2**30  # bytes of address space that may come on top

# Values as people and their programs write them, and as nobody should.
WORDS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1",
        "2",
        "16",
        "1e9",
        "1" * 400,
        "nan",
        "-inf",
        "None",
        "true",
        "x",
        "é",
        "\ud83d",
        "\x1b[2J",
        "a b",
    ]
)
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([10**12, -(10**30), 2**63, 0.5, float("nan"), float("inf")])
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
OPTIONS = [
    *(
        "--negative-prompt",
        "--seed",
        "--guidance-scale",
        "--sampler",
        "--schedule",
        "--height",
        "--width",
        "--eta",
    ),
    *("--guidance-rescale", "--clip-skip", "--num-images", "--batch-size", "--columns", "--grid", "--file"),
    *(
        "--lora",
        "--embedding",
        "--dtype",
        "--variant",
        "--prediction-type",
        "--device",
        "--from-image",
        "--nonsense",
    ),
]
ROW_KEYS = [
    *(
        "prompt",
        "negative_prompt",
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "sampler",
        "schedule",
        "height",
    ),
    *(
        "width",
        "eta",
        "guidance_rescale",
        "guidance_interval",
        "clip_guidance_scale",
        "token_merging",
        "feature_reuse",
        "clip_skip",
        "original_size",
        "model",
        "loras",
        "x",
    ),
]
PATHS = [
    *(
        "loop.pictures",
        "loop.batch_size",
        "loop.out",
        "loop.optimizer.learning_rate",
        "loop.seed",
        "output",
        "loop",
    ),
    *(
        "text_to_image.base",
        "text_to_image.data",
        "text_to_image.data.path",
        "text_to_image.train.rank",
    ),
    *("text_to_image.loss.variance", "text_to_image.scheduler.beta_start", "a.b.c", "", "text_to_image"),
]
CHUNKS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\x1b[2J",
    b"9" * 400,
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[" * 3000,
    b'{"a":' * 3000,
]
CHUNKS += [
    b"!!python/object/apply:os.system [ls]",
    b"&a [*a]",
    b"../../../etc/passwd",
    b'"\\ud83d"',
    b"\n",
    b",",
    b"{}",
]


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[str, float, int, bytes]]:
    """What is done to a file's bytes, one after another: what, where (a share of it), how much, with what."""
    what = st.sampled_from(["flip", "delete", "insert", "cut", "repeat", "number"])
    where = st.floats(0, 1).map(lambda share: share * share)  # more at the beginning, where headers are
    return draw(
        st.lists(st.tuples(what, where, st.integers(0, 300), st.sampled_from(CHUNKS)), min_size=1, max_size=4)
    )


def changed(content: bytes, todo: list[tuple[str, float, int, bytes]]) -> bytes:
    for what, share, size, chunk in todo:
        at = int(share * len(content))
        if what == "flip" and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ (size % 255 + 1)]) + content[at + 1 :]
        elif what == "number":  # the next run of digits, another number
            digits = next(
                (k for k in range(at, min(at + 4000, len(content))) if content[k : k + 1].isdigit()), None
            )
            end = digits or 0
            while digits is not None and content[end : end + 1].isdigit():
                end += 1
            content = content if digits is None else content[:digits] + (chunk or b"0") + content[end:]
        else:
            after = {"delete": at + size, "cut": len(content)}.get(what, at)
            middle = {"insert": chunk, "repeat": content[at : at + size] * 3}.get(what, b"")
            content = content[:at] + middle + content[after:]
    return content


class Ground:
    """Whole files of every kind, and what reads them, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = tiny_pipeline_folder(folder, "sd1")
        pipe = TextToImagePipeline.from_pretrained(self.model, device="cpu")
        self.networks, self.unet = networks(pipe), unet_config(pipe)
        pipe.save_single_file(folder / "single.safetensors")
        torch.save({"state_dict": pipe.system.network.state_dict()}, folder / "net.ckpt")
        adapters = made(pipe, {"unet": "attention"})
        for layout in ("diffusers", "kohya"):
            write_lora(folder / f"{layout}.safetensors", adapters, layout, self.unet)  # type: ignore[arg-type]
        write_inversion(folder / "word.safetensors", "<x>", {"text_encoder": torch.randn(2, WIDTH)})
        torch.save({"string_to_param": {"*": torch.randn(2, WIDTH)}, "name": "y"}, folder / "word.pt")
        pipe("a cat", seed=1, num_inference_steps=1, progress=False).save(folder / "drawn.png")
        pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8)
        for ending in ("png", "jpg", "webp", "bmp", "gif", "tiff"):
            Image.fromarray(pixels).save(folder / f"picture.{ending}")
        self._data(folder / "data", pixels)
        (folder / "run.yaml").write_text(Path(__file__).parents[1].joinpath("configs/lora.yaml").read_text())

    @staticmethod
    def _data(folder: Path, pixels: np.ndarray) -> None:
        folder.mkdir()
        for k in range(3):
            Image.fromarray(pixels).save(folder / f"{k}.png")
        rows = [
            {"file_name": f"{k}.png", "text": ["a cat", "a dog"] if k else "a tree, and more"}
            for k in range(3)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with tarfile.open(folder.parent / "shard.tar", "w") as shard:
            for k in range(3):
                shard.add(folder / f"{k}.png", f"{k}.png")
                text = json.dumps(rows[k]).encode()
                member = tarfile.TarInfo(f"{k}.json")
                member.size = len(text)
                shard.addfile(member, io.BytesIO(text))

    def readers(self) -> dict[str, tuple[Path, Callable[[Path], object]]]:
        """By kind: a whole file, and what reads a changed one that lies under the same name elsewhere."""
        lora = partial(read_lora_file, networks=self.networks, unet_config=self.unet)
        found: dict[str, tuple[Path, Callable[[Path], object]]] = {
            "single file": (self.folder / "single.safetensors", read_single_file),
            "pickle": (self.folder / "net.ckpt", read_single_file),
            "lora": (self.folder / "diffusers.safetensors", lora),
            "kohya": (self.folder / "kohya.safetensors", lora),
            "word": (self.folder / "word.safetensors", read_inversion),
            "word in a pickle": (self.folder / "word.pt", read_inversion),
            "recipe": (self.folder / "drawn.png", read_recipe),
            "config": (self.folder / "run.yaml", read_run),
            "prompts": (self.folder / "data" / "metadata.jsonl", self.prompts),
            "metadata": (self.folder / "data" / "metadata.jsonl", self.pictures),
            "shard": (self.folder / "shard.tar", open_pictures),
        }
        for picture in self.folder.glob("picture.*"):
            found[picture.name] = (picture, self.decode)
        for part in sorted(self.model.rglob("*")):
            if part.is_file() and part.suffix in (".json", ".txt", ".safetensors"):
                name = part.relative_to(self.model).as_posix()
                found[f"folder: {name}"] = (part, partial(self.system, name=name))
        return found

    def decode(self, path: Path) -> object:
        try:
            return decode(path.read_bytes())
        except ValueError:  # how a picture says that it is broken
            return None

    def pictures(self, path: Path) -> object:
        for each in (self.folder / "data").glob("*.png"):
            shutil.copy(each, path.parent / each.name)
        return open_pictures(path.parent)

    def prompts(self, path: Path) -> object:
        from pipelines.jobs import read_prompts

        return list(read_prompts(path, {}))

    def system(self, path: Path, name: str) -> object:
        """A model's folder of links, but for the one file that is changed."""
        folder = path.parent / "model"
        for part in self.model.rglob("*"):
            to = folder / part.relative_to(self.model)
            if part.is_dir():
                to.mkdir(parents=True, exist_ok=True)
            elif part.relative_to(self.model).as_posix() != name:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.symlink_to(part)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, folder / name)
        return System.load(folder)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError after SECONDS, and let nothing be printed."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line_or_fine(act: Callable[[], object]) -> None:
    """Run it: a UserError of one line is as good as a result."""
    with bounded():
        try:
            act()
        except UserError as error:
            assert "\n" not in str(error), f"an error of several lines: {error}"


def runs(argv: list[str]) -> None:
    """Run the command that draws; it must give 0 or 2."""
    with bounded():
        try:
            status = cli.main(argv)
        except SystemExit as end:  # argparse's own
            status = int(end.code or 0)
    assert status in (0, 2), f"status {status}"


class Fuzz:
    """The rounds; each draws `count` examples by a seed."""

    def __init__(self, ground: Ground):
        self.ground = ground
        self.readers = ground.readers()

    def _examples(
        self, strategy: st.SearchStrategy[Any], count: int, number: int, act: Callable[[Any], None]
    ) -> int:
        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def examples(example: Any) -> None:
            act(example)

        examples()
        return count

    def command_lines(self, count: int, number: int) -> int:
        there = st.sampled_from([str(each) for each in self.ground.folder.iterdir()])
        value = st.one_of(WORDS, WORDS, there)
        option = st.tuples(st.sampled_from(OPTIONS), value).map(lambda pair: [f"{pair[0]}={pair[1]}"])
        some = st.lists(st.one_of(option, WORDS.map(lambda word: ["--", word])), max_size=4)

        def act(parts: list[list[str]]) -> None:
            with tempfile.TemporaryDirectory(dir=self.ground.folder.parent) as out:
                options = [each for part in parts if part[0] != "--" for each in part]
                prompts = [part[1] for part in parts if part[0] == "--"]
                most = [
                    "--model",
                    str(self.ground.model),
                    "--device=cpu",
                    "--steps=1",
                    "--quiet",
                    "--out",
                    out,
                ]
                runs([*most, *options, "--", "a cat", *prompts])

        return self._examples(some, count, number, act)

    def rows(self, count: int, number: int) -> int:
        row = st.dictionaries(st.sampled_from(ROW_KEYS), VALUES, max_size=4)
        prompt = st.one_of(st.just("a cat"), VALUES)

        def act(example: tuple[dict[str, Any], Any]) -> None:
            values, said = example
            with tempfile.TemporaryDirectory(dir=self.ground.folder.parent) as out:
                path = Path(out) / "rows.jsonl"
                values = {**values, "num_inference_steps": values.get("num_inference_steps") or 1}  # not 50
                path.write_text(json.dumps({"prompt": said, **values}))
                runs(
                    [
                        "--file",
                        str(path),
                        "--model",
                        str(self.ground.model),
                        "--device=cpu",
                        "--quiet",
                        "--out",
                        out,
                    ]
                )

        return self._examples(st.tuples(row, prompt), count, number, act)

    def overrides(self, count: int, number: int) -> int:
        one = st.tuples(st.sampled_from(PATHS), st.one_of(WORDS, VALUES.map(json.dumps))).map("=".join)

        def act(assignments: list[str]) -> None:
            one_line_or_fine(lambda: read_run(self.ground.folder / "run.yaml", assignments))

        return self._examples(st.lists(one, min_size=1, max_size=3), count, number, act)

    def files(self, count: int, number: int, kinds: list[str] | None = None) -> int:
        names = st.sampled_from(kinds or sorted(self.readers))

        def act(example: tuple[str, list[tuple[str, float, int, bytes]]]) -> None:
            kind, todo = example
            path, read = self.readers[kind]
            with tempfile.TemporaryDirectory(dir=self.ground.folder.parent) as place:
                copy = Path(place) / path.name
                copy.write_bytes(changed(path.read_bytes(), todo))
                one_line_or_fine(lambda: read(copy))

        return self._examples(st.tuples(names, changes()), count, number, act)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    chosen = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ground").mkdir()
        fuzz = Fuzz(Ground(Path(folder) / "ground"))
        rounds = {"files": (fuzz.files, 250), "command lines": (fuzz.command_lines, 100)}
        rounds |= {"rows": (fuzz.rows, 50), "overrides": (fuzz.overrides, 50)}
        counts, failed, end = dict.fromkeys(rounds, 0), 0, time.monotonic() + 60 * chosen.minutes
        numbers = random.Random(chosen.seed)
        while time.monotonic() < end:
            for name, (run, count) in rounds.items():
                number = numbers.randrange(2**32)
                try:
                    counts[name] += run(count, number)
                except Exception as error:
                    failed += 1
                    told(name, number, error)
        print(f"{', '.join(f'{count} {name}' for name, count in counts.items())}; {failed} failed")
    return min(failed, 1)


def told(name: str, number: int, error: Exception) -> None:
    """Print a failure: what, where, and the smallest example that Hypothesis found."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    print(f"FAILED {name}, seed {number}: {said[:600]}")
    print(*(f"    {text[:600]}" for text in getattr(error, "__notes__", ())), sep="\n", flush=True)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
