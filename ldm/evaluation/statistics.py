"""What is kept of a set of pictures: moments of its features, and of which network they are; in a file."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.files import check_finite, read_metadata, read_tensors, write_tensors
from ldm.checkpoints.paths import must_be_file
from ldm.errors import UserError
from ldm.files import whole_file
from ldm.foreign import foreign, plain_status

SUFFIXES = (".npz", ".safetensors")
_WIDEST = 2**14  # features that a file may have: their covariance is read whole


@dataclass(frozen=True)
class Network:
    """A network with all that decides over its features: statistics of others can't be compared.

    name, preprocessing: as files state them. title: for people. width: of its features.
    """

    name: str
    preprocessing: str
    title: str
    width: int


INCEPTION = Network(
    "inception-v3-2015-12-05", "8 bits, TensorFlow 1 bilinear to 299 px", "FID's Inception-v3", 2048
)
EFFICIENTNET_LITE0 = Network(
    "efficientnet-lite0", "8 bits, antialiased bilinear to 224 px", "EfficientNet-Lite0", 1280
)
_KNOWN = {each.name: each for each in (INCEPTION, EFFICIENTNET_LITE0)}


class Moments:
    """Mean and covariance of rows that come in batches, in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._squares = torch.zeros(0), torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Take up rows (N, D)."""
        rows = rows.double()
        count, mean = len(rows), rows.mean(0)
        centred = rows - mean
        squares = centred.T @ centred
        if not self.count:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total, shift = self.count + count, mean - self._mean
        self._squares = self._squares + squares + torch.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,)"""
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(D, D), without bias: divided by one less than the rows. Raises UserError for fewer than two."""
        if self.count < 2:
            raise UserError(
                f"statistics need two pictures or more, and here {'is one' if self.count else 'are none'}"
            )
        return self._squares / (self.count - 1)


@dataclass(frozen=True)
class FeatureStatistics:
    """Of a set of pictures: mean (D,) and covariance (D, D) of its features, float64.

    count: of the pictures; None where a file doesn't say. features (N, D) and logits (N, K), float32, where they are
    kept. unnamed: the file doesn't say of which network it is, and was taken for Inception's by its width.
    """

    network: Network
    count: int | None
    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None
    logits: Tensor | None = None
    unnamed: bool = False

    def save(self, path: Path) -> None:
        """Write a file, `.npz` or `.safetensors`, which other FID programs read by its `mu` and `sigma`.

        Raises UserError for another ending, or where it can't be written.
        """
        check_ending(path)
        tensors = {"mu": self.mean, "sigma": self.covariance}
        optional = {"features": self.features, "logits": self.logits}
        tensors |= {name: each for name, each in optional.items() if each is not None}
        texts = {"network": self.network.name, "preprocessing": self.network.preprocessing}
        if self.count is not None:
            texts["count"] = str(self.count)
        if path.suffix == ".safetensors":
            write_tensors(path, tensors, texts)
            return
        arrays = {name: each.numpy() for name, each in tensors.items()}
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays, **{name: np.array(text) for name, text in texts.items()})  # type: ignore[arg-type]


def check_ending(path: Path) -> None:
    """Raise UserError for a name that statistics can't be written to."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: statistics are written to a name that ends in {' or '.join(SUFFIXES)}")


def load_statistics(path: Path) -> FeatureStatistics:
    """Read a file of `save`, or the `.npz` of other FID programs, which holds `mu` and `sigma`.

    The latter say neither of which network nor of how many pictures they are. Those of 2048 features are taken for
    Inception's. Raises UserError.
    """
    tensors, texts = _read_npz(path) if path.suffix == ".npz" else (read_tensors(path), read_metadata(path))
    if absent := {"mu", "sigma"} - tensors.keys():
        raise UserError(
            f"{path} holds no statistics of features: it has no {' and no '.join(sorted(absent))}"
        )
    mean, covariance = tensors["mu"].double(), tensors["sigma"].double()
    width = mean.shape[0] if mean.ndim == 1 else 0
    if covariance.shape != (width, width) or not width:
        raise UserError(
            f"{path}: a mean {tuple(mean.shape)} and a covariance {tuple(covariance.shape)} don't belong together"
        )
    check_finite({"mu": mean, "sigma": covariance}, path)
    network = _network(path, texts, width)
    count = texts.get("count")
    if count is not None and not (count.isascii() and count.isdigit()):
        raise UserError(f"{path}: its number of pictures is {count:.40}, which is none")
    features, logits = tensors.get("features"), tensors.get("logits")
    _check_rows(path, features, logits, width)
    known = None if count is None else int(count)
    return FeatureStatistics(network, known, mean, covariance, features, logits, "network" not in texts)


def _network(path: Path, texts: Mapping[str, str], width: int) -> Network:
    """The network that a file's statistics are of."""
    name = texts.get("network")
    if name is None:
        if width == INCEPTION.width:
            return INCEPTION
        raise UserError(
            f"{path} says not of which network its {width} features are, and FID's Inception has {INCEPTION.width}"
        )
    network = _KNOWN.get(name)
    if network is None or texts.get("preprocessing") != network.preprocessing or width != network.width:
        what = f"{width} features of {name:.60} ({texts.get('preprocessing', 'no preprocessing named'):.80})"
        raise UserError(f"{path} holds statistics of {what}, which this version can't make: make them anew")
    return network


def _check_rows(path: Path, features: Tensor | None, logits: Tensor | None, width: int) -> None:
    if features is not None and (features.ndim != 2 or features.shape[1] != width):
        raise UserError(f"{path}: features {tuple(features.shape)} are not those of its mean ({width},)")
    rows = logits.shape[0] if logits is not None and logits.ndim == 2 else None
    if logits is not None and (features is None or rows != len(features)):
        raise UserError(f"{path}: its logits {tuple(logits.shape)} are not of its features' pictures")
    check_finite(
        {name: each for name, each in (("features", features), ("logits", logits)) if each is not None}, path
    )


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    must_be_file(path)
    with foreign(path, "is no whole file of statistics (.npz)"):
        plain_status(path)
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz: cut short or of another kind")
        with np.load(path, allow_pickle=False) as file:
            tensors, texts = {}, {}
            for name in ("mu", "sigma", "features", "logits", "network", "preprocessing", "count"):
                if name in file.files:
                    _take(name, file, path, tensors, texts)
            return tensors, texts


def _take(name: str, file: Any, path: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    with zipfile.ZipFile(path) as archive:  # what is packed may be far larger than the file
        size = archive.getinfo(f"{name}.npy").file_size
    if size > max(8 * _WIDEST**2, 64 * path.stat().st_size):
        raise ValueError(f"its {name} would unpack to {size:,} bytes")
    array = file[name]
    if array.dtype.kind in "fiu" and array.ndim:
        tensors[name] = torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
    elif array.dtype.kind == "U" and not array.ndim:
        texts[name] = str(array)
    else:
        raise ValueError(f"its {name} is an array of {array.dtype} {array.shape}")
