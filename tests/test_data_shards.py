"""Shards as people have them: dotted names, links, headers that lie; and the index of what was found."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from picture_files import encoded, noise, tar_of

from ldm.data import tar
from ldm.data.pictures import PictureSet, open_pictures

PNG = encoded(noise())


def names(found: PictureSet) -> list[str]:
    return [item.name for item in found.items]


def all_captions(found: PictureSet) -> dict[str, tuple[str, ...]]:
    return {item.name: item.captions for item in found.items}


def one_shard(tmp_path: Path, files: dict[str, bytes | str]) -> PictureSet:
    (tmp_path / "shards").mkdir(exist_ok=True)
    tar_of(tmp_path / "shards" / "x.tar", files)
    return open_pictures(tmp_path / "shards" / "x.tar")


def test_dotted_names_in_shards(tmp_path: Path) -> None:
    """webdataset splits at the first dot; no picture is lost for it, nor given another's caption."""
    files: dict[str, bytes | str] = {
        **{"photo.v1.2.jpg": PNG, "photo.v1.2.txt": "one", "photo.v2.jpg": PNG, "photo.v2.txt": "two"},
        **{"1.jpg": PNG, "1.txt": "three", "1.seg.png": PNG, "1.5.png": PNG, "1.5.json": '{"text": "four"}'},
        **{"in.dir/2.left.PNG": PNG, "in.dir/2.txt": "five"},
        **{"3.a.jpg": PNG, "3.b.jpg": PNG, "3.txt": "whose?", "4.png": PNG, "4.jpg": PNG, "4.txt": "both"},
    }
    found = one_shard(tmp_path, files)
    captions = {"photo.v1.2.jpg": "one", "photo.v2.jpg": "two", "1.jpg": "three", "1.5.png": "four"}
    captions |= {"in.dir/2.left.PNG": "five", "3.a.jpg": "", "3.b.jpg": "", "4.png": "both", "4.jpg": "both"}
    assert {item.name.removeprefix("x.tar/"): item.caption for item in found.items} == captions
    shard = tmp_path / "shards" / "x.tar"
    assert (
        found.notes[0] == f"{shard}: left out, as parts of other samples: 1 pictures (the first is 1.seg.png)"
    )
    assert "without a caption, so theirs is empty: 2 of 9" in found.notes[1]


def test_members_of_every_kind(tmp_path: Path) -> None:
    """Hidden ones, other prefixes, links, one name twice, names in PAX headers, kinds that are not read."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:

        def add(name: str, content: bytes = b"", **values: Any) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in values.items():
                setattr(member, key, value)
            shard.addfile(member, io.BytesIO(content))

        add("./a.PNG", PNG)
        add("a.TXT", b"one")
        add("._a.PNG", b"of macOS")
        add(".hidden/b.png", PNG)
        add("in/hard.png", type=tarfile.LNKTYPE, linkname="./a.PNG")
        add("in/soft.png", type=tarfile.SYMTYPE, linkname="../later.png")
        add("in/soft.txt", type=tarfile.SYMTYPE, linkname="../a.TXT")
        add("gone.png", type=tarfile.SYMTYPE, linkname="../../etc/passwd")
        add("round.png", type=tarfile.SYMTYPE, linkname="round.png")
        add("device.png", type=tarfile.CHRTYPE)
        add("folder.png", type=tarfile.DIRTYPE)
        add("twice.png", b"old")
        add("later.png", encoded(noise(3, 3)))
        add("twice.png", encoded(noise(5, 5)))
        add("c.heic", b"x")
        add("\u732b" * 150 + ".png", PNG)
    found = open_pictures(path)
    sizes = {item.name: (item.height, item.caption) for item in found.items}
    assert sizes == {
        "x.tar/./a.PNG": (6, "one"),
        "x.tar/in/hard.png": (6, ""),
        "x.tar/in/soft.png": (3, "one"),
        "x.tar/later.png": (3, ""),
        "x.tar/twice.png": (5, ""),
        f"x.tar/{chr(0x732B) * 150}.png": (6, ""),
    }
    assert found.broken == {
        "x.tar/gone.png": "it is a link to what is not in the shard",
        "x.tar/round.png": "it is a link to what is not in the shard",
        "x.tar/device.png": "it is no plain file",
    }
    assert (
        f"{path}: in it twice, of which the last is used: 1 pictures (the first is twice.png)" in found.notes
    )
    assert f"{path}: skipped, as these kinds are not read: 1 .heic" in found.notes


def shard_with(path: Path, pax: dict[str, str], size: bytes = b"", kind: bytes = b"") -> None:
    """A whole pair, then a picture whose header says what it is told to."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as shard:
        for name, content in {"a.png": PNG, "a.txt": b"one", "z.png": bytes(512)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.pax_headers = pax if name == "z.png" else {}
            shard.addfile(member, io.BytesIO(content))
    content = bytearray(path.read_bytes())
    start = content.index(b"z.png\0")
    header = content[start : start + 512]
    header[124:136] = size or header[124:136]
    header[156:157] = kind or header[156:157]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + 512] = header
    path.write_bytes(content)


def binary(size: int) -> bytes:
    return b"\xff" + (size % 2**88).to_bytes(11, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")


@pytest.mark.parametrize(
    ("pax", "header"),
    [
        *(({}, {"size": binary(size)}) for size in (2**40, 2**86, -512, -1024, -(10**6))),
        *(({}, {"size": binary(size), "kind": kind}) for size in (2**40, -512) for kind in (b"L", b"x")),
        ({}, {"kind": b"S"}),
        ({}, {"size": b"zzzzzzzzzzz\0"}),
        *(({"size": size}, {}) for size in (str(2**40), "-512", "-1000000")),
        ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}, {}),
        ({"GNU.sparse.size": str(2**36), "GNU.sparse.numblocks": "0", "GNU.sparse.map": "0,0"}, {}),
        ({"GNU.sparse.map": "a,b"}, {}),
    ],
    ids=str,
)
def test_headers_that_lie_cost_what_they_head(
    tmp_path: Path, pax: dict[str, str], header: dict[str, bytes]
) -> None:
    shard_with(tmp_path / "x.tar", pax, **header)
    found = open_pictures(tmp_path / "x.tar")
    assert all_captions(found) == {"x.tar/a.png": ("one",)}
    assert found.broken and set(found.broken) <= {"x.tar", "x.tar/z.png"}


def test_shards_that_are_none_are_named(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", {"a.png": PNG})
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as shard:
        shard.add(tmp_path / "a.tar", "a.png")
    (tmp_path / "gone.tar").symlink_to("none.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    found = open_pictures(tmp_path)
    assert names(found) == ["a.tar/a.png"]
    assert "it is compressed: unpack it" in found.broken["packed.tar"]
    assert "a link to what is not there" in found.broken["gone.tar"]
    assert "it is no regular file" in found.broken["pipe.tar"] and len(found.broken) == 3


# The index


@pytest.mark.parametrize(
    "change",
    [
        lambda index, row, scan: [],
        lambda index, row, scan: {"version": index["version"]},
        lambda index, row, scan: index | {"pictures": []},
        lambda index, row, scan: index | {"pictures": {"x.tar/a.png": {"a": 1, "b": 2}}},
        lambda index, row, scan: index | {"pictures": {"x.tar/a.png": [*row, 5]}},
        lambda index, row, scan: index | {"pictures": {"x.tar/a.png": [row[0], 6, -8, row[3]]}},
        lambda index, row, scan: index | {"shards": {"x.tar": {"stamp": scan["stamp"], "column": "text"}}},
        lambda index, row, scan: index | {"shards": {"x.tar": scan | {"members": [["a", ["x"], -5, 10]]}}},
        lambda index, row, scan: index | {"shards": {"x.tar": scan | {"members": [["a", ["x"], 0, 2**40]]}}},
        lambda index, row, scan: index | {"shards": {"x.tar": scan | {"members": [["a", "x", 0, 10]]}}},
    ],
)
def test_an_index_of_another_making_is_built_anew(tmp_path: Path, change: Any) -> None:
    tar_of(tmp_path / "x.tar", {"a.png": PNG, "a.txt": "one"})
    path = tmp_path / "index.json"
    items = open_pictures(tmp_path / "x.tar", index=path).items
    whole = path.read_text()
    index = json.loads(whole)
    path.write_text(json.dumps(change(index, index["pictures"]["x.tar/a.png"], index["shards"]["x.tar"])))
    assert open_pictures(tmp_path / "x.tar", index=path).items == items
    assert path.read_text() == whole


def test_the_scan_of_a_tar_reads_its_headers_alone(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {"a.png": PNG, "a.txt": "one"})
    found = tar.members_of(path)
    offset, size = found.places["a.png"]
    assert tar.read_at(path, offset, size) == PNG and found.damage is None and not found.odd
