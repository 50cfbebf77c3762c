"""What a run looks like: a sheet of its pictures, and a plot of how fast they came."""

import io
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.figures import figure
from ldm.files import whole_file, write_bytes
from ldm.foreign import foreign
from ldm.pictures import grid, open_raster, png
from pipelines.batch.ledger import MANIFEST
from pipelines.batch.manifest import arrow

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN, _SIDE = 400, 96  # pictures of a sheet at most, and the pixels that each has to itself
_BARS = 60


def contact_sheet(out: Path) -> Path:
    """Put small pictures of a finished run on one sheet, evenly taken where they are many; returns its path.

    Raises UserError.
    """
    names = file_names(out)
    if not names:
        raise UserError(f"{out} holds no picture to put on a sheet")
    step = max(1.0, len(names) / _SHOWN)
    chosen = [names[int(k * step)] for k in range(min(len(names), _SHOWN))]
    sheet = grid([_small(out, name) for name in chosen], math.ceil(len(chosen) ** 0.5))
    write_bytes(out / "contact-sheet.png", png(sheet))
    return out / "contact-sheet.png"


def throughput(out: Path) -> Path:
    """Plot how many pictures a second a finished run drew, over its time; returns the plot's path. Raises UserError."""
    plot = figure(8, 3.2)
    columns = _columns(out, "time", "file_name")
    ends = sorted(
        when.timestamp()
        for some in columns
        for when, name in zip(some["time"], some["file_name"], strict=True)
        if name
    )
    if len(ends) < 2:
        raise UserError(f"{out} holds too few pictures to plot how fast they came")
    span = max(ends[-1] - ends[0], 1e-3)
    bars = min(_BARS, max(1, len(ends) // 8))
    unit, scale = ("minutes", 60.0) if span > 300 else ("seconds", 1.0)
    heights = [0] * bars
    for end in ends:
        heights[min(int((end - ends[0]) / span * bars), bars - 1)] += 1
    width = span / bars
    axes: Any = plot.subplots()
    edges = [k * width / scale for k in range(bars + 1)]
    axes.stairs([height / width for height in heights], edges, fill=True, color="#4c72b0", alpha=0.8)
    axes.axhline(len(ends) / span, color="#c44e52", linewidth=1.2)
    axes.set(xlabel=f"{unit} since the first picture", ylabel="pictures a second", xlim=(0, edges[-1]))
    title = f"{len(ends):,} pictures, {len(ends) / span:.3g} a second"
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(out / "throughput.png") as temporary:
        plot.savefig(temporary, format="png", dpi=120)
    return out / "throughput.png"


def file_names(out: Path) -> list[str]:
    """Return the names of a finished run's pictures, in the order of its rows. Raises UserError."""
    return [name for some in _columns(out, "file_name") for name in some["file_name"] if name]


def picture_of(out: Path, name: str) -> "Image":
    """Return a picture of a run, by its name in the manifest. Raises UserError."""
    return open_raster(_content(out, name)).convert("RGB")


def _columns(out: Path, *names: str) -> Iterator[dict[str, list[Any]]]:
    """Columns of the manifest, some thousand lines at a time."""
    parquet, path = arrow().parquet, out / MANIFEST
    advice = "; delete it, and the same command writes it anew"
    with foreign(path, advice=advice), path.open("rb") as opened, parquet.ParquetFile(opened) as file:
        for batch in file.iter_batches(columns=list(names)):
            yield batch.to_pydict()


def _small(out: Path, name: str) -> "Image":
    """A picture of a run, in the middle of a square."""
    from PIL import Image

    picture = picture_of(out, name)
    picture.thumbnail((_SIDE, _SIDE))
    square = Image.new("RGB", (_SIDE, _SIDE), "white")
    square.paste(picture, ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2))
    return square


def _content(out: Path, name: str) -> bytes:
    shard, inside, member = name.rpartition(".tar/")
    try:
        if not inside:
            return (out / name).read_bytes()
        with tarfile.open(out / f"{shard}.tar") as tar:
            file = tar.extractfile(member)
            return (file or io.BytesIO()).read()
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{out / name} can't be read ({error}): the same command draws it again") from error
