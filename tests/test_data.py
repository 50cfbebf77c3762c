"""The data part: sources, sprites, costumes, captions and the mixture, on sprites made here (no network)."""

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import packages as packaged
from ldm.emoji.captions import RELATION_WORDS, article
from ldm.emoji.colours import BACKGROUNDS, PAINTS, oklab, repaint, srgb
from ldm.emoji.composition import HOLDING, Composition
from ldm.emoji.costumes import COSTUMES, FACES, VISOR, wear
from ldm.emoji.finishes import FINISHES
from ldm.emoji.heldout import HELD_OUT, is_held_out
from ldm.emoji.mixture import KINDS, Mixture, MixtureConfig
from ldm.emoji.packages import SOURCES
from ldm.emoji.places import HOLDER
from ldm.emoji.poses import Pose
from ldm.emoji.sprites import STYLES, SpriteSet, build_sprites, fit, load_sprites, resize
from ldm.emoji.things import THINGS, choose, plural
from ldm.errors import UserError

NAMES = (
    *(
        "raccoon",
        "fox",
        "cat face",
        "koala",
        "panda",
        "horse face",
        "cat",
        "astronaut",
        "robot",
        "tree",
        "sun",
        "rocket",
    ),
    *(
        "apple",
        "car",
        "orange",
        "star",
        "umbrella",
        "box of french fries",
        "sushi",
        "top hat",
        "crown",
        "sunglasses",
    ),
)


def blob(number: int) -> np.ndarray:
    """A sprite of 128 px: an ellipse in a colour of its own."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:128, :128]
    width, height = rng.uniform(30, 56, 2)
    inside = ((columns - 63.5) / width) ** 2 + ((rows - 63.5) / height) ** 2 < 1
    picture = np.zeros((128, 128, 4), np.uint8)
    picture[inside] = (*rng.integers(40, 220, 3), 255)
    return picture


@pytest.fixture(scope="module")
def sprites() -> SpriteSet:
    keys = [(name, style) for style in ("3d", "flat") for name in NAMES]
    return SpriteSet({key: blob(number) for number, key in enumerate(keys)}, 128)


@pytest.fixture(scope="module")
def mixture(sprites: SpriteSet) -> Mixture:
    return Mixture(sprites, MixtureConfig(seed=7))


# --- things ---------------------------------------------------------------------------------------------------


def test_the_table_is_sound():
    assert len({thing.code for thing in THINGS.values()}) == len(THINGS)
    assert all(re.fullmatch(r"[0-9a-f]{4,5}(-[0-9a-f]{4,5})*", thing.code) for thing in THINGS.values())
    assert {thing.name for thing in THINGS.values() if thing.wearer} >= set(FACES)
    assert all(not thing.colour or thing.colour in {*BACKGROUNDS, *PAINTS} for thing in THINGS.values())
    assert all(name in {*THINGS, *PAINTS, *FINISHES} for names in HELD_OUT for name in names)
    assert set(COSTUMES) <= set(THINGS)
    core = {thing.name for thing in choose(["core"])}
    assert core >= {"raccoon", "fox", "rocket", "apple", "robot", "top hat", "crown", "sunglasses"}
    assert 150 <= len(core) <= 200


def test_plurals_and_articles():
    assert [plural(word) for word in ("cat", "box", "cherry", "key", "bus")] == [
        "cats",
        "boxes",
        "cherries",
        "keys",
        "buses",
    ]
    assert THINGS["mouse"].plural == "mice"
    assert THINGS["loaf of bread"].plural == "loaves of bread"
    words = ("apple", "unicorn", "ufo", "umbrella", "cat", "ewe")
    assert [article(word) for word in words] == ["an", "a", "a", "an", "a", "a"]


def test_an_unknown_thing_is_named_with_a_hint():
    with pytest.raises(UserError, match="raccoon"):
        choose(["racoon"])


# --- sources --------------------------------------------------------------------------------------------------


def test_fetch_leaves_alone_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing had to be fetched")

    monkeypatch.setattr(packaged.subprocess, "run", never)
    for source in SOURCES.values():
        (tmp_path / source.filename).touch()
    assert set(packaged.fetch(SOURCES.values(), tmp_path)) == set(SOURCES)


def test_fetch_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packaged.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="npm is needed"):
        packaged.fetch([SOURCES["@iconify-json/noto"]], tmp_path)
    failing = ["python3", "-c", "import sys; sys.exit('error: no route')"]
    monkeypatch.setattr(packaged.shutil, "which", lambda name: name)
    monkeypatch.setattr(packaged, "command", lambda *_: failing)
    with pytest.raises(UserError, match=r"no route.*network"):
        packaged.fetch([SOURCES["@iconify-json/noto"]], tmp_path)


# --- sprites --------------------------------------------------------------------------------------------------


def package(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    webp = io.BytesIO()
    Image.fromarray(blob(1)).save(webp, "WEBP", lossless=True)
    package(
        tmp_path / SOURCES[STYLES["3d"].package].filename,
        {"assets/1f34e.webp": webp.getvalue(), "assets/2602-fe0f.webp": webp.getvalue(), "README.md": b"art"},
    )
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"red-apple": {"body": '<circle cx="16" cy="16" r="8" fill="red"/>'}},
    }
    package(
        tmp_path / SOURCES[STYLES["flat"].package].filename,
        {"icons.json": json.dumps(icons).encode(), "chars.json": b'{"1f34e": "red-apple"}'},
    )
    return tmp_path


def test_sprites_are_built_kept_and_read(packages: Path):
    pytest.importorskip("resvg_py")
    path = packages / "made" / "sprites.npz"
    built = build_sprites(packages, path, ["3d", "flat"], 64, ["apple", "umbrella", "car"])
    assert set(built.pixels) == {("apple", "3d"), ("umbrella", "3d"), ("apple", "flat")}
    again = load_sprites(path)
    assert again.size == 64 and again.styles == ["3d", "flat"]
    assert all(np.array_equal(again.pixels[key], built.pixels[key]) for key in built.pixels)
    circle = built.pixels["apple", "flat"]
    assert circle.shape == (64, 64, 4) and tuple(circle[32, 32]) == (255, 0, 0, 255)
    assert (
        abs(int((circle[32, :, 3] > 128).sum()) - 58) <= 2
    )  # cropped, and grown to the frame less its margin


def test_broken_missing_and_unknown_packages_are_user_errors(packages: Path):
    path = packages / "sprites.npz"
    with pytest.raises(UserError, match="missing: fetch"):
        build_sprites(packages, path, ["cartoon"])
    with pytest.raises(UserError, match="no style"):
        build_sprites(packages, path, ["3dd"])
    for style in ("3d", "flat"):
        file = packages / SOURCES[STYLES[style].package].filename
        whole = file.read_bytes()
        for content in (b"not an archive", whole[: len(whole) // 2]):
            file.write_bytes(content)
            with pytest.raises(UserError, match="fetch it again"):
                build_sprites(packages, path, [style])
    with pytest.raises(UserError, match="no sprites"):
        load_sprites(packages / "none.npz")
    path.write_bytes(b"PK but not a zip")
    with pytest.raises(UserError, match="build it again"):
        load_sprites(path)


def test_resizing_leaves_no_dark_fringe():
    picture = np.zeros((256, 256, 4), np.uint8)
    rows, columns = np.mgrid[:256, :256]
    picture[np.hypot(rows - 128, columns - 128) < 90] = (240, 220, 60, 255)
    for small in (np.asarray(resize(Image.fromarray(picture), 60, 60)), fit(Image.fromarray(picture), 128)):
        rim = small[(small[..., 3] > 48) & (small[..., 3] < 255)]
        assert len(rim) > 20
        assert np.abs(rim[:, :3].astype(int) - (240, 220, 60)).max() <= 12


def test_an_empty_picture_is_refused():
    with pytest.raises(UserError, match="empty"):
        fit(Image.new("RGBA", (8, 8)), 16)


# --- colours and costumes -------------------------------------------------------------------------------------


def test_oklab_has_the_published_values_and_an_inverse():
    rgb = np.random.default_rng(0).random((50, 3), dtype=np.float32)
    assert np.abs(srgb(oklab(rgb)) - rgb).max() < 2e-3
    red = oklab(np.array([[1.0, 0.0, 0.0]], np.float32))[0]
    assert np.allclose(red, (0.62796, 0.22486, 0.12585), atol=1e-3)  # CSS Color 4, section 9


def test_repainting_changes_the_main_colour_only():
    picture = np.zeros((40, 40, 4), np.uint8)
    picture[:, :30] = (220, 40, 40, 255)
    picture[:, 30:] = (60, 170, 60, 255)
    blue = repaint(picture, "blue").astype(int)
    assert blue[0, 0, 2] > 1.5 * blue[0, 0, 0]
    assert np.abs(blue[:, 30:] - picture[:, 30:].astype(int)).max() <= 3
    grey = np.full((8, 8, 4), 128, np.uint8)
    assert np.array_equal(repaint(grey, "red"), grey)


def test_the_helmet_hides_the_astronauts_own_face(sprites: SpriteSet):
    worn = wear(sprites, "fox", "astronaut", "flat")
    suit = sprites.pixels["astronaut", "flat"]
    rows, columns = np.mgrid[:128, :128]
    distance = np.hypot(columns + 0.5 - VISOR[0], rows + 0.5 - VISOR[1])
    assert not (worn == suit).all(-1)[distance < VISOR[2] - 2].any()
    assert (worn == suit).all(-1)[distance > VISOR[2] + 2].all()


@pytest.mark.parametrize("costume", ["top hat", "crown", "sunglasses"])
def test_costumes_stay_in_the_frame(sprites: SpriteSet, costume: str):
    worn = wear(sprites, "raccoon", costume, "3d")
    assert worn.shape == (128, 128, 4)
    assert not worn[[0, -1]][..., 3].any() and not worn[:, [0, -1]][..., 3].any()


# --- the mixture -----------------------------------------------------------------------------------------------


def test_an_example_depends_on_seed_and_index_only(sprites: SpriteSet, mixture: Mixture):
    fresh = Mixture(sprites, MixtureConfig(seed=7))
    for index in (41, 3, 10**9, 0):
        one, other = mixture.sample(index), fresh.sample(index)
        assert one.caption == other.caption and np.array_equal(one.picture, other.picture)
    other_seed = Mixture(sprites, MixtureConfig(seed=8))
    assert any(mixture.sample(index).caption != other_seed.sample(index).caption for index in range(5))


def test_pictures_captions_and_parts_agree(mixture: Mixture):
    kinds: dict[str, int] = {}
    for index in range(3000):
        example = mixture.sample(index)
        kinds[example.kind] = kinds.get(example.kind, 0) + 1
        assert example.picture.shape == (128, 128, 3) and example.picture.dtype == np.uint8
        composition = Composition(**example.parts)
        assert not is_held_out(composition.names)
        check_words(composition, example.caption)
    total = sum(KINDS.values())
    assert all(abs(kinds[kind] / 3000 - weight / total) < 0.04 for kind, weight in KINDS.items())


def check_words(composition: Composition, words: str) -> None:
    assert not re.search(r"\b(a [aeio]|an [^aeiou])|  | ,|\{|\[", words), words
    named = composition.style_named and not composition.finish
    assert named == bool(re.search(r"\b3d\b|\bflat\b", words)), words
    finishes = r"line drawing|outline|page|black and white|shades"
    assert bool(composition.finish) == bool(re.search(finishes, words)), words
    if named:
        assert re.search(rf"\b{composition.style}\b", words), words
    background = composition.setting_named and composition.setting in BACKGROUNDS
    assert background == ("background" in words), words
    assert not background or f"{composition.setting} background" in words.replace("gray", "grey")
    assert (composition.size == "small") == bool(re.search(r"\b(small|tiny|little)\b", words)), words
    for name in composition.things:
        thing = THINGS[name]
        known = (
            (thing.wearer,)
            if composition.costume
            else (thing.plural,)
            if composition.count > 1
            else thing.names
        )
        if composition.relation == HOLDING and name == composition.things[0]:
            known = (*known, thing.wearer)
        assert any(each and each in words for each in known), words
    if composition.colour:
        assert f"{composition.colour} " in words
    if composition.second_colour:
        related = [
            words.index(f" {each} ") for each in RELATION_WORDS[composition.relation] if f" {each} " in words
        ]
        assert words.rindex(f"{composition.second_colour} ") > min(related)
    if composition.count > 1:
        assert {2: "two", 3: "three"}[composition.count] in words
    if composition.costume and composition.costume != "astronaut":
        assert composition.costume in words


def test_relations_and_counts_are_drawn_as_said(sprites: SpriteSet, mixture: Mixture):
    def middle(picture: np.ndarray, thing: str) -> np.ndarray:
        colour = sprites.pixels[thing, "3d"][64, 64, :3].astype(int)
        return np.argwhere(np.abs(picture.astype(int) - colour).max(-1) < 4).mean(0)

    where = {"above": (0, -1), "below": (0, 1), "left of": (1, -1), "right of": (1, 1), "next to": (1, -1)}
    for relation, (axis, sign) in where.items():
        composition = Composition("pair", ("apple", "car"), "3d", "white", relation=relation)
        picture = mixture.draw(composition).picture
        assert sign * (middle(picture, "apple") - middle(picture, "car"))[axis] > 40
        border = np.concatenate([picture[[0, -1]].reshape(-1, 3), picture[:, [0, -1]].reshape(-1, 3)])
        assert (border == 255).all()


def test_colours_of_a_pair_are_each_its_own(mixture: Mixture):
    plain = Composition("pair", ("car", "umbrella"), "flat", "white", relation="left of")
    both = mixture.draw(replace(plain, colour="blue", second_colour="yellow")).picture
    left = mixture.draw(replace(plain, colour="blue")).picture
    right = mixture.draw(replace(plain, second_colour="yellow")).picture
    bare = mixture.draw(plain).picture
    assert np.array_equal(both[:, :64], left[:, :64]) and np.array_equal(both[:, 64:], right[:, 64:])
    assert not np.array_equal(left[:, :64], bare[:, :64]) and np.array_equal(left[:, 64:], bare[:, 64:])


def test_a_holder_holds_a_thing_before_it_and_a_small_thing_is_small(sprites: SpriteSet, mixture: Mixture):
    composition = Composition("holding", ("fox", "apple"), "3d", "white", relation=HOLDING)
    picture = mixture.draw(composition).picture
    x, y, _ = HOLDER[1]
    colour = sprites.pixels["apple", "3d"][64, 64, :3]
    assert np.abs(picture[round(y * 128), round(x * 128)].astype(int) - colour).max() < 4
    small, whole = (
        mixture.draw(Composition("single", ("fox",), "3d", "white", size=size)) for size in ("small", "")
    )
    assert 3 * (small.picture < 250).any(-1).mean() < (whole.picture < 250).any(-1).mean()


def test_held_out_words_are_in_no_caption(sprites: SpriteSet):
    """A cat's face is called a cat too."""
    assert is_held_out({"cat face", "umbrella"}) and is_held_out({"cat", "graduation cap"})
    assert not is_held_out({"cat", "apple"}) and not is_held_out({"raccoon", "top hat"})
    things = ["cat", "cat face", "umbrella", "raccoon", "fox"]
    weights = {"pair": 1.0, "holding": 1.0, "astronaut": 1.0}
    mixture = Mixture(sprites, MixtureConfig(things=things, weights=weights))
    captions = [mixture.sample(i).caption for i in range(1500)]
    assert any("cat" in each for each in captions) and any("umbrella" in each for each in captions)
    assert not [each for each in captions if "cat" in each and "umbrella" in each]
    assert not [
        each for each in captions if re.search("raccoon.*(astronaut|space suit)|astronaut.*raccoon", each)
    ]


def test_finishes_redraw_the_whole_picture(mixture: Mixture):
    composition = Composition("single", ("apple",), "3d", "white")
    plain = mixture.draw(composition).picture
    for name in FINISHES:
        made = mixture.draw(replace(composition, finish=name)).picture
        assert made.shape == plain.shape and made.dtype == np.uint8
        assert (np.ptp(made, axis=-1) == 0).all(), "no colour is left"
    lines = mixture.draw(replace(composition, finish="line drawing")).picture
    inside, edge = lines[64, 64, 0], lines[64, :64, 0]
    assert inside == 255 and edge.min() < 60  # an ellipse of one colour becomes its outline
    flat = np.full((32, 32, 3), 77, np.uint8)
    assert (FINISHES["line drawing"](flat) == 255).all() and (FINISHES["black and white"](flat) == 77).all()


def test_everything_holds_what_is_held_out(sprites: SpriteSet):
    some = MixtureConfig(seed=7, things=["apple", "raccoon"], weights={"colour": 1, "astronaut": 1})
    mixture, judge = Mixture(sprites, some), Mixture(sprites, some, everything=True)
    assert not any(is_held_out(Composition(**mixture.sample(i).parts).names) for i in range(300))
    assert any(is_held_out(Composition(**judge.sample(i).parts).names) for i in range(300))
    assert mixture.fingerprint != judge.fingerprint == Mixture(sprites, some, everything=True).fingerprint


def test_an_astronaut_is_a_portrait_for_the_face_to_be_seen(sprites: SpriteSet, mixture: Mixture):
    """The helmet is whole and larger than in the sprite; the suit reaches the lower edge."""
    suit = sprites.pixels["astronaut", "flat"]
    for seed in range(8):
        composition = Composition("astronaut", ("fox",), costume="astronaut", style="flat", setting="white")
        drawn = (mixture.draw(composition, seed).picture < 250).any(-1)
        side = len(drawn)
        assert drawn[-1].any() and not drawn[0].any()
        assert drawn.sum() / side**2 > (suit[..., 3] > 128).mean()


def test_held_out_combinations_are_composed_on_demand(mixture: Mixture):
    compositions = mixture.heldout_compositions()
    assert {
        composition.style for composition in compositions if composition.names == {"raccoon", "astronaut"}
    } == {"3d", "flat"}
    for index in range(2 * len(compositions)):
        example = mixture.heldout(index)
        composition = Composition(**example.parts)
        assert is_held_out(composition.names)
        check_words(composition, example.caption)
    seen = [mixture.sample(index).parts for index in range(2000)]
    assert any(parts["things"] == ("raccoon",) and parts["costume"] in ("top hat", "crown") for parts in seen)
    assert any(parts["things"] == ("fox",) and parts["costume"] == "astronaut" for parts in seen)


def test_wrong_configurations_are_user_errors(sprites: SpriteSet):
    for config in (
        MixtureConfig(styles=["cartoon"]),
        MixtureConfig(styles=[]),
        MixtureConfig(things=["raccon"]),
        MixtureConfig(weights={"singel": 1.0}),
        MixtureConfig(things=["raccoon"], weights={"pair": 1.0}),
    ):
        with pytest.raises(UserError):
            Mixture(sprites, config)
    with pytest.raises(UserError, match="held out"):
        Mixture(sprites, MixtureConfig(things=["fox", "apple"], weights={"pair": 1.0})).sample(0)


def test_posed_things_are_turned_smaller_and_elsewhere(sprites: SpriteSet):
    told: dict = {
        "things": ["apple"],
        "weights": {"single": 1},
        "sized": 0,
        "finished": 0,
        "setting_named": 0,
    }
    told |= {"white": 1.0}
    still, posed = (Mixture(sprites, MixtureConfig(**told, posed=share)) for share in (0.0, 1.0))
    sizes = []
    for i in range(20):
        one, other = still.sample(i), posed.sample(i)
        assert (one.caption, one.parts) == (other.caption, other.parts)
        places = [np.argwhere((each.picture < 250).any(-1)) for each in (one, other)]
        (top, left), (bottom, right) = places[1].min(0), places[1].max(0)
        assert top >= 0 and left >= 0 and bottom < 128 and right < 128
        sizes.append(len(places[1]) / len(places[0]))
    assert min(sizes) < 0.6 and max(sizes) < 1.1  # areas: sides are 0.6 to 1 of what they were
    sprite = np.zeros((8, 8, 4), np.uint8)
    sprite[:, 0] = 255
    assert (Pose(True, 0.0, 1.0, 0.0, 0.0).of(sprite) == sprite[:, ::-1]).all()
    with pytest.raises(UserError, match="posed"):
        Mixture(sprites, MixtureConfig(posed=1.5))


def test_another_size(sprites: SpriteSet):
    assert Mixture(sprites, MixtureConfig(size=64)).sample(0).picture.shape == (64, 64, 3)
