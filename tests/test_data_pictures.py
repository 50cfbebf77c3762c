"""Pictures from disk: what is found, what is broken, how they are cut, in which order they come."""

import json
import os
import struct
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import encoded, folder_of, noise, tar_of
from PIL import Image

from ldm.data import pictures
from ldm.data.buckets import Framing, assign, buckets, cut, frame, nearest_bucket, plan_framing
from ldm.data.masks import random_mask
from ldm.data.order import Order
from ldm.data.pictures import decode, open_pictures
from ldm.errors import UserError


def captions(path: Path, **options: Any) -> dict[str, str]:
    return {item.name: item.caption for item in open_pictures(path, **options).items}


# Folders


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    files = {"b.PNG": encoded(noise()), "b.txt": "a fox,\n red\n", "a.webp": encoded(noise(), "webp")}
    files |= {
        "sub/c.jpg": encoded(noise(), "jpeg"),
        ".hidden/d.png": encoded(noise()),
        "notes.md": "no picture",
    }
    found = open_pictures(folder_of(tmp_path, files))
    assert [(item.name, item.caption) for item in found.items] == [
        ("a.webp", ""),
        ("b.PNG", "a fox, red"),
        ("sub/c.jpg", ""),
    ]
    assert found.notes == [f"{tmp_path}: without a caption, so theirs is empty: 2 of 3 pictures"]
    assert np.array_equal(found.read(1), noise()) and not found.broken
    assert (found.items[1].height, found.items[1].width) == (6, 8)
    assert set(captions(tmp_path, caption_column="").values()) == {""}


def test_a_folder_with_metadata_holds_what_it_names(tmp_path: Path) -> None:
    """The datasets library's imagefolder: also in subfolders, which name their own."""
    lines = [{"file_name": "b.png", "text": " a fox "}, {"file_name": "in/a.png", "text": None}]
    lines += [{"file_name": "b.png", "text": "a fox\u2028again"}]
    files: dict[str, bytes | str] = {
        name: encoded(noise()) for name in ("a.png", "b.png", "in/a.png", "in/b.png")
    }
    files["metadata.jsonl"] = (
        "\ufeff" + "\n".join(json.dumps(each, ensure_ascii=False) for each in lines) + "\n\n"
    )
    files |= {"a.txt": "not asked", "csv/c.png": encoded(noise(3, 3))}
    files["csv/metadata.csv"] = 'file_name,text\r\nc.png,"two\nlines, quoted"\r\n'
    found = open_pictures(folder_of(tmp_path, files))
    assert [(item.name, item.caption) for item in found.items] == [
        ("b.png", "a fox"),
        ("in/a.png", ""),
        ("b.png", "a fox\u2028again"),
        ("csv/c.png", "two\nlines, quoted"),
    ]
    assert found.notes[0] == f"{tmp_path}: left out, as no line of the metadata names them: 2 pictures"
    assert found.items[0].key == found.items[1].key != found.items[3].key


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{oops', r"metadata\.jsonl, line 2 is no JSON"),
        ('\n{"file_name": "gone.png", "text": "x"}', r"line 2 names gone\.png, which is not there"),
        ('{"filename": "a.png", "text": "x"}', r"line 1 has no file_name, did you mean filename\?"),
        ('["a.png"]', "line 1 is no JSON object"),
        (
            '{"file_name": "a.png", "texts": "x"}',
            r"no column 'text', did you mean texts\? \(its columns: file_name",
        ),
        ('{"file_name": "a.png", "text": 3}', "line 1: text is 3, which is no text"),
        (b"\xff\xfe", "can't be read as UTF-8 text"),
    ],
)
def test_metadata_that_is_wrong_is_named(tmp_path: Path, metadata: str | bytes, complaint: str) -> None:
    folder_of(tmp_path, {"a.png": encoded(noise()), "metadata.jsonl": metadata})
    with pytest.raises(UserError, match=complaint):
        open_pictures(tmp_path)


def test_places_without_pictures_are_refused(tmp_path: Path) -> None:
    folder_of(
        tmp_path, {"readme.md": "x", "bad/a.png": b"", "both/a.png": encoded(noise()), "some/x.txt": ""}
    )
    folder_of(tmp_path / "two", {"metadata.csv": "", "metadata.jsonl": ""})
    tar_of(tmp_path / "both" / "b.tar", {})
    (tmp_path / "empty").mkdir()
    for name, complaint in {
        "som": "is not there, did you mean some",
        "readme.md": "is no folder and no .tar file",
        "empty": r"holds no pictures \(.jpg",
        "bad": r"none of the 1 pictures of .*bad is whole; the first, a.png: the file is empty",
        "both": "give each a folder of its own",
        "two": "keep one of them",
    }.items():
        with pytest.raises(UserError, match=complaint):
            open_pictures(tmp_path / name)


# Decoding


def huge_claim() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_broken_pictures_are_skipped_and_named(tmp_path: Path) -> None:
    whole = encoded(noise(64, 64), "jpeg")
    files = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.png": b"",
        "huge.png": huge_claim(),
        "text.png": "hello",
    }
    found = open_pictures(folder_of(tmp_path, {**files, "whole.jpg": whole}))
    assert [item.name for item in found.items] == ["whole.jpg"] and len(found) == 1
    assert found.broken.keys() == files.keys()
    for name, why in {
        "cut.jpg": "truncated",
        "empty.png": "the file is empty",
        "huge.png": "too many pixels",
        "text.png": "not a picture of a kind that can be read",
    }.items():
        assert why in found.broken[name] and "\n" not in found.broken[name]


def test_decoding_turns_flattens_and_rounds() -> None:
    picture = noise()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise by a quarter
    assert np.array_equal(decode(encoded(picture, exif=turned)), np.rot90(picture, -1))
    half = np.dstack([np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 128, np.uint8)])
    assert abs(decode(encoded(half)).astype(int) - 127).max() <= 1  # half clear black over white
    palette = Image.fromarray(np.eye(2, dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert decode(encoded(palette, transparency=0))[0].tolist() == [[0, 0, 255], [255, 255, 255]]
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert decode(encoded(deep))[0, :, 0].tolist() == [0, 100, 255]
    assert decode(encoded(Image.fromarray(picture[..., 0])))[..., 2].tolist() == picture[..., 0].tolist()
    assert decode(encoded(Image.new("CMYK", (2, 2)), "jpeg")).shape == (2, 2, 3)


# The index


def test_only_what_is_new_or_changed_is_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, index = tmp_path / "data", tmp_path / "made" / "index.json"
    folder_of(
        data, {"a.png": encoded(noise()), "b.png": encoded(noise(4, 4)), "c.png": "broken", "a.txt": "one"}
    )
    decoded: list[int] = []

    def counting(content: bytes) -> np.ndarray:
        decoded.append(len(content))
        return decode(content)

    monkeypatch.setattr(pictures, "decode", counting)
    first = open_pictures(data, index=index)
    assert len(decoded) == 3
    folder_of(data, {"a.txt": "two"})  # captions are read each time
    again = open_pictures(data, index=index)
    assert len(decoded) == 3 and again.broken == first.broken == {
        "c.png": "not a picture of a kind that can be read"
    }
    assert [item.caption for item in again.items] == ["two", ""]
    assert [item.key for item in again.items] == [item.key for item in first.items]
    folder_of(data, {"c.png": encoded(noise(2, 2)), "d.png": encoded(noise(2, 2))})
    (data / "a.png").unlink()
    changed = open_pictures(data, index=index)
    assert len(decoded) == 5 and [item.name for item in changed.items] == ["b.png", "c.png", "d.png"]
    assert json.loads(index.read_text())["pictures"].keys() == {"b.png", "c.png", "d.png"}
    index.write_text("{half")
    open_pictures(data, index=index)
    assert len(decoded) == 8 and [each.name for each in index.parent.iterdir()] == ["index.json"]


def test_an_interrupted_check_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "data", {f"{i}.png": encoded(noise(4, 4, i)) for i in range(4)})
    index = tmp_path / "index.json"
    last = encoded(noise(4, 4, 3))

    def dying(content: bytes) -> np.ndarray:
        if content == last:
            raise KeyboardInterrupt
        return decode(content)

    monkeypatch.setattr(pictures, "decode", dying)
    with pytest.raises(KeyboardInterrupt):
        open_pictures(tmp_path / "data", index=index)
    assert json.loads(index.read_text())["pictures"].keys() == {"0.png", "1.png", "2.png"}


def test_a_picture_that_goes_or_changes_is_named(tmp_path: Path) -> None:
    found = open_pictures(folder_of(tmp_path, {"a.png": encoded(noise()), "b.png": encoded(noise())}))
    folder_of(tmp_path, {"a.png": encoded(noise(seed=1))})
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match=r"a\.png has changed"):
        found.read(0)
    with pytest.raises(UserError, match=r"b\.png can't be read any more"):
        found.read(1)


# Webdataset


def test_shards_are_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {0: ("jpg", "txt", "a fox\n"), 1: ("png", "json", json.dumps({"caption": "a cat", "url": 1}))}
    for shard in range(2):
        files: dict[str, bytes | str] = {}
        for i in range(3):
            kind, words, text = kinds[(i + shard) % 2]
            files[f"in.dir/{i}.{kind}"] = encoded(noise(5, 4, 3 * shard + i), kind.replace("jpg", "jpeg"))
            files[f"in.dir/{i}.{words}"] = text
        files |= {"in.dir/0.seg.png": "another kind of file", "lonely.json": "{}"}
        tar_of(tmp_path / f"{shard}.tar", files)
    index = tmp_path / "index.json"
    found = open_pictures(tmp_path, index=index)
    assert [(item.name, item.caption) for item in found.items][2:4] == [
        ("0.tar/in.dir/2.jpg", "a fox"),
        ("1.tar/in.dir/0.png", "a cat"),
    ]
    assert len(found) == 6 and not found.broken
    for i in (5, 3, 1):  # the lossless ones
        assert np.array_equal(found.read(i), noise(5, 4, i))
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("the headers were indexed before"))
    assert open_pictures(tmp_path, index=index).items == found.items
    monkeypatch.undo()
    os.utime(tmp_path / "0.tar", ns=(1, 1))
    assert open_pictures(tmp_path, index=index).items == found.items


def test_what_is_broken_in_a_shard_is_named(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{i}.png": encoded(noise(20, 20, i)) for i in range(4)}
    files |= {"0.json": "{oops", "1.json": '{"caption": 3}', "2.json": '{"caption": "a cat"}'}
    content = tar_of(tmp_path / "whole.tar", dict(sorted(files.items()))).read_bytes()
    last = content.index(encoded(noise(20, 20, 3)))
    damaged = bytearray(content)
    damaged[last - 512 : last - 400] = b"x" * 112  # the header of the last picture
    shards = {
        "cut.tar": content[: last + 700],
        "damaged.tar": bytes(damaged),
        "none.tar": b"no tar file" * 99,
    }
    found = open_pictures(folder_of(tmp_path / "shards", {**shards}))
    assert [(item.name, item.caption) for item in found.items] == [
        ("cut.tar/2.png", "a cat"),
        ("damaged.tar/2.png", "a cat"),
    ]
    broken = found.broken
    assert "truncated" in broken.pop("cut.tar/3.png") and "cut short" in broken.pop("cut.tar")
    assert broken.pop("damaged.tar") == "damaged after 3 pictures"
    assert "no tar file, 0 pictures found" in broken.pop("none.tar")
    for shard in ("cut.tar", "damaged.tar"):
        assert "its caption in 0.json can't be read" in broken.pop(f"{shard}/0.png")
        assert "caption is 3, which is no text" in broken.pop(f"{shard}/1.png")
    assert not broken
    with pytest.raises(UserError, match=r"none\.tar holds no pictures.*no tar file"):
        open_pictures(tmp_path / "shards" / "none.tar")


# Datasets on disk


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [encoded(noise(5, 4, i)) for i in range(3)] + [b"broken"]
    columns = {
        "picture": [{"bytes": each, "path": None} for each in files],
        "words": ["a", None, "c\nd", "e"],
    }
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(str(tmp_path / "rows"))
    options = {"image_column": "picture", "caption_column": "words"}
    found = open_pictures(tmp_path / "rows", index=tmp_path / "index.json", **options)
    assert [item.caption for item in found.items] == ["a", "", "c d"] and found.broken.keys() == {"row 3"}
    assert np.array_equal(found.read(2), noise(5, 4, 2))
    assert open_pictures(tmp_path / "rows", index=tmp_path / "index.json", **options).items == found.items
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "one"))
    assert open_pictures(tmp_path / "one", **options).items == found.items
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "two"))
    for place, changes, complaint in (
        ("two", {}, r"several splits: give one of them \(.*two/train, .*two/test\)"),
        ("rows", {"image_column": "picure"}, r"no column 'picure', did you mean picture\?"),
        ("rows", {"image_column": "words"}, "the column 'words' holds no pictures"),
    ):
        with pytest.raises(UserError, match=complaint):
            open_pictures(tmp_path / place, **{**options, **changes})


def test_a_saved_dataset_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_pictures(folder_of(tmp_path, {"state.json": "{}"}))


# Buckets and cuts


def test_buckets_are_those_of_sdxl_up_to_a_ratio_of_two() -> None:
    """Podell et al. 2023, appendix I, lists sizes for 1024^2; of each long side the one of largest area is ours."""
    found = buckets(1024)
    assert {(768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024), (704, 1408)} <= set(found)
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 and max(h, w) <= 2 * min(h, w) for h, w in found)
    assert found == sorted((w, h) for h, w in found) and min(h * w for h, w in found) > 0.9 * 1024**2
    assert buckets(512, max_ratio=1) == [(512, 512)] and buckets(64) == [(64, 64)]
    assert buckets(32, step=8, max_ratio=1.7) == [(24, 40), (32, 32), (40, 24)]
    assert nearest_bucket(1000, 1500, found) == (832, 1216)
    assert nearest_bucket(3, 1, found) == (1408, 704) and nearest_bucket(7, 7, found) == (1024, 1024)
    for wrong, complaint in (({"resolution": 100}, "a multiple of 64"), ({"max_ratio": 0.5}, "at least 1")):
        with pytest.raises(UserError, match=complaint):
            buckets(**{"resolution": 64, **wrong})


def test_a_framing_records_the_cut_as_diffusers_does() -> None:
    """There: resize the shorter side, mirror, then cut; the corner is of the mirrored picture."""
    picture, rng = noise(9, 16), np.random.default_rng(0)
    for crop in ("center", "random"):
        seen: set[Framing] = set()
        for _ in range(40):
            part, framing = frame(picture, (9, 12), crop=crop, flip=True, rng=rng)
            (top, left), turned = framing.crop, picture[:, ::-1] if framing.flipped else picture
            assert np.array_equal(part, turned[top : top + 9, left : left + 12])
            assert framing.time_ids == (9, 16, 0, left, 9, 12)
            seen.add(framing)
        lefts = {2} if crop == "center" else set(range(5))
        assert {(f.crop[1], f.flipped) for f in seen} == {
            (x, mirrored) for x in lefts for mirrored in (False, True)
        }
    small = plan_framing((300, 401), (128, 128))  # 128 x 171, of which 43 are too many
    assert small == Framing((300, 401), (0, 22), (128, 128), False)
    assert plan_framing((401, 300), (128, 128)).crop == (22, 0)


def test_a_cut_covers_its_target_and_keeps_what_it_shows() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 90)[None, :, None], (40, 90, 3)).astype(np.uint8)
    for target in ((16, 16), (80, 96), (24, 8), (40, 90)):
        part = cut(ramp, plan_framing((40, 90), target))
        assert part.shape == (*target, 3) and abs(float(part.mean()) - 127.5) < 4
        assert (np.diff(part[:, 4:-4, 0].astype(int), axis=1) >= -1).all()
    with pytest.raises(ValueError, match="needs an rng"):
        plan_framing((4, 4), (4, 4), flip=True)


# The order


def test_each_batch_is_of_one_group_and_all_pictures_come_equally_often() -> None:
    groups = ["a"] * 10 + ["b"] * 4 + ["c"] * 7
    order = Order(groups, 4, seed=3)
    turns = [order.batches_before(turn) for turn in range(13)]
    assert turns[:3] == [0, 2 + 1 + 1, 5 + 2 + 3] and turns[4] == 21
    places = order.places(0, 4 * turns[12])
    assert len(set(places)) == len(places)  # a picture of a pass comes once
    for k in range(turns[12]):
        assert len({groups[index] for _, index in places[4 * k : 4 * k + 4]}) == 1
    counts = Counter(index for _, index in places)
    assert set(counts.values()) == {12}  # at a common multiple nothing is carried over
    for turn in range(12):
        shown = [index for _, index in places[4 * turns[turn] : 4 * turns[turn + 1]]]
        assert max(Counter(shown).values()) <= 2
    assert [len(set(places[84 * k : 84 * k + 84])) for k in range(3)] == [84] * 3
    assert places[:84] != [(turn - 4, index) for turn, index in places[84:168]]


def test_few_odd_shapes_take_no_more_than_their_share() -> None:
    """20 pictures of five odd shapes among 1000, at batches of 64: they join the nearest shapes that fill a batch."""
    sizes = buckets(64, step=8, max_ratio=2)
    odd = [(64, 96), (96, 64), (64, 110), (110, 64), (64, 125)]
    originals = [(64, 64)] * 900 + [(64, 80)] * 80 + odd * 4
    targets = assign(originals, sizes, 64)
    assert set(targets) == {(64, 64), nearest_bucket(64, 80, sizes)}
    assert targets[originals.index((64, 125))] == nearest_bucket(64, 80, sizes)
    assert targets[originals.index((110, 64))] == (64, 64)
    places = Order(targets, 64, seed=0).places(0, 64 * 16)  # about a turn
    shown = Counter(index for _, index in places)
    assert sum(shown[i] for i in range(980, 1000)) < 40 and max(shown.values()) <= 2
    assert (
        assign([(64, 64)] * 3 + [(64, 125)] * 2, sizes, 8) == [(64, 64)] * 5
    )  # too few for one batch even so
    assert assign(originals, sizes, 1) == [nearest_bucket(*each, sizes) for each in originals]


def test_the_order_is_a_function_of_seed_and_position() -> None:
    groups = [i % 3 for i in range(50)]
    whole = Order(groups, 8, seed=1).places(0, 800)
    for start in (792, 0, 400, 56):
        assert Order(groups, 8, seed=1).places(start, 8) == whole[start : start + 8]
    assert Order(groups, 8, seed=2).places(0, 800) != whole
    few = Order(["a"] * 3, 8, seed=0).places(0, 48)  # fewer than a batch: equally often all the same
    assert set(Counter(index for _, index in few).values()) == {16}
    with pytest.raises(ValueError, match="multiples of the batch"):
        Order([0, 0], 2, seed=0).places(1, 2)


def test_masks_are_one_where_the_picture_is_drawn_anew() -> None:
    """A tenth of them everywhere; the others leave most of the picture."""
    masks = [random_mask(32, 48, np.random.default_rng(seed)) for seed in range(300)]
    whole = [mask for mask in masks if mask.all()]
    parts = [mask.mean() for mask in masks if not mask.all()]
    assert 15 < len(whole) < 50 and masks[0].shape == (32, 48)
    assert min(parts) > 0 and np.mean(parts) < 0.5
