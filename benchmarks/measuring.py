"""What `scripts/evaluate.py compare` does: sides are files, folders or what models draw, `ldm.evaluation` measures."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.folder import read_json
from ldm.console import note
from ldm.data.pictures import PictureSet, open_pictures
from ldm.errors import UserError
from ldm.evaluation.clip_score import ImageTextEncoder, clip_score
from ldm.evaluation.features import Extractor, NetworkName, load_extractor, statistics_of
from ldm.evaluation.measures import Comparison, Measure, MeasureName, check_alike, compare
from ldm.evaluation.statistics import (
    EFFICIENTNET_LITE0,
    SUFFIXES,
    FeatureStatistics,
    check_ending,
    load_statistics,
)
from ldm.system import System
from pipelines.batch.run import Engine, run
from pipelines.batch.setup import Setup
from pipelines.files import check_target

MODEL = "model:"  # before a folder, a single file or a hub id; with nothing after it, the bundled model
_OF_ALL = ("is", "kid", "pr")  # measures of every picture's features


@dataclass(frozen=True)
class Drawing:
    """How the models among the sides draw.

    prompts: a file of rows, as of ldm-batch. output: the folder of the pictures, which are kept, so that what was
    interrupted goes on. settings: of rows that don't say, see `pipelines.recipe.Recipe`. workers, engine: as of `run`.
    """

    prompts: Path | None = None
    output: Path = Path("runs/measures")
    settings: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = 1
    engine: Engine | None = None

    def check(self, sides: Collection[str]) -> None:
        """Raise UserError, before anything is done, for models without prompts, or nowhere to put their pictures."""
        models = [each for each in sides if each.startswith(MODEL)]
        if models and self.prompts is None:
            raise UserError(f"{models[0]} draws what a file asks for: --prompts FILE, with a prompt a line")
        if self.prompts is not None and not models:
            raise UserError(f"--prompts is for a model to draw: name it {MODEL}FOLDER")
        if models:
            check_target(self.output, 2)

    def draw(self, model: str, role: str) -> Path:
        """Draw a picture of each row; returns the folder of shards that hold them. Raises UserError."""
        folder = self.output / role
        rows = self.prompts or Path()
        setup = Setup(rows, folder, self.settings, model=model or None, format="wds", strict=True)
        made = run(setup, self.workers, engine=self.engine)
        if made.failed:
            raise UserError(f"{made.failed} pictures of {rows} could not be drawn: {made.manifest} says why")
        return folder / "shards"


class Side:
    """One of the sets that are compared. name: a path, or `model:` and a model. role: of its pictures' folder."""

    def __init__(self, name: str, role: str):
        self.name, self.role = name, role
        of_file = not name.startswith(MODEL) and Path(name).suffix in SUFFIXES
        self.kept = load_statistics(Path(name)) if of_file else None
        self.pictures: PictureSet | None = None

    def open(self, drawing: Drawing) -> None:
        """Find its pictures, or have them drawn. Raises UserError."""
        if self.kept is None:
            model = self.name.startswith(MODEL)
            path = drawing.draw(self.name.removeprefix(MODEL), self.role) if model else Path(self.name)
            self.pictures = open_pictures(path)
            for each in self.pictures.report():
                if "without a caption" not in each:
                    note(each)
            if len(self.pictures) < 2:
                raise UserError(f"{self.name} holds one picture: measures are of sets, of two or more")

    def statistics(self, extractor: Extractor | None, keep: bool, limit: int | None) -> FeatureStatistics:
        """Return those of its file, or of its pictures' features; keep: with all of these. Raises UserError."""
        if self.kept is not None:
            return self.kept
        assert self.pictures is not None and extractor is not None
        return statistics_of(self.pictures, extractor, keep=keep, limit=limit)


def compared(
    names: tuple[str, str],
    drawing: Drawing,
    wanted: Collection[MeasureName] | None = None,
    network: NetworkName | None = None,
    weights: Path | None = None,
    clip: ImageTextEncoder | None = None,
    limit: int | None = None,
) -> Comparison:
    """Compare two sides, the first of them the real one.

    wanted: None is all that can be had. network: of the features; None is that of a side's file, else Inception.
    weights: of Inception. clip: scores the other side's pictures against their captions. limit: pictures of each side.
    Raises UserError, where it can before anything is drawn.
    """
    drawing.check(names)
    sides = Side(names[0], "real"), Side(names[1], "other")
    if (clip is not None or "clip" in (wanted or ())) and sides[1].kept is not None:
        raise UserError(f"{names[1]} holds statistics: a CLIP score needs the pictures themselves")
    if "clip" in (wanted or ()) and clip is None:
        raise UserError("the measure clip needs a CLIP: --clip FOLDER of transformers or open_clip")
    if wanted is not None and set(wanted) == {"clip"}:
        sides[1].open(drawing)
        count = None if sides[1].pictures is None else len(sides[1].pictures.items[:limit])
        return Comparison((names[0], None), (names[1], count), None, _scored(sides[1], clip, limit), [])
    extractor = _extractor(sides, network, weights)
    keep = wanted is None or any(each in _OF_ALL for each in wanted)
    for side in sides:
        side.open(drawing)
    real, other = (side.statistics(extractor, keep, limit) for side in sides)
    measures, notes = compare(real, other, wanted)
    measures += _scored(sides[1], clip, limit)
    return Comparison((names[0], real.count), (names[1], other.count), real.network.title, measures, notes)


def _scored(side: Side, clip: ImageTextEncoder | None, limit: int | None) -> list[Measure]:
    """The CLIP score of a side's pictures and their captions, where there is a CLIP."""
    if clip is None or side.pictures is None:
        return []
    score = clip_score(clip, side.pictures, limit=limit)
    return [Measure("clip_score", "CLIP score (beside it, its standard error)", score.mean, score.error)]


def load_encoder(folder: Path, model: str | None = None) -> ImageTextEncoder:
    """Load a CLIP: of transformers, of open_clip, or our own over latents.

    model: that the latter was trained for, for its autoencoder and text encoder; None is the bundled one. Raises
    UserError.
    """
    from ldm.conditioning.clip import is_latent_clip
    from ldm.conditioning.clip_models import load_clip

    path = folder / "config.json"
    if not (path.is_file() and is_latent_clip(read_json(path))):
        return load_clip(folder, device=_device())
    system = System.load(model, device=_device())
    return load_clip(folder, system.autoencoder, system.text, device=_device())


def keep_statistics(
    name: str,
    file: Path,
    drawing: Drawing,
    network: NetworkName | None = None,
    weights: Path | None = None,
    features: bool = False,
    limit: int | None = None,
) -> FeatureStatistics:
    """Write one side's statistics to a file; features: with those of all pictures. Raises UserError."""
    check_ending(file)
    drawing.check([name])
    side = Side(name, "real")
    extractor = _extractor([side], network, weights)
    side.open(drawing)
    found = side.statistics(extractor, features, limit)
    found.save(file)
    return found


def _extractor(
    sides: Collection[Side], network: NetworkName | None, weights: Path | None
) -> Extractor | None:
    """The network that the pictures among the sides are shown to; None where there are none."""
    files = [side.kept for side in sides if side.kept is not None]
    if len(files) == 2:
        check_alike(*files)
    stated = network or ("efficientnet" if files and files[0].network == EFFICIENTNET_LITE0 else "inception")
    if len(files) == len(sides):
        return None
    made = load_extractor(stated, weights, _device())
    for each in files:
        if each.network != made.network:
            raise UserError(
                f"a side's file holds statistics of {each.network.title}'s features, and --features {stated} asks for "
                f"{made.network.title}'s: leave --features out, or make the file anew"
            )
    return made


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")
