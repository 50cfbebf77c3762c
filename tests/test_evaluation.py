"""Evaluation: distances in closed form, detectors on made-up pictures, prompts, figures and the report."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from benchmarks import sweep as sweeping
from benchmarks.quality import Bench, Settings, grid
from benchmarks.quality import evaluate as evaluated
from ldm.emoji import quality, report
from ldm.emoji.composition import HOLDING, Composition
from ldm.emoji.detectors import (
    Features,
    Verdict,
    fit,
    load_detectors,
    save_detectors,
    views,
)
from ldm.emoji.figures import shares
from ldm.emoji.mixture import Mixture, MixtureConfig
from ldm.emoji.prepare import compositions_of
from ldm.emoji.prompts import UNSEEN_WORDS, Asked, ask, ask_words
from ldm.emoji.questions import WHOLE, Question, questions, readings
from ldm.emoji.sprites import SpriteSet
from ldm.emoji.things import THINGS
from ldm.errors import UserError
from ldm.evaluation.frechet import frechet_distance
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.perceptual import _STAGES as STAGES
from ldm.models.perceptual import EfficientNetLite0, PerceptualDistance, SameConv
from ldm.pictures import to_tensor
from pipelines import TextToImagePipeline
from scripts import evaluate
from tests.tiny import tiny_pipeline_folder

BUNDLED = str(Path(__file__).parents[1] / "configs/bundled-unet.yaml")
THINGS_HERE = ("raccoon", "fox", "panda", "apple", "car", "astronaut", "top hat", "crown", "robot", "tree")


@pytest.fixture(scope="module")
def sprites() -> SpriteSet:
    """Squares, each thing in a colour of its own; styles differ by a white dot."""
    pixels = {}
    for number, name in enumerate(THINGS_HERE):
        for style in ("3d", "flat"):
            picture = np.zeros((128, 128, 4), np.uint8)
            colour = np.random.default_rng(number).integers(0, 256, 3)
            picture[8 + 3 * number : 120, 8:120] = (*colour, 255)
            picture[56:72, 56:72] = (255, 255, 255, 255) if style == "flat" else (0, 0, 0, 255)
            pixels[name, style] = picture
    return SpriteSet(pixels, 128)


@pytest.fixture(scope="module")
def mixture(sprites: SpriteSet) -> Mixture:
    return Mixture(sprites, MixtureConfig(things=list(THINGS_HERE)))


@pytest.fixture(scope="module")
def features() -> Features:
    """Of a network of the same build, but narrow, as the fits take time with the cube of its last width."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        narrow = [(min(expansion, 2), max(8, width // 2), *more) for expansion, width, *more in STAGES]
        patch.setattr("ldm.models.perceptual._STAGES", narrow)
        network = EfficientNetLite0()
    network.conv_head, network.fc = SameConv(narrow[-1][1], 192, 1), torch.nn.Linear(192, 1000)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # or nothing would come through so many layers
    return Features(network)


# --- distances ------------------------------------------------------------------------------------------------


def test_the_frechet_distance_is_that_of_the_formula():
    torch.manual_seed(0)
    one, other = torch.randn(60, 5) @ torch.randn(5, 5), torch.randn(40, 5) + 1
    a, b = (np.cov(each.double().numpy().T) for each in (one, other))
    root = np.real(np.asarray(scipy.linalg.sqrtm(a @ b)))
    shift = float((one.double().mean(0) - other.double().mean(0)).square().sum())
    expected = shift + np.trace(a) + np.trace(b) - 2 * np.trace(root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + 2) == pytest.approx(4 * 5, rel=1e-6)  # moved as a whole
    few = torch.randn(3, 50)  # fewer pictures than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="two pictures"):
        frechet_distance(one[:1], other)


def test_the_nearest_is_found_as_unit_vectors():
    training = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    distances, which = quality.nearest(torch.tensor([[0.0, 1.0], [3.0, 3.0]]), training)
    assert which[0] == 1 and distances[0] == pytest.approx(0, abs=1e-3)
    assert distances[1] == pytest.approx(2 * np.sin(np.pi / 8), rel=1e-5)  # 45 degrees away


# --- detectors ------------------------------------------------------------------------------------------------


def test_a_detector_looks_past_what_differs_within_a_class():
    torch.manual_seed(0)
    labels = [f"class {k % 3}" for k in range(600)]
    index = torch.arange(600) % 3
    x = torch.randn(600, 6) * torch.tensor([50.0, 1, 1, 1, 1, 1])
    x[:, 1] += 8 * index  # the classes differ where the noise is small
    x[:, 2] += 20 * x[:, 0]  # and noise is shared between features
    detector = fit(x[:300], labels[:300])
    found = [ranking[0] for ranking in detector.nearest(x[300:])]
    assert np.mean([a == b for a, b in zip(found, labels[300:], strict=True)]) > 0.98
    means = torch.stack([x[:300][index[:300] == k].mean(0) for k in range(3)])
    plain = torch.cdist(x[300:], means).argmin(1)
    assert (plain == index[300:]).float().mean() < 0.6, "the nearest mean alone would not do"
    assert sorted(detector.nearest(x[:1])[0]) == ["class 0", "class 1", "class 2"]


def test_a_detector_needs_classes_and_examples():
    for labels in (["a"] * 4, ["a", "a", "b", "c"]):
        with pytest.raises(UserError, match="two classes"):
            fit(torch.randn(4, 3), labels)


def test_a_view_is_the_square_that_is_asked_for():
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 16:48, 33:63] = 1
    (right,) = views(picture, [(0.75, 0.5, 0.5)])
    assert right.shape == (3, 64, 64) and right[:, 4:-4, 6:-6].min() == 1
    (left,) = views(picture, [(0.25, 0.5, 0.5)])
    assert left.max() == 0
    assert torch.equal(views(picture, [WHOLE])[0], picture[0])


def test_detectors_learn_from_compositions_and_travel_in_a_file(
    sprites: SpriteSet, features: Features, tmp_path: Path
):
    config = MixtureConfig(things=list(THINGS_HERE), weights={"single": 2, "pair": 2, "count": 1, "scene": 1})
    mixture = Mixture(sprites, config, everything=True)
    made = quality.fitted(features, mixture, 256)
    assert {"thing", "part", "style", "setting", "count"} <= set(made.detectors)
    tested = quality.tested(made, mixture, 64)
    assert (
        tested["thing"][0] > 0.7 and tested["part"][0] > 0.6
    )  # ten things, a network that was never trained
    save_detectors(tmp_path / "d.safetensors", made, tested)
    again, told = load_detectors(tmp_path / "d.safetensors", features)
    assert told == tested
    pictures, asked = next(quality.compositions(mixture, 16, 10**6))
    assert again.judge(pictures, asked) == made.judge(pictures, asked)
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError):
        load_detectors(tmp_path / "d.safetensors", features)


def test_worn_pictures_keep_their_size_and_their_mean():
    torch.manual_seed(0)
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    soft = quality.worn(pictures, 0)
    assert soft.shape == pictures.shape and not torch.equal(soft, pictures)
    assert torch.allclose(soft.mean((2, 3)), pictures.mean((2, 3)), atol=0.05)
    assert (soft.var((2, 3)) < pictures.var((2, 3))).all()
    assert torch.equal(soft, quality.worn(pictures, 0))
    plain = quality.worn(torch.zeros(32, 3, 64, 64), 1).std((1, 2, 3))
    assert 0.05 < plain.max() < 0.15 and plain.min() < 0.03  # blotches where all was plain


# --- questions and prompts ------------------------------------------------------------------------------------


def test_questions_are_about_all_that_a_plan_shows():
    def asked(**parts: object) -> set[tuple[str, str, bool]]:
        composition = Composition(
            **{"kind": "k", "things": ("fox",), "style": "3d", "setting": "white"} | parts
        )  # type: ignore[arg-type]
        return {(q.attribute, q.answer, q.told) for q in questions(composition)}

    basis = {("style", "3d", False), ("setting", "white", False)}
    one = {("thing", "fox", True), ("count", "1", False), ("size", "large", False)}
    assert asked() == basis | one
    assert asked(size="small", colour="red") == basis | {
        ("part", "fox", True),
        ("colour", "red", True),
        ("count", "1", False),
        ("size", "small", True),
    }
    assert asked(costume="crown") == basis | {("face", "fox", True), ("costume", "crown", True)}
    pair = asked(things=("apple", "car"), relation="above", colour="blue", style_named=True)
    expected = {("part", "apple", True), ("part", "car", True), ("part's colour", "blue", True)}
    assert pair == {("style", "3d", True), ("setting", "white", False)} | expected
    held = asked(things=("fox", "car"), relation=HOLDING, second_colour="red", setting_named=True)
    assert held == {
        ("style", "3d", False),
        ("setting", "white", True),
        ("holder", "fox", True),
        ("part", "car", True),
        ("part's colour", "red", True),
    }
    drawn = asked(finish="line drawing", colour="red")
    assert drawn == one | {("style", "line drawing", True)}
    counted = asked(count=3)
    assert counted == basis | {("part", "fox", True), ("count", "3", True)}


@pytest.mark.parametrize(
    "composition",
    [
        *(
            Composition("pair", ("apple", "car"), "3d", "white", relation=relation)
            for relation in ("left of", "right of", "above", "below", "next to")
        ),
        Composition("holding", ("fox", "apple"), "3d", "white", relation=HOLDING),
        *(Composition("count", ("car",), "3d", "white", count=count) for count in (2, 3)),
        Composition("single", ("car",), "3d", "white"),
        Composition("single", ("car",), "3d", "white", size="small"),
    ],
)
def test_questions_look_where_the_mixture_paints(mixture: Mixture, composition: Composition):
    picture = torch.from_numpy(mixture.draw(composition).picture).permute(2, 0, 1)[None].float()
    asked = [each for each in questions(composition) if each.attribute in ("part", "thing", "holder")]
    assert len(asked) == len(composition.things) * composition.count
    for question in asked:
        (seen,) = views(picture, [question.place])
        colour = torch.from_numpy(mixture.sprites.pixels[question.answer, "3d"][80, 40, :3]).float()
        assert (seen[:, 80, 40] - colour).abs().max() < 2


def test_things_next_to_each_other_may_stand_either_way_round():
    composition = Composition("pair", ("apple", "car"), "3d", "white", colour="red", relation="next to")
    first, turned = readings(composition)
    left, right = (next(q.place for q in first if q.answer == thing) for thing in ("apple", "car"))
    assert left != right
    assert [(q.answer, q.place) for q in turned if q.attribute == "part"] == [("car", left), ("apple", right)]
    assert [q.place for q in turned if q.attribute == "part's colour"] == [right]
    assert len(readings(replace(composition, relation="left of"))) == 1


def test_a_turned_pair_is_right(mixture: Mixture, sprites: SpriteSet, features: Features):
    config = replace(mixture.config, weights={"pair": 1.0}, white=1.0, setting_named=0, finished=0, painted=0)
    made = quality.fitted(features, Mixture(sprites, config, everything=True), 160)
    compositions = {
        relation: Composition("pair", ("raccoon", "tree"), "3d", "white", relation=relation)
        for relation in ("next to", "left of", "right of")
    }
    asked = [Asked("", composition, 0, "seen", relation) for relation, composition in compositions.items()]
    other = mixture.draw(compositions["right of"]).picture  # the raccoon on the right
    judged = quality.judge(made, asked, {"drawn": to_tensor([other] * 3)})
    shares_of = {relation: judged.shares("drawn", "seen", relation).composed for relation in compositions}
    assert shares_of == {"next to": 1, "left of": 0, "right of": 1}


def test_prompts_are_half_seen_and_half_held_out_and_always_the_same(mixture: Mixture):
    asked = ask(mixture, 80)
    assert asked == ask(mixture, 80) and asked != ask(mixture, 80, seed=1)
    assert [each.part for each in asked] == ["seen"] * 40 + ["held-out"] * 40
    assert {each.group for each in asked[:40]} == set(mixture.kinds)
    held_out = ask(mixture, 400)[200:]
    assert {each.group for each in held_out} == {"hat", "astronaut", "colour", "pair", "style"}
    for told in ("style_named", "setting_named"):
        assert {getattr(each.composition, told) for each in held_out if not each.composition.finish} == {
            True,
            False,
        }
    assert len({each.composition.setting for each in held_out}) > 5
    assert {each.composition.names >= {"raccoon", "astronaut"} for each in asked[:40]} == {False}


def test_unseen_words_are_in_no_caption(sprites: SpriteSet):
    assert set(UNSEEN_WORDS.values()) <= set(THINGS)
    said = {word for thing in THINGS.values() for name in thing.names for word in name.split()}
    assert not said & set(UNSEEN_WORDS)
    mixture = Mixture(sprites, MixtureConfig(things=list(THINGS_HERE)))
    words = {word for i in range(2000) for word in mixture.sample(i).caption.replace(",", " ").split()}
    assert not words & set(UNSEEN_WORDS)
    asked = ask_words(mixture)
    assert {each.composition.things[0] for each in asked} == {"astronaut", "car", "robot"}
    assert sum(each.part == "word" for each in asked) == sum(each.part == "name" for each in asked)


# --- figures and reports --------------------------------------------------------------------------------------


def verdict(attribute: str, answer: str, ranking: Sequence[str], told: bool = True) -> Verdict:
    return Verdict(Question(attribute, WHOLE, answer, told), list(ranking))


def test_shares_count_what_was_told():
    right, wrong = verdict("thing", "a", "abcdef"), verdict("thing", "f", "abcdef")
    fifth, untold = verdict("part", "e", "abcdef"), verdict("style", "z", "yz", told=False)
    colour = verdict("colour", "red", ["red", "blue"])
    found = shares([[right, untold], [right, colour], [wrong, colour], [right, fifth]])
    assert found.count == 4 and found.composed == 2 / 4
    assert found.top1 == 3 / 5 and found.top5 == 4 / 5
    assert found.attributes == {"colour": (1.0, 2), "part": (0.0, 1), "thing": (3 / 4, 4)}
    assert np.isnan(shares([[untold]]).top1)
    unknown = Verdict(Question("thing", WHOLE, "z"), [])  # what no detector knows is never right
    assert shares([[unknown]]).composed == 0 == shares([[unknown]]).top5


def test_the_whole_judgement_of_real_pictures(mixture: Mixture, sprites: SpriteSet, features: Features):
    made = quality.fitted(features, Mixture(sprites, mixture.config, everything=True), 192)
    asked = [*ask(mixture, 48), *ask_words(mixture, 1)]
    real, other = quality.real(mixture, asked), quality.real(mixture, asked, 1)
    assert not torch.equal(real, other)
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
        mid_block_add_attention=False)  # fmt: skip
    floor = quality.reconstruct(AutoencoderKL(config), real)
    judged = quality.judge(made, asked, {"drawn": other, "real": real, "floor": floor})
    drawn, chance = (judged.shares(side, "seen") for side in ("drawn", "chance"))
    assert drawn.top1 > 0.6 and drawn.top1 > chance.top1 + 0.3 and drawn.composed > chance.composed
    assert judged.shares("floor", "seen").top1 < drawn.top1, "an autoencoder that was never trained"
    assert judged.shares("drawn", "held-out", "pair").count == sum(e.group == "pair" for e in asked[24:])
    lost = quality.reconstructed(PerceptualDistance(features.network), real, floor)
    error = ((real - floor) / 2).square().flatten(1).mean(1)
    assert lost.psnr == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-5) and lost.distance > 0
    training = torch.cat([features.pooled(pictures) for pictures, _ in quality.compositions(mixture, 64)])
    alike = quality.likeness(features, training, other, real, other, floor)
    assert alike.frechet == pytest.approx(alike.frechet_real) and alike.frechet < alike.frechet_floor
    assert alike.nearest == alike.nearest_real > 0
    text = report.table(judged, "seen") + report.attributes(judged, "seen")
    assert f"| all | 24 | {100 * drawn.top1:.0f} % (" in text and "| setting |" in text
    assert "dB" in report.sets({"seen": alike}, {"seen": lost})
    assert "| thing | 50 % | 4 |" in report.detectors({"thing": (0.5, 4)})


@pytest.fixture
def bench(tmp_path: Path, sprites: SpriteSet, features: Features) -> Bench:
    model = tiny_pipeline_folder(tmp_path, "sd1")
    pipe = TextToImagePipeline.from_pretrained(model)
    mixture = Mixture(sprites, MixtureConfig(things=list(THINGS_HERE), size=32))
    return Bench("tiny", pipe, mixture, features.network, tmp_path / "out", 256, 48, 32, model)


def test_an_evaluation_writes_what_it_found_and_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="eulr"):
        evaluated(bench, 16, Settings(1, sampler="eulr"))
    assert not (bench.output / "drawn").exists(), "what can't be drawn with leaves nothing behind"
    text = evaluated(bench, 16, Settings(1))
    assert text == (bench.output / "report.md").read_text()
    assert "1 steps" in text and "## held-out" in text and "among the first 32" in text
    lines = [json.loads(line) for line in (bench.output / "verdicts.jsonl").read_text().splitlines()]
    assert [line["picture"] for line in lines] == list(range(16 + 2 * 2 * 5))  # 5 unseen words, their names
    for part in ("seen", "held-out"):
        some = [line for line in lines if line["part"] == part]
        assert len(some) == 8
        row = next(line for line in text.split(f"## {part}")[1].splitlines() if line.startswith("| all "))
        assert f" | {100 * np.mean([line['right'] for line in some]):.0f} % (" in row
        assert (bench.output / f"{part}.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(quality, "fitted", None)  # what is there already is neither fitted nor drawn again
    monkeypatch.setattr(TextToImagePipeline, "draw_each", None)
    again = replace(bench)
    assert evaluated(again, 16, Settings(1)) == text
    with pytest.raises(UserError, match="was begun with settings"):
        evaluated(again, 16, Settings(2))


def test_detectors_are_of_a_mixture_and_of_their_fit(bench: Bench):
    same = replace(bench)
    fewer = replace(bench, fitted=128)
    other = replace(bench, mixture=Mixture(bench.mixture.sprites, replace(bench.mixture.config, white=0.5)))
    assert same.identity == bench.identity and len({bench.identity, fewer.identity, other.identity}) == 3


def test_a_model_of_another_size_is_refused(bench: Bench):
    with pytest.raises(UserError, match="128"):
        replace(bench, mixture=Mixture(bench.mixture.sprites, MixtureConfig(things=list(THINGS_HERE))))


def test_a_grid_has_four_seeds_of_each_line(bench: Bench, tmp_path: Path):
    (tmp_path / "lines.txt").write_text("a fox\n\na car\n")
    with Image.open(grid(bench, tmp_path / "lines.txt", Settings(1))) as sheet:
        made = np.asarray(sheet)
    with Image.open(grid(bench, tmp_path / "lines.txt", Settings(1))) as sheet:
        assert (np.asarray(sheet) == made).all()
    width = made.shape[1] // 12
    (expected,) = bench.draw(["a car"], [2], Settings(1))
    assert (made[3:35, 6 * width + 3 : 6 * width + 35] == np.asarray(expected)).all()
    (tmp_path / "lines.txt").write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        grid(bench, tmp_path / "lines.txt", Settings(1))


def test_a_sweep_goes_on_where_it_was_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    ways = {"ddim": [Settings(1, 2.0, 0.0, "ddim"), Settings(2, 2.0, 0.0, "ddim")]}
    monkeypatch.setattr(sweeping, "WAYS", ways)
    text = sweeping.sweep(bench, 16, Settings())
    assert text.count("| ddim | ") == 2 and (bench.output / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((bench.output / "sweep.json").read_text())
    kept = dict(list(found["points"].items())[:1])
    (bench.output / "sweep.json").write_text(json.dumps(found | {"points": kept}))
    drawn = []
    draw = bench.draw
    monkeypatch.setattr(bench, "draw", lambda *asked: drawn.append(asked[2]) or draw(*asked))
    sweeping.sweep(bench, 16, Settings())
    assert drawn[1:] == [ways["ddim"][1]] * 2  # after the warm-up, two batches of the way that was missing
    (bench.output / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        sweeping.sweep(bench, 16, Settings())
    with pytest.raises(UserError, match="--sweep has its own"):
        sweeping.sweep(bench, 16, Settings(4))
    with pytest.raises(UserError, match="another model"):
        (bench.output / "sweep.json").write_text(json.dumps(found))
        sweeping.sweep(bench, 18, Settings())


def test_a_sheet_frames_and_names_its_pictures():
    pictures = [Image.new("RGB", (40, 40), "blue")] * 3
    sheet = report.sheet(pictures, ["a b", "", "a long prompt of many words"], 2, [True, False, True])
    assert sheet.size[0] == 2 * 46
    left, right = sheet.getpixel((0, 0)), sheet.getpixel((46, 0))
    assert isinstance(left, tuple) and isinstance(right, tuple)
    assert left[1] > left[0] and right[0] > right[1]
    plain = report.sheet(pictures[:1], [""], 1)
    assert plain.getpixel((0, 0)) == (255, 255, 255)


# --- the command line -----------------------------------------------------------------------------------------


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "c.yaml"
    config.write_text(
        json.dumps(
            {"output": "x", "loop": {"pictures": 16}, "autoencoder": {"data": {"kind": "compositions"}}}
        )
    )
    monkeypatch.chdir(tmp_path)
    cases = {
        "--prompts must be 16 to 100,000": ["--prompts", "3"],
        "no compositions": ["--config", str(config)],
        "too long": ["--config", BUNDLED, "--output", "x" * 300],
        "sprites": ["--config", BUNDLED],
    }
    for said, arguments in cases.items():
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        assert evaluate.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert said in error


def test_the_mixture_of_the_bundled_model_is_read():
    config = compositions_of(Path(BUNDLED)).mixture
    assert len(config.things) == 101 and config.weights["pair"] > 0
