"""Measures of picture sets: closed forms, torch-fidelity's arithmetic, statistics in files, and the command.

What torch-fidelity gives was recorded once, in an environment of its own (it needs torchvision): version 0.4.0 with
torch 2.13.0, its functions `fid_features_to_statistics` and `fid_statistics_to_metric`, `isc_features_to_metric`,
`kid_features_to_metric` and `prc_features_to_metric` on the features below, its module `FeatureExtractorInceptionV3`
with the weights of `formula_weights`. Features, weights and pictures come from whole numbers (`numbers`), so they are
the same everywhere.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.pictures import open_pictures
from ldm.errors import UserError
from ldm.evaluation.clip_score import clip_score
from ldm.evaluation.features import efficientnet_extractor, load_extractor, load_inception, statistics_of
from ldm.evaluation.frechet import frechet_distance, gaussian_distance
from ldm.evaluation.inception_score import inception_score
from ldm.evaluation.kernel_distance import kernel_distance, squared_discrepancy
from ldm.evaluation.measures import compare, measures_named
from ldm.evaluation.precision_recall import precision_recall
from ldm.evaluation.statistics import (
    EFFICIENTNET_LITE0,
    INCEPTION,
    FeatureStatistics,
    Moments,
    Network,
    load_statistics,
)
from ldm.models.inception import WEIGHTS, InceptionV3, resize_like_tensorflow
from ldm.models.perceptual import EfficientNetLite0
from scripts import evaluate
from tests.tiny import tiny_pipeline_folder


def numbers(*shape: int, key: int) -> Tensor:
    """Numbers in [0, 1) that look random, float64, of products and shifts of whole numbers."""
    x = (torch.arange(math.prod(shape)) * 2654435761 + key * 40503 + 12345) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 2246822519) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 3266489917) & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() / 2**32).reshape(shape)


REAL = numbers(200, 16, key=1)
OTHER = 0.9 * numbers(150, 16, key=2) + 0.1
LOGITS = 4 * numbers(130, 12, key=3)


# --- torch-fidelity's arithmetic ------------------------------------------------------------------------------


def test_the_frechet_distance_is_torch_fidelitys():
    expected = pytest.approx(0.11946235867077348, abs=1e-9)
    assert frechet_distance(REAL, OTHER) == expected
    moments = [(each.mean(0), torch.cov(each.T)) for each in (REAL, OTHER)]
    assert gaussian_distance(*moments[0], *moments[1]) == expected


@pytest.mark.parametrize(
    ("splits", "mean", "deviation"),
    [(10, 1.4801400314877398, 0.055922454381835365), (3, 1.5083688367527295, 0.020612414877009325)],
)
def test_the_inception_score_is_torch_fidelitys(splits: int, mean: float, deviation: float):
    assert inception_score(LOGITS, splits) == pytest.approx((mean, deviation), abs=1e-9)


def test_the_kernel_distance_is_torch_fidelitys():
    found = kernel_distance(REAL, OTHER, subsets=20, size=50)
    assert found == pytest.approx((0.01173089805892109, 0.009658191793534035), abs=1e-9)


@pytest.mark.parametrize(
    ("neighbours", "precision", "recall"), [(3, 144 / 150, 145 / 200), (5, 148 / 150, 171 / 200)]
)
def test_precision_and_recall_are_torch_fidelitys(neighbours: int, precision: float, recall: float):
    """It gives 0.9599999785423279 and 0.7250000238418579, 0.9866666793823242 and 0.8550000190734863: in float32."""
    assert precision_recall(REAL, OTHER, neighbours) == pytest.approx((precision, recall), abs=1e-12)


# --- closed forms ---------------------------------------------------------------------------------------------


def test_the_distance_of_gaussians_has_a_closed_form():
    """Of covariances that commute it is |m1 - m2|^2 + the sum of (s1 - s2)^2 over standard deviations."""
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    one, other = torch.rand(6).double() + 0.1, torch.rand(6).double() * 3
    mean = torch.randn(6).double()
    found = gaussian_distance(mean, turn * one**2 @ turn.T, -mean, turn * other**2 @ turn.T)
    expected = float((2 * mean).square().sum() + (one - other).square().sum())
    assert found == pytest.approx(expected, rel=1e-10)
    # Of one dimension beside many that never differ: a covariance without full rank.
    flat = torch.zeros(50, 50).double()
    flat[0, 0] = 4
    assert gaussian_distance(torch.zeros(50), flat, torch.ones(50), flat / 4) == pytest.approx(
        50 + 1, rel=1e-12
    )


def test_a_set_of_fewer_pictures_than_features_gives_the_same_by_its_moments():
    few, other = torch.randn(7, 40).double(), torch.randn(9, 40).double() + 1
    moments = [(each.mean(0), torch.cov(each.T)) for each in (few, other)]
    assert gaussian_distance(*moments[0], *moments[1]) == pytest.approx(
        frechet_distance(few, other), rel=1e-9
    )
    assert gaussian_distance(*moments[0], *moments[0]) == pytest.approx(0, abs=1e-9)


def test_the_inception_score_of_sure_and_of_unsure_predictions():
    assert inception_score(torch.zeros(40, 8), 4) == pytest.approx((1, 0), abs=1e-12)
    one_hot = 1e4 * F.one_hot(torch.arange(64) % 8, 8).double()
    assert inception_score(one_hot, 1) == pytest.approx((8, 0), rel=1e-12)  # all classes, each surely
    assert inception_score(one_hot[::8], 2) == pytest.approx((1, 0), abs=1e-12)  # one class only
    with pytest.raises(UserError, match="3 pictures can't be 10 parts"):
        inception_score(torch.zeros(3, 8))


def test_the_kernel_distance_is_the_mean_over_pairs():
    x, y = torch.randn(5, 3).double(), torch.randn(4, 3).double() + 0.5

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum((float(a[i] @ b[j]) / 3 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert squared_discrepancy(x, y) == pytest.approx(expected, rel=1e-12)


def test_the_kernel_distance_has_no_bias():
    """Of 400 pairs of sets of one distribution: their mean is 0 within four standard errors, and half lie below 0."""
    found = np.array([squared_discrepancy(torch.randn(20, 4), torch.randn(30, 4)) for _ in range(400)])
    assert abs(found.mean()) < 4 * found.std() / 20
    assert 0.3 < (found < 0).mean() < 0.9
    x = torch.randn(2000, 4).double()
    y = torch.randn(2000, 4).double() + 1
    assert squared_discrepancy(x, y) > 10 * found.std()


def test_precision_and_recall_of_equal_and_of_far_sets():
    x = torch.randn(100, 32)
    assert precision_recall(x, x) == precision_recall(x, x[torch.randperm(100)]) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    assert precision_recall(x[:50], torch.cat([x[:50], x[:50] + 1000])) == (0.5, 1)
    assert precision_recall(torch.cat([x, x + 1000]), x) == (1, 0.5)
    copies = 1e3 + x[:4].repeat(8, 1)  # of a picture to which the third nearest are copies
    assert precision_recall(copies, copies[:16]) == (1, 1)
    with pytest.raises(UserError, match="4 pictures, not 3"):
        precision_recall(x[:3], x)


def test_precision_and_recall_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch):
    """Equation 1 of Kynkäänniemi et al., pair by pair; and the same where few distances fit into memory at once."""
    real, other = torch.randn(60, 3).double(), 1.5 * torch.randn(40, 3).double()

    def share(of: Tensor, among: Tensor) -> float:
        reach = [sorted(float((a - b).norm()) for b in among)[3] for a in among]
        return sum(
            any(float((x - a).norm()) <= r for a, r in zip(among, reach, strict=True)) for x in of
        ) / len(of)

    expected = share(other, real), share(real, other)
    assert 0 < expected[0] < expected[1] <= 1
    assert precision_recall(real, other) == pytest.approx(expected)
    monkeypatch.setattr("ldm.evaluation.precision_recall._AT_ONCE", 130)
    assert precision_recall(real, other) == pytest.approx(expected)


# --- the Inception network ------------------------------------------------------------------------------------


def formula_weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """Weights by `numbers`, of a size that lets numbers through all layers; torch-fidelity's have the same names."""
    made: dict[str, Tensor] = {}
    for key, (name, each) in enumerate(network.state_dict().items()):
        u = numbers(*each.shape, key=key)
        if name.endswith("running_var"):
            u = 0.5 + u
        elif name.endswith("bn.weight"):
            u = 0.75 + u / 2
        elif each.ndim > 1:
            u = (u - 0.5) * (24 / u[0].numel()) ** 0.5
        else:
            u = (u - 0.5) / 5
        made[name] = u.float()
    return made


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as pytorch-fid's, a pickle, with the counters that newer batch norms keep."""
    made = formula_weights(InceptionV3())
    counters = [name.replace("bias", "num_batches_tracked") for name in made if name.endswith("bn.bias")]
    path = tmp_path_factory.mktemp("weights") / WEIGHTS
    torch.save(made | {name: torch.tensor(0) for name in counters}, path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> InceptionV3:
    return load_inception(weights)


# Of torch-fidelity's module: every 256th feature of the first picture, from the sixth on; every 144th logit, without
# the bias and with it, of the second.
# fmt: off
RECORDED = {
    (32, 32): (
        [8.3176746, 0.11726113, 2.0364122, 0.034993924, 0.10805722, 2.3755512, 0, 8.0011349],
        [7.7220559, 2.3965154, 9.1242962, 12.78647, 1.7934428, 4.991065, 5.4967165],
        [7.645649, 2.3816111, 9.2221861, 12.745124, 1.7021515, 4.9483867, 5.5104833],
    ),
    (400, 350): (
        [9.4604912, 0.10801858, 2.0494733, 0.038242966, 0.12872055, 2.9350922, 0, 8.427743],
        [8.6874714, 2.7387619, 9.3105011, 13.787919, 1.692922, 5.2507849, 5.5029912],
        [8.6110649, 2.7238576, 9.408391, 13.746572, 1.6016307, 5.2081065, 5.516758],
    ),
}
# fmt: on
KEYS = {(32, 32): 100, (400, 350): 102}


@pytest.mark.parametrize("size", RECORDED)
def test_the_inception_network_is_torch_fidelitys(inception: InceptionV3, size: tuple[int, int]):
    """Float32 rounds at 6e-8, and some hundred roundings follow each other: 1e-4 of numbers up to 30 is wide."""
    pictures = numbers(2, 3, *size, key=KEYS[size]) * 256
    pictures[1] *= (torch.arange(size[0]).double() / size[0])[:, None]
    features = inception(resize_like_tensorflow(pictures.to(torch.uint8)))
    logits = inception.logits(features, bias=False), inception.logits(features)
    found = features[0, 5::256], *(each[1, ::144] for each in logits)
    for one, other in zip(found, RECORDED[size], strict=True):
        torch.testing.assert_close(one, torch.tensor(other), rtol=1e-4, atol=1e-4)


def test_tensorflows_resize_has_its_corners_at_pixels():
    """Pixel i of 4 lies at i / 2 of 2 pixels; beyond the last one it is repeated."""
    row = torch.tensor([[[[0.0, 10.0]]]])
    assert resize_like_tensorflow(row, 4)[0, 0].tolist() == [[0, 5, 10, 10]] * 4
    picture = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(resize_like_tensorflow(picture, 3), picture[:, :, ::2, ::2])  # not smoothed
    assert torch.equal(resize_like_tensorflow(picture, 6), picture)


def test_other_weights_than_inceptions_are_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tensors = torch.load(weights, weights_only=True, mmap=True)
    torch.save({name: each for name, each in tensors.items() if "fc" not in name}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"2 missing \(fc.weight, fc.bias\)"):
        load_inception(tmp_path / "cut.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match=f"{WEIGHTS} from the releases of pytorch-fid") as refused:
        load_extractor("inception")
    assert "\n" not in str(refused.value) and "efficientnet" in str(refused.value)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / WEIGHTS).symlink_to(weights)
    assert load_extractor("inception").network == INCEPTION


# --- features and statistics ----------------------------------------------------------------------------------


def test_moments_are_those_of_all_rows_together():
    rows = 1000 + torch.randn(70, 5).double()  # far from 0, where sums of squares would lose digits
    moments = Moments()
    for some in rows.split([1, 30, 39]):
        moments.add(some)
    assert moments.count == 70
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(rows.T), rtol=1e-9, atol=1e-9)
    one = Moments()
    one.add(rows[:1])
    with pytest.raises(UserError, match="two pictures or more, and here is one"):
        _ = one.covariance


def statistics(rows: int, network: Network = EFFICIENTNET_LITE0, keep: bool = True) -> FeatureStatistics:
    features = torch.randn(rows, network.width)
    logits = torch.randn(rows, 10) if keep else None
    moments = features.double().mean(0), torch.cov(features.double().T)
    return FeatureStatistics(network, rows, *moments, features if keep else None, logits)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("keep", [True, False])
def test_statistics_come_back_from_a_file(tmp_path: Path, suffix: str, keep: bool):
    made = statistics(6, keep=keep)
    made.save(tmp_path / f"s{suffix}")
    again = load_statistics(tmp_path / f"s{suffix}")
    assert (again.network, again.count, again.unnamed) == (made.network, 6, False)
    for name in ("mean", "covariance", "features", "logits"):
        one, other = getattr(made, name), getattr(again, name)
        assert (one is None and other is None) or torch.equal(one, other)
    with pytest.raises(UserError, match=r"\.npz or \.safetensors"):
        made.save(tmp_path / "s.txt")


def test_the_common_files_of_fid_programs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """pytorch-fid's and others' hold mu and sigma; of which network they are, only the width says."""
    inception, width = replace(INCEPTION, width=256), 256  # 2048 take seconds
    for module in ("statistics", "measures"):
        monkeypatch.setattr(f"ldm.evaluation.{module}.INCEPTION", inception)
    mu, sigma = np.full(width, 0.5), np.eye(width)
    np.savez_compressed(tmp_path / "fid.npz", mu=mu, sigma=sigma.astype(">f8"))
    found = load_statistics(tmp_path / "fid.npz")
    assert found.unnamed and found.count is None and found.network == inception
    ours = replace(found, mean=torch.zeros(width), covariance=4 * torch.eye(width), unnamed=False)
    (measure,), notes = compare(ours, found)
    assert (measure.key, measure.title) == ("fid", "FID")
    assert measure.value == pytest.approx(width * (0.25 + 1), rel=1e-9)
    assert "mu and sigma alone" in notes[0] and sum(each.startswith("left out") for each in notes) == 3
    np.savez(tmp_path / "narrow.npz", mu=mu[:64], sigma=sigma[:64, :64])
    with pytest.raises(UserError, match="not of which network its 64 features"):
        load_statistics(tmp_path / "narrow.npz")


def test_damaged_statistics_cost_a_line(tmp_path: Path):
    mu, sigma = np.zeros(2048), np.eye(2048)
    stated = {"network": np.array(INCEPTION.name), "preprocessing": np.array(INCEPTION.preprocessing)}
    whole = {"mu": mu, "sigma": sigma, **stated}
    cases: dict[str, dict[str, Any]] = {
        "has no mu and no sigma": {"x": mu},
        "don't belong together": {"mu": mu[:5], "sigma": sigma},
        "NaN": {"mu": mu * np.nan, "sigma": sigma},
        "allow_pickle": {"mu": np.array([{}], dtype=object), "sigma": sigma},
        "can't make": whole | {"network": np.array("vgg")},
        "no preprocessing named": {"mu": mu, "sigma": sigma, "network": stated["network"]},
        "number of pictures": whole | {"count": np.array("-3")},
        "not those of its mean": whole | {"features": np.zeros((3, 4))},
        "not of its features": whole | {"logits": np.zeros((3, 4))},
    }
    for said, arrays in cases.items():
        np.savez(tmp_path / "s.npz", **arrays)
        with pytest.raises(UserError, match=said) as refused:
            load_statistics(tmp_path / "s.npz")
        assert "\n" not in str(refused.value)
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:9000])
    with pytest.raises(UserError, match="cut short"):
        load_statistics(tmp_path / "s.npz")
    with pytest.raises(UserError, match=r"nowhere\.npz"):
        load_statistics(tmp_path / "nowhere.npz")


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(UserError, match="EfficientNet-Lite0's: they can't be compared"):
        compare(statistics(4, INCEPTION), statistics(4))


def test_only_inceptions_figures_have_their_names():
    found, notes = compare(statistics(12, INCEPTION), statistics(9, INCEPTION))
    assert [each.key for each in found] == ["fid", "is", "kid", "precision", "recall"]
    assert [each.title for each in found] == ["FID", "Inception Score", "KID", "precision", "recall"]
    assert "9 pictures are fewer than 2,049" in notes[0]
    assert "12 and 9" in notes[1] and "subsets are of 4" in notes[2]
    found, _ = compare(statistics(12), statistics(9))
    keys = ["frechet_distance", "class_score", "kernel_distance", "precision", "recall"]
    assert [each.key for each in found] == keys
    for each in found:
        assert each.title.endswith("(EfficientNet-Lite0)")
        assert not any(word in each.title for word in ("FID", "KID", "Inception"))


def test_what_is_wanted_is_measured_or_refused():
    found, notes = compare(statistics(12), statistics(12), measures_named(" KID"))
    assert [each.key for each in found] == ["kernel_distance"] and len(notes) == 1
    refused = {
        "pr needs four pictures": (statistics(3), ("pr",)),
        "kid needs all pictures' features": (statistics(5, keep=False), ("kid",)),
        "is needs all pictures' class logits": (statistics(5, keep=False), ("fid", "is")),
    }
    for said, (other, wanted) in refused.items():
        with pytest.raises(UserError, match=said):
            compare(statistics(12), other, wanted)
    with pytest.raises(UserError, match="did you mean kid"):
        measures_named("fid,kidd")


def folder_of(path: Path, count: int, seed: int) -> Path:
    """Blotches of colour, in two sizes."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        pixels.resize((40, 32) if i % 3 else (32, 32), Image.Resampling.BICUBIC).save(path / f"{i:02}.png")
    return path


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0:
    torch.manual_seed(0)
    network = EfficientNetLite0()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # or nothing would come through so many layers
    return network


def test_features_are_those_of_each_picture_alone(efficientnet: EfficientNetLite0, tmp_path: Path):
    pictures = open_pictures(folder_of(tmp_path / "p", 7, 0))
    extractor = efficientnet_extractor(efficientnet, torch.device("cpu"))
    found = statistics_of(pictures, extractor, at_once=3, verbose=False)
    assert found.features is not None and found.logits is not None and found.count == 7
    for i in range(7):
        seen = torch.tensor(pictures.read(i)).permute(2, 0, 1)[None]
        seen = F.interpolate(seen / 127.5 - 1, (224, 224), mode="bilinear", antialias=True)
        torch.testing.assert_close(found.features[i], efficientnet.pooled(seen)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.logits[i], efficientnet(seen)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean, found.features.double().mean(0), rtol=1e-9, atol=1e-9)
    first = statistics_of(pictures, extractor, keep=False, limit=4, verbose=False)
    assert first.count == 4 and first.features is None
    torch.testing.assert_close(first.mean, found.features[:4].double().mean(0), rtol=1e-4, atol=1e-4)


# --- CLIP score -----------------------------------------------------------------------------------------------


class Directions:
    """Pictures by their mean colour, texts by their last word, both as directions in space."""

    def image_features(self, pictures: Tensor) -> Tensor:
        assert pictures.min() >= 0 and pictures.max() <= 1
        return 7 * pictures.mean((2, 3))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        known = {"red": [1.0, 0, 0], "white": [1.0, 1, 1], "dark": [-1.0, -1, -1]}
        return 0.1 * torch.tensor([known[each.split()[-1]] for each in prompts])


def test_the_clip_score_is_the_mean_cosine_in_percent(tmp_path: Path):
    shown = {"a red": (255, 0, 0), "b white": (255, 0, 0), "c dark": (9, 9, 9), "d white": (50, 50, 50)}
    for i, (caption, colour) in enumerate(shown.items()):
        Image.new("RGB", (8 + 8 * (i > 1), 8), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    pictures = open_pictures(tmp_path)
    each = torch.tensor([100, 100 / 3**0.5, 0, 100])  # a negative cosine counts as 0
    found = clip_score(Directions(), pictures, at_once=3, verbose=False)
    assert (found.mean, found.count) == (pytest.approx(float(each.mean()), rel=1e-5), 4)
    assert found.error == pytest.approx(float(each.std() / 2), rel=1e-5)
    assert clip_score(Directions(), pictures, limit=1, verbose=False).mean == pytest.approx(100, rel=1e-5)
    (tmp_path / "2.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 4 have none; the first is 2\.png"):
        clip_score(Directions(), open_pictures(tmp_path), verbose=False)


# --- the command ----------------------------------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    efficientnet: EfficientNetLite0,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs evaluate.py in a folder of its own, with a network that was never trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("ldm.evaluation.features.fetch", lambda sources: {each.name: "" for each in sources})
    monkeypatch.setattr(EfficientNetLite0, "from_package", lambda wheel: efficientnet)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            status = evaluate.main()
        except SystemExit as stopped:  # argparse's
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


def test_two_folders_are_compared(run: Run, tmp_path: Path):
    folder_of(tmp_path / "a", 9, 0)
    folder_of(tmp_path / "b", 8, 1)
    status, table, notes = run("compare", "a", "b", "--features", "efficientnet", "--json", "out/f.json")
    assert status == 0, notes
    assert (
        "b (8 pictures) against a (9 pictures)" in table
        and "| Fréchet distance (EfficientNet-Lite0) | " in table
    )
    found = json.loads((tmp_path / "out/f.json").read_text())
    kept = found["measures"]
    assert list(kept) == ["frechet_distance", "class_score", "kernel_distance", "precision", "recall"]
    assert found["other"] == {"name": "b", "pictures": 8} and all(each in notes for each in found["notes"])
    # The same by files: of moments, then of all features.
    for name, options in {"a.npz": [], "a.safetensors": ["--all"]}.items():
        assert run("statistics", "a", name, "--features", "efficientnet", *options)[0] == 0
        status, _, notes = run("compare", name, "b", "--json", "again.json")
        again = json.loads((tmp_path / "again.json").read_text())["measures"]
        assert status == 0 and ("left out: kid" in notes) == (not options)
        assert again.keys() == (kept.keys() if options else {"frechet_distance", "class_score"})
        for key, each in again.items():
            assert each["value"] == pytest.approx(kept[key]["value"], rel=1e-6, abs=1e-6)


def test_a_model_draws_and_is_measured_in_one_command(run: Run, tmp_path: Path):
    pytest.importorskip("pyarrow")
    folder_of(tmp_path / "a", 5, 0)
    model = tiny_pipeline_folder(tmp_path, "sd1")
    (tmp_path / "p.txt").write_text("".join(f"a fox, {i}\n" for i in range(5)))
    asked = ["--prompts", "p.txt", "--steps", 1, "--workers", 1, "--features", "efficientnet"]
    status, table, said = run("compare", "a", f"model:{model}", *asked, "--json", "f.json")
    assert status == 0 and f"model:{model} (5 pictures)" in table, said
    shards = tmp_path / "runs/measures/other/shards"
    assert [item.caption for item in open_pictures(shards).items] == [f"a fox, {i}" for i in range(5)]
    status, _, said = run("compare", "a", shards, "--features", "efficientnet", "--json", "g.json")
    first, again = (json.loads((tmp_path / name).read_text())["measures"] for name in ("f.json", "g.json"))
    assert status == 0 and first == again
    times = {each: each.stat().st_mtime_ns for each in shards.iterdir()}
    assert run("compare", "a", f"model:{model}", *asked)[0] == 0
    assert times == {each: each.stat().st_mtime_ns for each in shards.iterdir()}, "drawn once"
    status, _, said = run("compare", "a", f"model:{model}", *asked, "--prompts", "nowhere.txt")
    assert status == 2 and "error: nowhere.txt" in said


def test_a_clip_scores_pictures_against_their_captions(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.measuring.load_encoder", lambda folder, model: Directions())
    for i in range(2):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"c/{i}.png")
        (tmp_path / f"c/{i}.txt").write_text("it is red" if i else "it is white")
    status, table, said = run("compare", "c", "c", "--clip", "x", "--measures", "clip")  # no features needed
    assert status == 0 and f"| {(100 + 100 / 3**0.5) / 2:.6g} |" in table, said


def test_bad_input_of_the_command_is_one_line(run: Run, tmp_path: Path):
    folder_of(tmp_path / "a", 5, 0)
    folder_of(tmp_path / "one", 1, 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").write_text("no picture")
    statistics(5).save(tmp_path / "e.npz")
    statistics(5, INCEPTION).save(tmp_path / "i.npz")
    efficient = ["--features", "efficientnet"]
    cases: dict[str, Sequence[object]] = {
        f"get {WEIGHTS}": ["a", "a"],
        "can't be compared": ["i.npz", "e.npz"],
        "of FID's Inception-v3's features, and --features": ["i.npz", "a", *efficient],
        "one holds one picture": ["a", "one", *efficient],
        "empty holds no pictures": ["a", "empty", *efficient],
        "none of the 1 pictures of bad is whole": ["a", "bad", *efficient],
        "nowhere is not there": ["a", "nowhere", *efficient],
        "no measure is called x": ["a", "a", "--measures", "x"],
        "the measure clip needs a CLIP": ["e.npz", "a", "--measures", "clip"],
        "model: draws what a file asks for": ["e.npz", "model:"],
        "--prompts is for a model": ["e.npz", "a", "--prompts", "p.txt"],
        "--limit must be": ["e.npz", "a", "--limit", 1],
        "required: OTHER": ["a"],
    }
    for said, arguments in cases.items():
        status, printed, error = run("compare", *arguments)
        assert (status, printed) == (2, ""), arguments
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert run("statistics", "a", "a.txt")[2].startswith("error: a.txt: statistics are written to a name")
