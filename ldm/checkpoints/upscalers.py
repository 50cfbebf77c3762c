"""Files of networks that enlarge pictures: which network one holds, read from its tensors' names and shapes.

Sources: the module names of xinntao/ESRGAN (old: `model.0`), of BSRGAN (`RRDB_trunk`) and of BasicSR and Real-ESRGAN
(`conv_first`, `body`), whose names are ours.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.files import a_few, read_tensors
from ldm.checkpoints.keymap import KeyMap, Row, row
from ldm.errors import UserError

_COLOURS = 3
_MOST_DOUBLINGS = 3
_LARGEST_SCALE = 8
# A part of a name that only this kind of network has.
_OTHERS = {
    ".conv1x1.": "an ESRGAN+",
    "relative_position_bias_table": "a SwinIR or another transformer of windows (HAT, Swin2SR)",
    ".attn.attns.": "a DAT",
    "diffusion_model.": "a diffusion model",
    "lora_": "a LoRA",
    "unet1.": "a waifu2x or Real-CUGAN",
    "block_1.c1_r.": "a SPAN",
    "style_conv1.": "a GFPGAN, for faces",
}
# Where the layouts of RRDBNet tell themselves apart.
_MARKS = {
    "new": "body.0.rdb1.conv1.weight",
    "middle": "RRDB_trunk.0.RDB1.conv1.weight",
    "old": "model.1.sub.0.RDB1.conv1.0.weight",
}
_BLOCKS = {
    "new": "body.{n}.rdb{m}.conv{k}.",
    "middle": "RRDB_trunk.{n}.RDB{m}.conv{k}.",
    "old": "model.1.sub.{n}.RDB{m}.conv{k}.0.",
}


@dataclass(frozen=True)
class UpscalerFile:
    """The content of a file: the network's kind, "rrdb" or "compact", its settings, and its tensors under our names."""

    kind: str
    config: dict[str, int]
    tensors: dict[str, Tensor]


def read_upscaler(path: str | Path) -> UpscalerFile:
    """Read a `.pth` or `.safetensors` of an ESRGAN, a Real-ESRGAN or a compact network.

    Raises UserError for a file that can't be read, or that holds another network.
    """
    tensors = read_tensors(path)
    layout = next((name for name, mark in _MARKS.items() if mark in tensors), None)
    if layout:
        config = _rrdb_config(tensors, layout, path)
        rows = rrdb_rows(layout, config["blocks"], config["doublings"])
        kind = "rrdb"
    elif "body.0.weight" in tensors and "body.1.weight" in tensors and "body.2.weight" in tensors:
        config, rows, kind = _compact_config(tensors, path), [row("body.", "body.")], "compact"
    else:
        raise UserError(
            f"{path} holds {_guess(tensors)}: give a file of ESRGAN, Real-ESRGAN or its compact network"
        )
    if other := next((what for part, what in _OTHERS.items() if any(part in name for name in tensors)), None):
        raise UserError(f"{path} is {other}: only ESRGAN, Real-ESRGAN and its compact network are known")
    keys = KeyMap.over_theirs(rows, tensors, path, f"names that are unknown in a {kind} network:")
    return UpscalerFile(kind, config, keys.to_ours(tensors))


def rrdb_rows(layout: str, blocks: int, doublings: int) -> list[Row]:
    """Return the rows of an RRDBNet in the layout "new" (which is ours), "middle" or "old"."""
    ups = range(1, doublings + 1)
    last = 3 * doublings + 2  # old: an enlargement, a convolution, an activation for each doubling
    ends = {
        "new": ["conv_first.", "conv_body.", *(f"conv_up{k}." for k in ups), "conv_hr.", "conv_last."],
        "middle": ["conv_first.", "trunk_conv.", *(f"upconv{k}." for k in ups), "HRconv.", "conv_last."],
        "old": [
            "model.0.",
            f"model.1.sub.{blocks}.",
            *(f"model.{3 * k}." for k in ups),
            f"model.{last}.",
            f"model.{last + 2}.",
        ],
    }
    rows = [row(ours, theirs) for ours, theirs in zip(ends["new"], ends[layout], strict=True)]
    places = [{"n": n, "m": m, "k": k} for n in range(blocks) for m in (1, 2, 3) for k in (1, 2, 3, 4, 5)]
    return rows + [row(_BLOCKS["new"].format(**each), _BLOCKS[layout].format(**each)) for each in places]


def _rrdb_config(tensors: Mapping[str, Tensor], layout: str, where: str | Path) -> dict[str, int]:
    first = _weight(tensors, "model.0.weight" if layout == "old" else "conv_first.weight", where)
    colours = int(first.shape[1])
    unshuffle = math.isqrt(colours // _COLOURS)
    if _COLOURS * unshuffle**2 != colours or unshuffle not in (1, 2, 4):
        raise UserError(
            f"{where} takes {colours} channels: networks for RGB take 3, or 12 or 48 in squares of pixels"
        )
    block = (
        re.escape(_BLOCKS[layout]).replace(r"\{n\}", r"(\d+)").replace(r"\{m\}", "1").replace(r"\{k\}", "1")
    )
    doublings = _doublings(tensors, layout, where)
    if 2**doublings < unshuffle:
        raise UserError(f"{where} would make pictures smaller: it takes squares of {unshuffle} pixels as one")
    return {
        "channels": int(first.shape[0]),
        "growth": int(_weight(tensors, _MARKS[layout], where).shape[0]),
        "blocks": len({found[1] for name in tensors if (found := re.match(block, name))}),
        "doublings": doublings,
        "unshuffle": unshuffle,
    }


def _doublings(tensors: Mapping[str, Tensor], layout: str, where: str | Path) -> int:
    if layout == "old":
        found = _numbers(tensors, r"model\.(\d{1,3})\.weight")
        doublings, rest = divmod(max(found) - 4, 3)
    else:
        pattern = r"conv_up(\d)\.weight" if layout == "new" else r"upconv(\d)\.weight"
        doublings, rest = len(_numbers(tensors, pattern)), 0
    if rest or not 0 <= doublings <= _MOST_DOUBLINGS:
        raise UserError(
            f"{where} doubles a picture in no known way: networks for x1, x2, x4 and x8 are known"
        )
    return doublings


def _compact_config(tensors: Mapping[str, Tensor], where: str | Path) -> dict[str, int]:
    last = max(_numbers(tensors, r"body\.(\d{1,6})\.weight"))
    first, final = (_weight(tensors, f"body.{k}.weight", where) for k in (0, last))
    scale = math.isqrt(final.shape[0] // _COLOURS)
    if first.shape[1] != _COLOURS or final.shape[0] != _COLOURS * scale**2:
        raise UserError(
            f"{where} takes {first.shape[1]} channels and gives {final.shape[0]}: networks for RGB are known"
        )
    if not 1 <= scale <= _LARGEST_SCALE or last % 2 or tensors["body.1.weight"].ndim != 1:
        raise UserError(
            f"{where} is no compact network: it has convolutions and PReLUs in turn, for x1 to x{_LARGEST_SCALE}"
        )
    if last // 2 > len(tensors):
        raise UserError(f"{where} counts to {last} with {len(tensors)} tensors: names are missing")
    return {"channels": int(first.shape[0]), "convolutions": last // 2 - 1, "scale": scale}


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return [int(found[1]) for name in names if (found := re.fullmatch(pattern, name))]


def _weight(tensors: Mapping[str, Tensor], name: str, where: str | Path) -> Tensor:
    """A convolution's weight (O, I, 3, 3). Raises UserError for another shape, or for none of it."""
    if name not in tensors:
        raise UserError(f"{where} lacks {name}: it is cut short, or another network")
    found = tensors[name]
    if found.ndim != 4 or min(found.shape) < 1:
        raise UserError(
            f"{where}: {name} is {tuple(found.shape)}, where the weights of a 3x3 convolution were expected"
        )
    return found


def _guess(tensors: Mapping[str, Tensor]) -> str:
    """What a file holds that is none of ours, as far as its names tell."""
    for part, what in _OTHERS.items():
        if any(part in name for name in tensors):
            return what
    return f"an unknown network ({a_few(list(tensors))})"
