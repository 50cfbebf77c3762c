"""Pictures and captions as people have them: odd names, several captions, kinds that are not read, hostile files."""

import ast
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import encoded, folder_of, noise, tar_of
from PIL import Image

from ldm.data.listing import captions_of, other_kind
from ldm.data.pictures import PictureSet, decode, open_pictures
from ldm.errors import UserError, printable
from ldm.foreign import read_plain
from ldm.pictures import RASTERS, open_raster
from ldm.training.report import Report
from pipelines.recipe import open_picture

ROOT = Path(__file__).resolve().parents[1]
PNG = encoded(noise())
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


def names(found: PictureSet) -> list[str]:
    return [item.name for item in found.items]


def all_captions(found: PictureSet) -> dict[str, tuple[str, ...]]:
    return {item.name: item.captions for item in found.items}


# Opening


def openings(source: str) -> list[int]:
    """The lines in which a module opens a picture by Pillow, under whatever name it has it."""
    tree = ast.parse(source)
    modules, functions = {"Image"}, set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "PIL":
            modules |= {each.asname or each.name for each in node.names if each.name == "Image"}
        elif isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            functions |= {each.asname or each.name for each in node.names if each.name == "open"}
        elif isinstance(node, ast.Import):
            modules |= {each.asname for each in node.names if each.name == "PIL.Image" and each.asname}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            (isinstance(node, ast.Attribute) and node.attr in ("open", "imread", "read_image", "load_image"))
            and ast.unparse(node.value).rpartition(".")[2]
            in {*modules, "cv2", "imageio", "io", "plt", "utils"}
        )
        or (isinstance(node, ast.Name) and node.id in functions)
        or (isinstance(node, ast.Attribute) and ast.unparse(node).endswith("ImageFile.Parser"))
    ]


def test_one_function_of_the_tree_opens_pictures() -> None:
    places = [
        path.relative_to(ROOT).as_posix()
        for top in ("ldm", "pipelines", "scripts", "benchmarks")
        for path in sorted((ROOT / top).rglob("*.py"))
        for _ in openings(path.read_text(encoding="utf-8"))
    ]
    assert places == ["ldm/pictures.py"]


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open(path)",
        "from PIL import Image as I\nI.open(path)",
        "import PIL.Image\nPIL.Image.open(path)",
        "import PIL.Image as P\nmap(P.open, paths)",
        "def f():\n    from PIL.Image import open as load\n    return load(path)",
        "from PIL import ImageFile\nImageFile.Parser()",
        "import cv2\ncv2.imread(path)",
    ],
)
def test_the_search_for_openings_finds(source: str) -> None:
    assert len(openings(source)) == 1


def test_postscript_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under any ending; Pillow would start Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("it was run"))
    assert "EPS" not in RASTERS
    found = open_pictures(folder_of(tmp_path, {"a.png": PNG, "b.jpg": POSTSCRIPT, "c.eps": POSTSCRIPT}))
    assert names(found) == ["a.png"] and found.broken == {"b.jpg": "not a picture of a kind that can be read"}
    assert f"{tmp_path}: skipped, as these kinds are not read: 1 .eps" in found.notes
    (tmp_path / "recipe.png").write_bytes(POSTSCRIPT)
    with pytest.raises(UserError, match=r"recipe\.png is no picture that can be read \(it is no PNG\)"):
        open_picture(tmp_path / "recipe.png")


def test_recipes_are_read_from_png_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(), "gif"))
    with pytest.raises(UserError, match=r"a\.png is no picture that can be read \(it is no PNG\)"):
        open_picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(
        UserError, match=r"pipe\.png is no picture that can be read \(it is no regular file\)"
    ):
        open_picture(tmp_path / "pipe.png")


# Kinds


def test_every_raster_kind_is_found_by_its_endings(tmp_path: Path) -> None:
    """Also in capitals, and with another kind's bytes inside."""
    kinds = {
        **{name: "jpeg" for name in ("a.jpg", "b.JPEG", "c.jpe", "d.jfif", "e.Pjpeg")},
        **{"f.png": "png", "g.webp": "webp", "h.bmp": "bmp", "i.dib": "dib", "j.gif": "gif", "k.TIF": "tiff"},
        **{"l.tiff": "tiff", "m.apng": "png", "n.jpg": "webp"},
    }
    grey = np.full((6, 8, 3), 128, np.uint8)
    found = open_pictures(folder_of(tmp_path, {name: encoded(grey, kind) for name, kind in kinds.items()}))
    assert names(found) == sorted(kinds) and not found.broken
    for i in range(len(found)):
        assert np.abs(found.read(i).astype(int) - 128).max() <= 2


def test_avif_is_read_where_pillow_has_it(tmp_path: Path) -> None:
    from PIL import features

    if not ("AVIF" in Image.OPEN or Image.init()) or not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    picture = Image.new("RGB", (16, 12), (200, 40, 90))
    assert np.abs(decode(encoded(picture, "avif")).astype(int) - (200, 40, 90)).max() <= 6


def test_other_kinds_are_counted_and_what_is_no_picture_is_not(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.png": PNG,
        "b.HEIC": "x",
        "c.heic": "x",
        "in/d.svg": "x",
        "e.tar.gz": "x",
    }
    files |= {
        "f.txt": "x",
        "Thumbs.db": "x",
        ".DS_Store": "x",
        "g.json": "x",
        "._h.heic": "x",
        "i.safetensors": "x",
    }
    found = open_pictures(folder_of(tmp_path / "some", files), caption_column="")
    assert found.notes == [
        f"{tmp_path / 'some'}: skipped, as these kinds are not read: 2 .heic, 1 .svg, 1 .tar.gz"
    ]
    with pytest.raises(
        UserError, match=r"holds no pictures \(.*skipped, as these kinds are not read: 1 \.heic"
    ):
        open_pictures(folder_of(tmp_path / "none", {"a.heic": "x"}))
    with pytest.raises(UserError, match=r"is no folder and no \.tar file: unpack it"):
        open_pictures(tmp_path / "some" / "e.tar.gz")
    assert [other_kind(each) for each in ("a.tar.gz", "a.gz", "tar.gz", ".heic", "a.b.PSD")] == [
        ".tar.gz",
        "",
        "",
        "",
        ".psd",
    ]


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "png", "tiff"):
        options = {"lossless": True} if kind == "webp" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert open_raster(content).n_frames == 2  # type: ignore[attr-defined]
        assert decode(content)[0, 0].tolist() == [255, 0, 0]


def test_modes_come_out_right_or_are_refused() -> None:
    deep = np.array([[0, 100 * 257, 65535]], np.uint16)
    for kind in ("png", "tiff"):
        assert decode(encoded(Image.fromarray(deep), kind))[0, :, 1].tolist() == [0, 100, 255]
    half = Image.new("LA", (2, 2), (0, 128))
    assert abs(int(decode(encoded(half, "png"))[0, 0, 0]) - 127) <= 1  # half clear black over white
    assert decode(encoded(Image.new("1", (2, 2), 1), "png"))[0, 0].tolist() == [255, 255, 255]
    assert decode(encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "tiff"))[0, 0].tolist() == [255, 0, 0]
    for mode, value in (("F", 0.5), ("I", 70_000)):
        with pytest.raises(ValueError, match="nothing says which is white"):
            decode(encoded(Image.new(mode, (2, 2), value), "tiff"))
    inverted = encoded(Image.fromarray(deep), "tiff", tiffinfo={262: 0})
    assert open_raster(inverted).tag_v2[262] == 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="inverted"):
        decode(inverted)


# Captions


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (None, ("",)),
        ("  a cat ", ("a cat",)),
        (["a cat", "a kitty"], ("a cat", "a kitty")),
        (("a cat", None, " ", "a kitty"), ("a cat", "a kitty")),
        ([], ("",)),
        ([None, ""], ("",)),
        ("\U0001f63a", ("\U0001f63a",)),
    ],
)
def test_captions_of(value: Any, captions: tuple[str, ...]) -> None:
    assert captions_of(value) == captions


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"en": "a cat"}, "is {'en': 'a cat'}, which is no text but an object"),
        ({}, "which is no text but an object"),
        (0, "is 0, which is no text but a number"),
        (float("nan"), "is nan, which is no text but a number"),
        (False, "is False, which is no text but true or false"),
        ([{"caption": "a cat"}], "is a list with {'caption': 'a cat'}, which is no text but an object"),
        ([["a cat"]], "is a list with ['a cat'], which is no text but a list"),
    ],
)
def test_what_is_no_caption_is_refused_by_its_place(tmp_path: Path, value: Any, complaint: str) -> None:
    lines = [{"file_name": "a.png", "text": "x"}, {"file_name": "a.png", "text": value}]
    files = {"a.png": PNG, "metadata.jsonl": "\n".join(map(json.dumps, lines))}
    with pytest.raises(UserError) as raised:
        open_pictures(folder_of(tmp_path / "folder", files))
    assert "metadata.jsonl, line 2: text is" in str(raised.value) and complaint in f"text {raised.value}"
    (tmp_path / "shards").mkdir()
    pair: dict[str, bytes | str] = {"a.png": PNG, "a.json": json.dumps({"text": value}), "b.png": PNG}
    tar_of(tmp_path / "shards" / "x.tar", pair)
    found = open_pictures(tmp_path / "shards")
    assert names(found) == ["x.tar/b.png"]
    assert "its caption in a.json can't be read: text is" in found.broken["x.tar/a.png"]


def test_several_captions(tmp_path: Path) -> None:
    """In metadata and in a shard's JSON; they live on in the index."""
    line = json.dumps({"file_name": "a.png", "text": ["a cat", "a kitty", ""]})
    found = open_pictures(folder_of(tmp_path / "folder", {"a.png": PNG, "metadata.jsonl": line}))
    assert all_captions(found) == {"a.png": ("a cat", "a kitty")} and found.items[0].caption == "a cat"
    (tmp_path / "shards").mkdir()
    both: dict[str, bytes | str] = {"a.png": PNG, "a.json": '{"captions": ["a\\n cat", "a kitty"]}'}
    tar_of(tmp_path / "shards" / "x.tar", both)
    for _ in range(2):
        found = open_pictures(tmp_path / "shards", caption_column="captions", index=tmp_path / "index.json")
        assert all_captions(found) == {"x.tar/a.png": ("a cat", "a kitty")}


def test_half_of_a_surrogate_pair_costs_its_picture_alone(tmp_path: Path) -> None:
    lines = [{"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": ["a cat \ud83d"]}]
    files = {"a.png": PNG, "b.png": PNG, "metadata.jsonl": "\n".join(map(json.dumps, lines))}
    found = open_pictures(folder_of(tmp_path / "folder", files))
    assert names(found) == ["a.png"]
    assert (
        "line 2, its text is 'a cat \\ud83d', which holds half of a surrogate pair" in found.broken["b.png"]
    )
    (tmp_path / "shards").mkdir()
    pair: dict[str, bytes | str] = {"a.png": PNG, "a.json": '{"text": "\\ud83d"}', "b.png": PNG}
    tar_of(tmp_path / "shards" / "x.tar", pair)
    found = open_pictures(tmp_path / "shards", index=tmp_path / "index.json")
    assert names(found) == ["x.tar/b.png"] and "surrogate" in found.broken["x.tar/a.png"]


def test_a_caption_file_that_cannot_be_read_costs_its_picture_alone(tmp_path: Path) -> None:
    files = {f"{name}.png": PNG for name in "abcdef"} | {"b.txt": b"caf\xe9", "c.txt": b"\xff\xfea\0"}
    folder_of(tmp_path, files)
    (tmp_path / "d.txt").symlink_to("gone.txt")
    os.mkfifo(tmp_path / "e.txt")
    with (tmp_path / "f.txt").open("wb") as file:
        file.truncate(2**34)  # sparse: it takes no room
    found = open_pictures(tmp_path)
    assert names(found) == ["a.png"]
    reasons = {"b": "line 1 is in another encoding", "c": "UTF-16", "d": "a link to what is not there"}
    for name, reason in {**reasons, "e": "no regular file", "f": "are more than the"}.items():
        assert found.broken[f"{name}.png"].startswith(f"its caption {name}.txt can't be read")
        assert reason in found.broken[f"{name}.png"]


# Metadata


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "file_name,text\na.png,a cat, asleep\n",
            "line 2 has 3 cells, where the header has 2: a caption with",
        ),
        ("file_name,caption\na.png,a cat, asleep\n", "line 2 has 3 cells, where the header has 2"),
        ("file_name,text\na.png,x\n\na.png\n", "line 4 has 1 cells, where the header has 2"),
        (
            'file_name,text\na.png,"x\ny"\na.png,"never\ncloses\n',
            "line 4 is no CSV .*quote there open and not close",
        ),
        ('file_name,text\na.png,"red" apple\n', "line 2 is no CSV"),
        ("file_name,text\na.png," + "x" * 200_000, "line 2 is no CSV .field larger than field limit"),
        ("file_name,text\na.png,a\0cat\n", "line 2 holds a NUL byte"),
        ("file_name;text\na.png;a cat\n", "line 1: its cells are parted by semicolons, save it with commas"),
        ("file_name\ttext\na.png\ta cat\n", "line 1: its cells are parted by tabs"),
        ("file_name,text,text\na.png,a,b\n", "line 1 has two columns 'text': keep one"),
        ("a.png,a cat\n", r"names no pictures.*left out, as no line of the metadata names them: 1 pictures"),
        ("file_name,\na.png,a cat\n", r"no column 'text' \(its columns: file_name\)"),
        ("", r"metadata\.csv names no pictures"),
        (b"file_name,text\na.png,x\na.png,caf\xe9\n", "line 3 is in another encoding"),
        ("file_name,text\na.png,x\n".encode("utf-16"), "it is in UTF-16: save it as UTF-8"),
    ],
)
def test_malformed_csv_names_its_line(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        open_pictures(folder_of(tmp_path, {"a.png": PNG, "metadata.csv": text}))
    assert "\n" not in str(raised.value)


def test_csv_of_other_programs(tmp_path: Path) -> None:
    """A byte order mark, line ends of old Macs, an index that pandas wrote, empty rows, spaces in the header."""
    text = '\ufeff,file_name, text\r0,a.png,"a cat, asleep"\r,,\r\r1,a.png,a dog\r'
    found = open_pictures(folder_of(tmp_path, {"a.png": PNG, "metadata.csv": text}))
    assert [item.caption for item in found.items] == ["a cat, asleep", "a dog"]
    assert found.notes == [f"{tmp_path}/metadata.csv, line 1: passed over, as they have no name: 1 columns"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"holds no pictures .*metadata\.jsonl names no pictures; .*left out, as no line .* 1 pictures"),
        (" \n\n", r"metadata\.jsonl names no pictures"),
        (
            '[\n{"file_name": "a.png", "text": "x"}\n]',
            "line 1 is no JSON .*of one array: write an object a line",
        ),
        ('[{"file_name": "a.png", "text": "x"}]', "line 1 is no JSON object.*one a line"),
        ("[" * 100_000, "line 1 is no JSON that can be read"),
        ('{"file_name": "a.png", "text": ' + "9" * 5000 + "}", "line 1 is no JSON"),
        ('{"file_name": "' + "a" * 5000 + '", "text": "x"}', "line 1 names a{200}, which is not there"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "line 1 names .*, which is not there"),
        ('{"file_name": "\\ud800.png", "text": "x"}', "line 1 names .*, which is not there"),
        ('{"file_name": "../b.png", "text": "x"}', r"names \.\./b\.png, which is outside of .*outside: true"),
        ('{"file_name": "/etc/hostname", "text": "x"}', "names /etc/hostname, which is outside of"),
    ],
)
def test_malformed_metadata_names_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    folder_of(tmp_path, {"b.png": PNG})
    with pytest.raises(UserError, match=complaint):
        open_pictures(folder_of(tmp_path / "in", {"a.png": PNG, "metadata.jsonl": text}))


def test_pictures_outside_are_read_where_it_is_allowed(tmp_path: Path) -> None:
    line = json.dumps({"file_name": "../b.png", "text": "x"})
    folder_of(tmp_path, {"b.png": PNG, "in/metadata.jsonl": line})
    assert names(open_pictures(tmp_path / "in", outside=True)) == ["../b.png"]
    assert names(open_pictures(tmp_path)) == ["b.png"]  # which is inside of what was given


def test_an_empty_metadata_file_beside_pictures_is_said(tmp_path: Path) -> None:
    found = open_pictures(folder_of(tmp_path, {"a.png": PNG, "in/b.png": PNG, "in/metadata.jsonl": ""}))
    assert names(found) == ["a.png"]
    assert found.notes[:2] == [
        f"{tmp_path}/in/metadata.jsonl names no pictures",
        f"{tmp_path}: left out, as no line of the metadata names them: 1 pictures",
    ]


# Links, pipes, names


def test_links_that_lead_nowhere_are_named_and_the_others_followed(tmp_path: Path) -> None:
    folder_of(tmp_path, {"data/a.png": PNG, "data/in/b.png": PNG, "elsewhere/c.png": PNG})
    links = {"gone.png": "none.png", "loop.png": "loop.png", "null.png": "/dev/null", "d.png": "in/b.png"}
    links |= {
        "folder": "../none",
        "my.photos": "../none",
        "back": ".",
        "linked": "../elsewhere",
        "notes.md": "none.md",
    }
    for name, target in links.items():
        (tmp_path / "data" / name).symlink_to(target)
    os.mkfifo(tmp_path / "data" / "pipe.png")
    with (tmp_path / "data" / "sparse.png").open("wb") as file:
        file.truncate(40 * 2**30)
    found = open_pictures(tmp_path / "data")
    assert names(found) == ["a.png", "d.png", "in/b.png", "linked/c.png"]
    broken = dict(found.broken)
    for name, reason in {
        "gone.png": "can't be read: it is a link to what is not there",
        "loop.png": "can't be read: ",
        "null.png": "can't be read: it is no regular file",
        "pipe.png": "can't be read: it is no regular file",
        "sparse.png": "can't be read: its 42,949,672,960 bytes are more than the 1,073,741,824 that are read",
        "folder": "it is a link to what is not there",
        "my.photos": "it is a link to what is not there",
        "back": "it is a link to a folder that is listed already",
    }.items():
        assert broken.pop(name).startswith(reason), name
    assert not broken


def test_metadata_that_names_links_to_nothing(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in "ab"]
    folder_of(tmp_path, {"a.png": PNG, "metadata.jsonl": "\n".join(lines)})
    (tmp_path / "b.png").symlink_to("gone.png")
    found = open_pictures(tmp_path)
    assert names(found) == ["a.png"] and "a link to what is not there" in found.broken["b.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.png": PNG, "b.png": PNG, "in/c.png": PNG})
    (tmp_path / "b.png").chmod(0)
    (tmp_path / "in").chmod(0)
    found = open_pictures(tmp_path)
    (tmp_path / "in").chmod(0o700)
    assert names(found) == ["a.png"]
    assert found.broken == {each: "can't be read: Permission denied" for each in ("b.png", "in")}


def test_a_file_that_claims_no_bytes_is_not_waited_for(tmp_path: Path) -> None:
    """So do files of /proc, of which kmsg never ends."""
    (tmp_path / "empty").touch()
    assert read_plain(tmp_path / "empty") == b""
    (tmp_path / "ten").write_bytes(b"0123456789")
    with pytest.raises(OSError, match="its 10 bytes are more than the 9"):
        read_plain(tmp_path / "ten", 9)


def test_names_that_are_not_utf8(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """They are used, kept in the index, and printed with escapes."""
    data = tmp_path / "data"
    folder_of(data, {"a.png": PNG})
    for name, content in ((b"\x83\x65.png", PNG), (b"\xff\x1b[2J\n.png", b"junk")):
        with open(os.fsencode(data) + b"/" + name, "wb") as file:
            file.write(content)
    found = open_pictures(data, caption_column="", index=tmp_path / "index.json")
    for _ in range(2):
        found = open_pictures(data, caption_column="", index=tmp_path / "index.json")
        assert sorted(names(found)) == ["a.png", os.fsdecode(b"\x83\x65.png")]
        assert list(found.broken) == [os.fsdecode(b"\xff\x1b[2J\n.png")]
    lines = found.report()
    assert lines == [
        "skipped \\udcff\\x1b[2J\\n.png: not a picture of a kind that can be read",
        "1 broken pictures were skipped",
    ]


def test_printable() -> None:
    assert printable("a caf\u00e9 \U0001f63a") == "a caf\u00e9 \U0001f63a"
    assert printable("\x1b[2J\n\t\udc83\u202e\u2028") == "\\x1b[2J\\n\\t\\udc83\\u202e\\u2028"
    assert printable("a caf\u00e9 \u732b", "ascii") == "a caf\\xe9 \\u732b"
    assert printable("a caf\u00e9 \u732b", "cp1252") == "a caf\u00e9 \\u732b"


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_run_prints_whatever_names_hold(
    encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Alone:
        is_main_process = True

    output = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", output)
    Report(Alone(), tmp_path, 1).tell(["skipped \udc83 caf\u00e9 \u732b"])  # type: ignore[arg-type]
    output.flush()
    line = output.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert line == printable("skipped \udc83 caf\u00e9 \u732b", encoding) + "\n"


# Saved datasets


def test_saved_datasets_as_people_have_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder_of(tmp_path, {"outside.png": PNG})
    pictures = [{"bytes": PNG, "path": None}, None, {"bytes": None, "path": str(tmp_path / "outside.png")}]
    texts = [["a\ncat", "a kitty"], [], None]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    columns = {"image": pictures, "text": texts}
    rows = datasets.Dataset.from_dict(columns, features=features).with_format("numpy", columns=["text"])
    saved = tmp_path / "rows"
    rows.save_to_disk(str(saved))
    found = open_pictures(saved)
    assert found.items[0].captions == ("a cat", "a kitty")
    assert found.items[1].captions == ("",) and np.array_equal(found.read(1), noise())
    assert found.broken == {"row 1": "the row holds no picture"}

    plain = datasets.Dataset.from_dict({"image": [PNG] * 2, "text": ["x", "y"], "number": [1, 2]})
    plain.save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(UserError, match="row 0: number is 1, which is no text but a number"):
        open_pictures(tmp_path / "plain", caption_column="number")
    for name, text, complaint in (
        ("dataset_dict.json", "[]", "holds no JSON object"),
        ("dataset_dict.json", "{", "is no JSON"),
        ("dataset_dict.json", '{"splits": 5}', "names no splits"),
        (
            "dataset_dict.json",
            '{"splits": ["../rows"]}',
            r"names the split \.\./rows, which is no dataset in",
        ),
        ("state.json", '{"_data_files": [{"filename": "../rows/data.arrow"}]}', "which is not in"),
        ("state.json", "{}", "is no whole dataset"),
        ("state.json", "", "is no JSON"),
    ):
        place = folder_of(tmp_path / f"bad{len(complaint)}{name}", {"state.json": "{}", name: text})
        with pytest.raises(UserError, match=complaint) as raised:
            open_pictures(place)
        assert "\n" not in str(raised.value)


def test_a_row_reads_files_of_its_own_dataset_alone(tmp_path: Path) -> None:
    from ldm.data.saved import _bytes

    folder_of(tmp_path, {"outside.png": b"1", "in/inside.png": b"2"})

    def row(path: Path, within: Path | None) -> bytes:
        return _bytes([{"image": {"bytes": None, "path": str(path)}}], 0, "image", within)

    assert row(tmp_path / "in/inside.png", tmp_path / "in") == b"2"
    assert row(tmp_path / "outside.png", None) == b"1"
    for path in (tmp_path / "outside.png", tmp_path / "in" / ".." / "outside.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match="outside of the dataset: to allow that, set outside: true"):
            row(path, tmp_path / "in")
