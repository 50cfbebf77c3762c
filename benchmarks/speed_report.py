"""Measurements of parts as tables in Markdown and as a plot."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.comparison import DEFAULT
from ldm.errors import UserError
from ldm.figures import figure
from ldm.files import whole_file

TITLES = {
    "step": "a guided step of the U-Net",
    "decode": "latents to pixels",
    "encode": "pixels to latents",
    "text": "prompts to embeddings",
    "picture": "whole pictures",
    "start": "from python's start to the first picture",
    "import": "import",
}
_COLORS = {"diffusers": "#8c8c8c", "OpenVINO": "#d98c3f", "ours": "#3f6fb5"}


def table(found: dict[str, Any]) -> str:
    """One measurement: a row a contender.

    Ratios are of median seconds, above 1 where the contender is faster: than diffusers' default, and than diffusers in
    the contender's own precision, untuned.
    """
    asked, own = found["key"], found["contenders"]
    columns = _columns(found)
    title = f"{asked['model']}: {TITLES[asked['part']]}, {asked['pictures']} at once"
    if asked["part"] == "import":
        title = f"{TITLES[asked['part']]}"
    title += f", {asked['steps']} steps" if asked["steps"] else ""
    lines = [f"### {title}", ""]
    head = ["", "seconds (least to most)", "× diffusers, float32", "× diffusers, same precision", *columns]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, each in own.items():
        if "failed" in each:
            lines.append(
                f"| {name} | failed: {each['failed'].replace('|', '/')} " + "| " * (len(head) - 2) + "|"
            )
            continue
        like = f"diffusers, {each['dtype']}" if each.get("dtype") else "diffusers"
        ratios = [_ratio(own, base, each) for base in (DEFAULT if DEFAULT in own else "diffusers", like)]
        shown = f"{name} ({each['dtype']})" if name == "ours, as loaded" else name
        cells = [shown, spread(each["seconds"]), *ratios, *(_cell(found, each, column) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    peaks = [f"{name} {median(each) / 1e9:,.0f}" for name, each in found["peaks"].items()]
    if peaks:
        lines += ["", f"Peak, GFLOP/s: {', '.join(peaks)}."]
    if found.get("profiles"):
        lines += ["", *_profiles(found["profiles"])]
    return "\n".join(lines)


def _profiles(profiles: dict[str, dict[str, float]]) -> list[str]:
    """Shares of the time by kind of operator, a row a contender."""
    kinds = sorted({kind for spent in profiles.values() for kind in spent})
    lines = [f"| share of the time | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, spent in profiles.items():
        whole = sum(spent.values()) or 1.0
        lines.append(
            f"| {name} | {' | '.join(f'{100 * spent.get(kind, 0) / whole:.0f} %' for kind in kinds)} |"
        )
    return lines


def spread(seconds: Sequence[float]) -> str:
    """The median, the least and the most."""
    return f"{median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def _columns(found: dict[str, Any]) -> list[str]:
    part = found["key"]["part"]
    if part == "import":
        return ["beyond torch"]
    if part == "start":
        device = any("peak_device_bytes" in each for each in found["contenders"].values())
        return ["peak memory, GB", *(["of the device, GB"] if device else [])]
    more = ["GFLOP/s", "of the peak"] if found["operations"] else []
    return [*more, "PSNR, dB" if part == "picture" else "relative L2"]


def _cell(found: dict[str, Any], each: dict[str, Any], column: str) -> str:
    if column == "beyond torch":
        return spread(each["beyond_torch"])
    if column in ("peak memory, GB", "of the device, GB"):
        held = each.get("peak_bytes" if column.startswith("peak") else "peak_device_bytes")
        return f"{median(held) / 1e9:.2f}" if held else ""
    if column in ("PSNR, dB", "relative L2"):
        if "distance" not in each:
            return ""
        return f"{each['distance']:.1f}" if column.startswith("PSNR") else f"{each['distance']:.1e}"
    rate = found["operations"] / median(each["seconds"])
    if column == "GFLOP/s":
        return f"{rate / 1e9:,.0f}"
    peaks = [median(own) for name, own in found["peaks"].items() if name.endswith(f" {each['dtype']}")]
    return f"{100 * rate / max(peaks):.0f} %" if peaks else ""


def _ratio(own: dict[str, Any], base: str, each: dict[str, Any]) -> str:
    other = own.get(base, {})
    if "failed" in other or not other.get("seconds"):
        return ""
    return f"{median(other['seconds']) / median(each['seconds']):.2f}"


# The plot


def plot(results: Iterable[dict[str, Any]], path: Path) -> None:
    """Draw how many times as fast as diffusers' default each contender is, a panel a measurement.

    A bar is the ratio of medians; its line goes from the slowest round to the fastest. Raises UserError without
    matplotlib, and where nothing was compared with that default.
    """
    panels = [found for each in results for found in each["measurements"] if _base(found)]
    if not panels:
        raise UserError("nothing to plot: no measurement holds a time of diffusers' default")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    longest = max(len(_bars(found)) for found in panels)
    drawn = figure(6.2 * columns, (0.75 + 0.27 * longest) * rows)
    axes = drawn.subplots(rows, columns, squeeze=False)
    for place, found in zip(axes.flat, panels, strict=False):
        _panel(place, found)
    for place in list(axes.flat)[len(panels) :]:
        place.set_visible(False)
    with whole_file(path) as temporary:
        drawn.savefig(temporary, dpi=110, format="png")


def _base(found: dict[str, Any]) -> float | None:
    own = found["contenders"]
    seconds = own.get(DEFAULT, own.get("diffusers", {})).get("seconds")
    return median(seconds) if seconds else None


def _bars(found: dict[str, Any]) -> dict[str, list[float]]:
    return {
        name: each["seconds"]
        for name, each in found["contenders"].items()
        if each.get("seconds") and "failed" not in each
    }


def _panel(axes: Any, found: dict[str, Any]) -> None:
    base, bars, asked = _base(found) or 1.0, _bars(found), found["key"]
    for place, (name, seconds) in enumerate(bars.items()):
        ratio = base / median(seconds)
        reach = [[ratio - base / max(seconds)], [base / min(seconds) - ratio]]
        color = _COLORS[next(maker for maker in _COLORS if name.startswith(maker))]
        axes.barh(place, ratio, color=color, xerr=reach, height=0.72, error_kw={"lw": 1, "ecolor": "#333333"})
        axes.text(base / min(seconds), place, f"  {ratio:.2f}", va="center", fontsize=7)
    dtypes = {name: found["contenders"][name].get("dtype") for name in bars}
    labels = [f"{name} ({dtypes[name]})" if name == "ours, as loaded" else name for name in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.axvline(1, color="#333333", lw=0.8)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
    title = TITLES[asked["part"]]
    if asked["part"] != "import":
        title = f"{asked['model']}: {title}, {asked['pictures']} at once"
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(f"times as fast as diffusers' default ({base:.3g} s)", fontsize=7.5)
