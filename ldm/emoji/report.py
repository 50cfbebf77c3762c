"""The report of an evaluation: tables in Markdown, and sheets of pictures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.emoji.quality import SIDES, Judged, Likeness, Reconstructed

if TYPE_CHECKING:
    from PIL.Image import Image

_COLUMNS = {
    "drawn": "drawn",
    "chance": "by another prompt",
    "floor": "real, through the autoencoder",
    "real": "real",
}
_RIGHT, _WRONG, _FRAME, _LINES, _LINE = (60, 170, 80), (220, 70, 60), 3, 3, 11


def table(judged: Judged, part: str) -> str:
    """Return the shares of a part's prompts, a group and in all; in brackets chance, the floor and the real."""
    rows = [(group, group) for group in judged.groups(part)] if len(judged.groups(part)) > 1 else []
    lines = [
        f"In brackets: {'; '.join(list(_COLUMNS.values())[1:])}.\n",
        "| prompts | n | things right, top-1 | top-5 | all right |",
        "|---|---|---|---|---|",
    ]
    for name, group in [*rows, ("all", None)]:
        drawn, *others = (judged.shares(side, part, group) for side in _COLUMNS)
        cells = []
        for figure in ("top1", "top5", "composed"):
            beside = ", ".join(_percent(getattr(each, figure)) for each in others)
            cells.append(f"{_percent(getattr(drawn, figure))} ({beside})")
        lines.append(f"| {name} | {drawn.count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def attributes(judged: Judged, part: str) -> str:
    """Return the share right of each attribute that the prompts tell."""
    by_side = {side: judged.shares(side, part).attributes for side in SIDES}
    lines = ["| told | n | " + " | ".join(_COLUMNS.values()) + " |", "|---|---|---|---|---|---|"]
    for name, (_, count) in by_side["drawn"].items():
        cells = [by_side[side][name][0] for side in _COLUMNS]
        lines.append(f"| {name} | {count} | {' | '.join(map(_percent, cells))} |")
    return "\n".join(lines)


def detectors(tested: dict[str, tuple[float, int]]) -> str:
    """Return the error of each detector on real compositions."""
    lines = ["| detector | right on real compositions | of |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {_percent(share)} | {n} |" for name, (share, n) in tested.items())]
    )


def sets(likeness: dict[str, Likeness], autoencoder: dict[str, Reconstructed]) -> str:
    """Return distances of whole sets, and what the autoencoder loses."""
    lines = [
        "| prompts | Fréchet distance: drawn to real | real to real | autoencoded to real | nearest training "
        "composition: drawn | real | autoencoder: PSNR | perceptual |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part, each in likeness.items():
        first = autoencoder[part]
        lines.append(
            f"| {part} | {each.frechet:.1f} | {each.frechet_real:.1f} | {each.frechet_floor:.1f} | "
            f"{each.nearest:.3f} | {each.nearest_real:.3f} | {first.psnr:.1f} dB | {first.distance:.3f} |"
        )
    return "\n".join(lines)


def sheet(
    pictures: "Sequence[Image]", words: Sequence[str], columns: int, marks: Sequence[bool] | None = None
) -> "Image":
    """Lay out pictures of one size, with words below them; `marks` frames each in green or red."""
    from PIL import Image, ImageDraw

    width, height = pictures[0].size
    cell = (width + 2 * _FRAME, height + 2 * _FRAME + _LINES * _LINE)
    made = Image.new("RGB", (columns * cell[0], -(-len(pictures) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(made)
    for i, (picture, text) in enumerate(zip(pictures, words, strict=True)):
        x, y = i % columns * cell[0], i // columns * cell[1]
        if marks is not None:
            colour = _RIGHT if marks[i] else _WRONG
            draw.rectangle([x, y, x + width + 2 * _FRAME - 1, y + height + 2 * _FRAME - 1], fill=colour)
        made.paste(picture, (x + _FRAME, y + _FRAME))
        for number, line in enumerate(_broken(text, width // 6)[:_LINES]):
            draw.text((x + _FRAME, y + height + 2 * _FRAME + number * _LINE), line, fill="black")
    return made


def _broken(text: str, width: int) -> list[str]:
    """Lines of so many letters at most, where words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _percent(share: float) -> str:
    return "" if share != share else f"{100 * share:.0f} %"
