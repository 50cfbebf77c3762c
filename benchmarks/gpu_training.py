"""How the bundled model's third weights were trained in minutes on a GPU: the repository's objectives, captured.

python -m benchmarks.gpu_training compose POOL 600 12 [0.9]    compositions, by 12 processes, such a share of them posed
python -m benchmarks.gpu_training encode POOL MODEL 0 3        their latents and text states: the first of 3 processes
python -m benchmarks.gpu_training unet POOL MODEL OUT 180      180 seconds of the whole U-Net
python -m benchmarks.gpu_training controlnet POOL MODEL OUT 75
python -m benchmarks.gpu_training decoder MODEL OUT 60 11      crops composed by 11 processes

All at once, from the root of a checkout after scripts/prepare_data.py: who trains waits for the first of the pool, and
draws from as much of it as there is. A step of the small U-Net is some 2,000 kernels, and launching them takes a CPU
several times as long as computing takes the GPU: forward, backward, optimizer and average are captured once as a CUDA
graph and replayed. Configs and losses are those of scripts/train.py; noise is drawn on the device, latents and text
states lie there, and the learning rate falls with the clock.
"""

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ldm.condition import Condition
from ldm.emoji.mixture import Mixture, MixtureConfig
from ldm.emoji.pools import CompositionsConfig
from ldm.pictures import to_tensor
from ldm.preprocess import canny
from ldm.system import System
from ldm.training.data.conditions import Conditions
from ldm.training.data.examples import Batch
from ldm.training.data.latents import LatentBatch, encode
from ldm.training.loop import Trainer
from ldm.training.run import Run, read_run
from ldm.training.trainable.controlnet import TrainControlNet

CHUNK = 512  # compositions of a file of the pool
WITH_EDGES = 262_144  # compositions, the first ones
FIRST = 32_768  # compositions that training waits for
UNET, CONTROLNET, DECODER = (
    Path(f"configs/bundled-{name}.yaml") for name in ("unet", "controlnet", "decoder")
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixture_of(**more: Any) -> CompositionsConfig:
    told = yaml.safe_load(UNET.read_text())["text_to_image"]["data"]["mixture"]
    return CompositionsConfig(mixture=MixtureConfig(**told, **more))


# The pool


def compose(pool: Path, chunks: int, processes: int, posed: float = 0.0) -> None:
    with multiprocessing.Pool(processes, _begin, (pool, posed)) as workers:
        for _ in workers.imap(_compose, range(chunks)):
            pass


_made: Mixture
_pool: Path


def _begin(pool: Path, posed: float) -> None:
    global _made, _pool
    _made, _pool = mixture_of(posed=posed).made(), pool


def _compose(chunk: int) -> None:
    examples = [_made.sample(i) for i in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    parts: dict[str, np.ndarray] = {
        "pictures": np.stack([each.picture for each in examples]),
        "captions": np.array([each.caption for each in examples]),
    }
    if chunk * CHUNK < WITH_EDGES:
        parts["edges"] = np.packbits(
            np.stack([canny(each)[..., 0] > 0 for each in parts["pictures"]]), axis=-1
        )
    part = _pool / f"{chunk:05d}.part.npz"
    np.savez(part, **parts)  # type: ignore[arg-type]
    part.rename(_pool / f"{chunk:05d}.npz")


@torch.no_grad()
def encode_pool(pool: Path, model: str, index: int, processes: int) -> None:
    """Encode every so many-th chunk as it comes; ends with the file `stop`."""
    system = System.load(model)
    for module in system.modules().values():
        module.to(DEVICE)
    conditions = Conditions(system.text)
    _save({"hidden": _states(conditions, [""])}, pool / "empty.pt")
    chunk = index
    while not (pool / "stop").exists():
        source = pool / f"{chunk:05d}.npz"
        if not source.exists():
            time.sleep(0.02)
            continue
        found = np.load(source)
        latents = encode(system.autoencoder, to_tensor(list(found["pictures"])), torch.float32).mean
        parts = {"latents": latents.half().cpu(), "hidden": _states(conditions, found["captions"].tolist())}
        if "edges" in found:
            parts["edges"] = torch.from_numpy(found["edges"])
        _save(parts, pool / f"{chunk:05d}.pt")
        source.unlink()
        chunk += processes


def _states(conditions: Conditions, captions: Sequence[str]) -> Tensor:
    kept = torch.zeros(len(captions), dtype=torch.bool)
    return (
        torch.cat(
            [conditions(captions[i : i + 256], kept[i : i + 256]).text for i in range(0, len(captions), 256)]
        )
        .half()
        .cpu()
    )


def _save(parts: dict[str, Tensor], path: Path) -> None:
    part = path.with_suffix(f".part{time.monotonic_ns()}")
    torch.save(parts, part)
    part.rename(path)


class Held:
    """As much of the pool as there is, on the device: a source of latents."""

    resolution, dtype, captions = None, torch.float32, ()

    def __init__(self, pool: Path, edges: bool):
        self.pool, self.with_edges = pool, edges
        self.count = self.chunks = 0
        room = WITH_EDGES if edges else 1_048_576

        def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.empty(room, *shape, dtype=dtype, device=DEVICE)

        self.parts = {"latents": empty(8, 16, 16), "hidden": empty(24, 384)}
        if edges:
            self.parts["edges"] = empty(128, 16, dtype=torch.uint8)
        while not (pool / "empty.pt").exists():
            time.sleep(0.05)
        self.empty = torch.load(pool / "empty.pt")["hidden"].to(DEVICE)
        self.bits = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=DEVICE)

    def prepare(self, batch_size: int) -> None:
        self.chosen = torch.zeros(batch_size, dtype=torch.long, device=DEVICE)
        self.sides = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * batch_size, device=DEVICE)
        while self.count < FIRST:
            if not self.grow():
                time.sleep(0.02)

    def grow(self) -> bool:
        """Take in the next chunk, if it is there."""
        path = self.pool / f"{self.chunks:05d}.pt"
        if self.count + CHUNK > len(self.parts["latents"]) or not path.exists():
            return False
        found = torch.load(path)
        for name, part in self.parts.items():
            part[self.count : self.count + CHUNK] = found[name].to(DEVICE)
        self.count, self.chunks = self.count + CHUNK, self.chunks + 1
        return True

    def choose(self) -> None:
        """Draw the rows of the next batch."""
        self.chosen.random_(0, self.count)

    def batch(self) -> LatentBatch:
        pictures = None
        if self.with_edges:
            packed = self.parts["edges"][self.chosen]
            edges = ((packed[..., None] & self.bits) != 0).flatten(2).float()
            pictures = edges[:, None].expand(-1, 3, -1, -1).contiguous()
        latents = self.parts["latents"][self.chosen].float()
        return LatentBatch(latents, [""] * len(latents), self.sides, pictures)

    def notes(self) -> list[str]:
        return []


class HeldStates:
    """In place of `Conditions`: what the captions of the chosen rows became."""

    def __init__(self, pool: Held):
        self.pool = pool

    def prepare(self, captions: Sequence[str]) -> None:
        pass

    def __call__(self, captions: Sequence[str], dropped: Tensor) -> Condition:
        states = self.pool.parts["hidden"][self.pool.chosen].float()
        return Condition(hidden=torch.where(dropped[:, None, None], self.pool.empty.float(), states))

    def notes(self) -> list[str]:
        return []


# Training


class Draws:
    """`BatchGenerator` on the device: replayed, a captured step draws anew."""

    def __init__(self, size: int):
        self.size = size

    def uniform(self) -> Tensor:
        return torch.rand(self.size, device=DEVICE)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.size, *shape, device=DEVICE)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.size,), device=DEVICE)


class Timed(Trainer):
    """The loop, with a learning rate that falls over the last share `decay` of some seconds."""

    def by_the_clock(self, seconds: float, peak: float, warmup: int, decay: float) -> "Timed":
        begun: list[float] = []

        def rate(seen: int) -> float:
            begun.append(time.monotonic())
            left = 1 - (begun[-1] - begun[0]) / seconds
            return peak * min(1, (seen + 1) / warmup) * max(0.0, min(1, left / decay))

        self.learning_rate = rate
        return self


class Captured(Timed):
    """Its step is a CUDA graph; figures are read every 25 steps. One process, bf16."""

    graph: torch.cuda.CUDAGraph | None = None
    steps = 0

    def _compute(self) -> None:
        pool = self.objective.source  # type: ignore[attr-defined]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            draws: Any = Draws(self.config.batch_size)
            loss, _ = self.objective.loss(self.model, pool.batch(), draws)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.clip_norm)
        self.adam.step()
        torch._foreach_lerp_(self.averaged, [each.detach() for each in self.trained], self.weight)
        self.adam.zero_grad(set_to_none=True)
        self.told.copy_(torch.stack([loss.detach(), norm.detach()]))

    def _prepare(self) -> None:
        trained = {name: each for name, each in self.plain.named_parameters() if each.requires_grad}
        self.trained = list(trained.values())
        self.averaged = [self.ema.averages[name] for name in trained]
        self.weight = 1 - 0.5 ** (self.config.batch_size / self.config.ema_half_life)
        self.told, self.rate_held = torch.zeros(2, device=DEVICE), torch.zeros((), device=DEVICE)
        self.adam = self.optimizer.optimizer
        for group in self.adam.param_groups:
            group.update(lr=self.rate_held, capturable=DEVICE.type == "cuda")
        self.objective.schedule = self.objective.schedule.to(DEVICE)  # type: ignore[attr-defined]
        if DEVICE.type != "cuda":
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # at a rate of 0
                self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._compute()

    def step(self) -> dict[str, float]:
        pool = self.objective.source  # type: ignore[attr-defined]
        if not self.steps:
            pool.choose()
            self._prepare()
        if self.steps % 8 == 0:
            pool.grow()
        self.rate = self.learning_rate(self.seen)
        self.rate_held.fill_(self.rate)
        pool.choose()
        if self.graph:
            self.graph.replay()
        else:
            self._compute()
        self.seen, self.steps, self._unsaved = self.seen + self.config.batch_size, self.steps + 1, True
        if self.steps % 25 == 1:
            self.figures = dict(zip(("loss", "grad_norm"), self.told.tolist(), strict=True))
            self._refuse_nan(self.figures)
        return self.figures

    def _any(self, flag: bool) -> bool:
        return flag


def settings(output: Path, seconds: float, batch_size: int, half_life: int) -> list[str]:
    never = ("save_every=0", "validate_every=0", "pictures=1000000000", "optimizer.schedule=constant")
    told = (
        f"max_seconds={seconds}",
        f"batch_size={batch_size}",
        f"ema_half_life={half_life}",
        "precision=bf16",
    )
    return [
        f"output={output}",
        f"loop.log_every={100 * batch_size}",
        *(f"loop.{each}" for each in (*never, *told)),
    ]


def finish(trainer: Trainer) -> None:
    begun = time.monotonic()
    trainer.run()
    took = time.monotonic() - begun
    print(f"{trainer.seen:,} pictures in {took:.1f} s", flush=True)
    trainer.objective.export(trainer.ema.model(trainer.plain), trainer.folder / "export", trainer.resolved)


def on_the_pool(run: Run, pool: Held) -> Captured:
    objective: Any = run.objective()
    objective.source, objective.conditions = pool, HeldStates(pool)
    return Captured(objective, run.loop, run.output, run.resolved)


def unet(pool: Path, model: str, output: Path, seconds: float) -> None:
    told = yaml.safe_load(UNET.read_text())
    told["text_to_image"]["base"] = model
    output.mkdir(parents=True, exist_ok=True)
    (config := output / "unet.yaml").write_text(yaml.safe_dump(told))
    run = read_run(config, settings(output, seconds, 128, 60_000))
    finish(on_the_pool(run, Held(pool, False)).by_the_clock(seconds, 8e-4, 20_000, 0.45))


class _Edges(TrainControlNet):
    """The edges are held already."""

    def control_pictures(self, batch: LatentBatch) -> Tensor | None:
        return batch.pictures


def controlnet(pool: Path, model: str, output: Path, seconds: float) -> None:
    run = read_run(CONTROLNET, [*settings(output, seconds, 64, 20_000), f"text_to_image.base={model}"])
    run = replace(run, settings=replace(run.settings, train=_Edges(**vars(run.settings.train))))
    finish(on_the_pool(run, Held(pool, True)).by_the_clock(seconds, 6e-4, 6_400, 0.5))


_crops: Any = None


def _cut(start: int, size: int) -> Batch:
    global _crops
    if _crops is None:
        _crops = mixture_of(finished=0.3).examples("data", 64, 8)
    return _crops.cuts(start, size)


def decoder(model: str, output: Path, seconds: float, processes: int) -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")
    told = yaml.safe_load(DECODER.read_text())
    told["autoencoder"]["init"] = model
    told["autoencoder"]["data"]["mixture"] = vars(mixture_of(finished=0.3).mixture)
    output.mkdir(parents=True, exist_ok=True)
    (config := output / "decoder.yaml").write_text(yaml.safe_dump(told))
    run = read_run(config, settings(output, seconds, 32, 20_000))
    objective: Any = run.objective()
    begun: dict[int, Future[Batch]] = {}
    with ProcessPoolExecutor(processes) as workers:

        def batch(start: int, size: int, rows: slice) -> Batch:
            for at in range(start, start + 24 * size, size):
                if at not in begun:
                    begun[at] = workers.submit(_cut, at, size)
            return begun.pop(start).result()

        batch(0, 32, slice(None))  # workers begin before CUDA does
        objective.batch = batch
        finish(Timed(objective, run.loop, run.output, run.resolved).by_the_clock(seconds, 4e-4, 3_200, 0.6))
        workers.shutdown(cancel_futures=True)


def main() -> None:
    what, *told = sys.argv[1:]
    if what == "compose":
        Path(told[0]).mkdir(parents=True, exist_ok=True)
        compose(Path(told[0]), int(told[1]), int(told[2]), float(told[3]) if told[3:] else 0.0)
    elif what == "encode":
        encode_pool(Path(told[0]), told[1], int(told[2]), int(told[3]))
    elif what == "decoder":
        decoder(told[0], Path(told[1]), float(told[2]), int(told[3]))
    else:
        {"unet": unet, "controlnet": controlnet}[what](Path(told[0]), told[1], Path(told[2]), float(told[3]))


if __name__ == "__main__":
    main()
