"""The sprites: one RGBA picture of every thing in every style, cut out of the packages once and kept in one file."""

import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ldm.data.packages import PACKAGES_FOLDER
from ldm.emoji.packages import SOURCES
from ldm.emoji.things import choose
from ldm.errors import UserError, nearest
from ldm.files import whole_file
from ldm.foreign import foreign, plain_status
from ldm.pictures import open_raster

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
SPRITES_FILE = Path("runs/data/sprites/sprites.npz")
MARGIN = 6 / 128  # free on each side of the long side
_LARGEST = 2**29  # bytes that a file of sprites may unpack to
DAMAGED = (OSError, EOFError, tarfile.TarError, zlib.error)
RENDER = 256  # px; vector pictures are drawn at this size, then reduced like the others


@dataclass(frozen=True)
class Style:
    """A drawing style: the package it comes from and how a thing's picture is found in it."""

    package: str
    open: Callable[[Path], Callable[[str], "Image | None"]]


def _tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except DAMAGED as error:
        raise UserError(
            f"cannot open the package {path} ({error}): delete it, and scripts/prepare_data.py will fetch it again"
        ) from None


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        file = archive.extractfile(name)
    except (KeyError, *DAMAGED) as error:
        raise UserError(
            f"{path} holds no readable {name} ({error}): delete it, and scripts/prepare_data.py will fetch it again"
        ) from None
    if file is None:
        raise UserError(
            f"{path}: {name} is not a file: delete it, and scripts/prepare_data.py will fetch it again"
        )
    return file.read()


def _webp_files(path: Path) -> Callable[[str], "Image | None"]:
    """Pictures in files named by code point."""

    with _tar(path) as archive:
        try:
            contents = {
                Path(member.name).stem.removesuffix("-fe0f"): file.read()
                for member in archive
                if member.name.endswith(".webp") and (file := archive.extractfile(member))
            }
        except DAMAGED as error:
            raise UserError(
                f"cannot read the package {path} ({error}): delete it, and scripts/prepare_data.py will fetch it again"
            ) from None

    def find(code: str) -> "Image | None":
        content = contents.get(code.removesuffix("-fe0f"))
        return None if content is None else open_raster(content, ["WEBP"]).convert("RGBA")

    return find


def _iconify(path: Path) -> Callable[[str], "Image | None"]:
    """Vector pictures in one JSON file, with a second one that maps code points to names."""
    advice = ": delete it, and scripts/prepare_data.py will fetch it again"
    with _tar(path) as archive, foreign(path, "is damaged", advice):
        icons = json.loads(_member(archive, "package/icons.json", path))
        chars = json.loads(_member(archive, "package/chars.json", path))
    bodies, aliases = icons["icons"], icons.get("aliases", {})
    side = (icons.get("width", 16), icons.get("height", 16))

    def find(code: str) -> "Image | None":
        name = chars.get(code) or chars.get(code.removesuffix("-fe0f"))
        icon = bodies.get(name) or bodies.get(aliases.get(name, {}).get("parent"))
        if icon is None:
            return None
        width, height = icon.get("width", side[0]), icon.get("height", side[1])
        return _render(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )

    return find


def _render(svg: str) -> "Image":

    try:
        import resvg_py
    except ImportError:
        raise UserError("drawing the flat sprites needs resvg_py: pip install resvg_py") from None
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER, height=RENDER, skip_system_fonts=True)
    return open_raster(bytes(png), ["PNG"]).convert("RGBA")


STYLES: dict[str, Style] = {
    "3d": Style("@lobehub/fluent-emoji-3d", _webp_files),
    "flat": Style("@iconify-json/fluent-emoji-flat", _iconify),
    "cartoon": Style("@iconify-json/noto", _iconify),
}


def resize(picture: "Image", width: int, height: int) -> "Image":
    """Resize an RGBA picture, premultiplied by its alpha: no colour of clear pixels bleeds into the rim."""
    from PIL import Image

    return picture.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")


def cut(picture: "Image") -> "Image":
    """Return the RGBA picture without its clear margin. Raises UserError when all of it is clear."""
    box = picture.getchannel("A").point([0] * 8 + [255] * 248).getbbox()
    if box is None:
        raise UserError(
            "a sprite's picture is empty: delete the packages, and scripts/prepare_data.py will fetch them again"
        )
    return picture.crop(box)


def fit(picture: "Image", size: int) -> Pixels:
    """Cut the clear margin off and centre the rest, its long side size * (1 - 2 * MARGIN), in (size, size, 4)."""
    from PIL import Image

    picture = cut(picture)
    factor = size * (1 - 2 * MARGIN) / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(resize(picture, width, height), ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas).copy()


@dataclass(frozen=True)
class SpriteSet:
    """All sprites in memory: `pixels[(thing, style)]` is (size, size, 4) uint8, straight alpha."""

    pixels: dict[tuple[str, str], Pixels]
    size: int

    @property
    def styles(self) -> list[str]:
        return list(dict.fromkeys(style for _, style in self.pixels))

    def save(self, path: str | Path) -> None:
        """Write one .npz with the pictures and their index, whole or not at all. Raises UserError."""
        keys = list(self.pixels)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                pixels=np.stack([self.pixels[key] for key in keys]),
                things=np.array([thing for thing, _ in keys]),
                styles=np.array([style for _, style in keys]),
            )


def load_sprites(path: str | Path = SPRITES_FILE) -> SpriteSet:
    """Read what `build_sprites` wrote. Raises UserError when it is missing or not such a file."""
    if not Path(path).exists():
        raise UserError(f"there are no sprites at {path}: run scripts/prepare_data.py first")
    advice = ": delete it and build it again, with scripts/prepare_data.py"
    with foreign(path, "is not a file of sprites", advice):
        plain_status(path)
        with zipfile.ZipFile(path) as archive:
            whole = sum(each.file_size for each in archive.infolist())
        if whole > _LARGEST:
            raise ValueError(f"it would unpack to {whole:,} bytes, where {_LARGEST:,} are the most")
        with np.load(path, allow_pickle=False) as file:
            pixels, things, styles = file["pixels"], file["things"], file["styles"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or things.ndim != 1 or styles.ndim != 1:
            raise ValueError(f"its pixels are {pixels.dtype} of shape {pixels.shape}")
        keys = zip(map(str, things.tolist()), map(str, styles.tolist()), strict=True)
        return SpriteSet(dict(zip(keys, pixels, strict=True)), pixels.shape[1])


def build_sprites(
    packages: str | Path = PACKAGES_FOLDER,
    path: str | Path = SPRITES_FILE,
    styles: Iterable[str] = ("3d", "flat", "cartoon"),
    size: int = 128,
    things: Iterable[str] = ("all",),
) -> SpriteSet:
    """Cut the sprites of `things` in `styles` out of the fetched `packages`, write them to `path`, return them.

    A style that lacks a thing is left out for that thing. Raises UserError for an unknown style or thing and for a
    package that is missing or damaged.
    """
    chosen = choose(things)
    pixels: dict[tuple[str, str], Pixels] = {}
    for style in styles:
        if style not in STYLES:
            raise UserError(f"no style is called {style!r}{nearest(style, STYLES)}")
        source = SOURCES[STYLES[style].package]
        package = Path(packages) / source.filename
        if not package.exists():
            raise UserError(f"the package {package} is missing: fetch it first, with scripts/prepare_data.py")
        find = STYLES[style].open(package)
        pictures = ((thing, find(thing.code)) for thing in chosen)
        pixels.update({(thing.name, style): fit(picture, size) for thing, picture in pictures if picture})
    sprites = SpriteSet(pixels, size)
    sprites.save(path)
    return sprites
