"""What the bundled model's training needs before it starts: packages, sprites, the frozen text encoder."""

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ldm.checkpoints.folder import whole_folder
from ldm.conditioning.minilm import PACKAGE, minilm_from_package, standardise
from ldm.config import load_yaml
from ldm.data.recipe import Recipe
from ldm.data.sources import fetch
from ldm.data.sprites import SPRITES_FILE, build_sprites, load_sprites
from ldm.errors import UserError
from ldm.training.run import RunConfig

TEXT = Path("runs/bundled/text")  # what configs/bundled-unet.yaml reads
_CAPTIONS = 2048


def prepare(config: str | Path) -> None:
    """Fetch the packages, cut the sprites, unpack MiniLM; what is there already is left alone. Raises UserError.

    config: the run whose captions MiniLM's hidden states are standardised over (configs/bundled-unet.yaml).
    """
    objective = load_yaml(config, RunConfig).text_to_image
    if objective is None:
        raise UserError(f"{config} configures no text_to_image: its captions are needed")
    files = fetch()
    if not SPRITES_FILE.exists():
        build_sprites()
    recipe = Recipe(load_sprites(), objective.recipe)
    unpack_minilm(files[PACKAGE], TEXT, [recipe.sample(i).caption for i in range(_CAPTIONS)])


def unpack_minilm(package: Path, folder: Path, captions: Sequence[str]) -> None:
    """`text_encoder` and `tokenizer` out of the package, both whole or no folder at all. Raises UserError."""
    if (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir():
        return
    if folder.exists():
        raise UserError(f"{folder} lacks its text_encoder or its tokenizer: delete it and run this again")
    with whole_folder(folder) as new, tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(package) as archive:
            archive.extractall(unpacked)
        source = next(Path(unpacked).rglob("model.safetensors")).parent
        minilm_from_package(new / "text_encoder", new / "tokenizer", source=source)
        standardise(new, captions)
