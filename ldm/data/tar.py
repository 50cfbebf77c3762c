"""The headers of a tar file, which may be damaged or lie."""

import posixpath
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ldm.data.listing import why

_BLOCK = 512  # bytes; a tar file is made of these
_LONGEST = 2**20  # bytes of a header that holds a long name
_HOPS = 40  # links to links


@dataclass
class Members:
    """The members of a tar file.

    places: (offset, size) of the content of every plain file, in the tar's order, by name; of links within the file,
    those of what they lead to. odd: reason by name of other members. twice: names that a later member took over.
    damage: None where all was read; else why not, "" where a header is none.
    """

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    damage: str | None = None


def members_of(path: Path) -> Members:
    """Read a plain tar file's headers. Raises OSError where it can't be opened."""
    found, links = Members(), dict[str, str]()
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        try:
            headers: Any = _Headers(file)
            with tarfile.open(fileobj=headers, mode="r:") as shard:
                for member in shard:
                    if shard.offset <= end:  # where the next header is: tarfile would go round for ever
                        raise tarfile.ReadError(f"{member.name} claims a size of {member.size} bytes")
                    end = shard.offset
                    _take(member, found, links, size)
            # tarfile takes a header that is no header for the end, unless it is the first.
            if read_at(path, end, _BLOCK).strip(b"\0"):
                found.damage = ""
        except MemoryError:  # says nothing of the file
            raise
        except Exception as error:  # tarfile may stumble over damaged headers in any way
            file.seek(0)
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
            found.damage = "it is compressed: unpack it to a plain .tar" if packed else why(error)
    _resolve(found, links)
    return found


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Read bytes of a file; fewer where it ends before."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


class _Headers:
    """A file as tarfile sees it, which reads as much as a header says, and a header may say anything."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self.file.read(size)


def _take(member: tarfile.TarInfo, found: Members, links: dict[str, str], size: int) -> None:
    """Note one member; a later one of the same name takes the place of an earlier, as in unpacking."""
    name = member.name
    if member.isdir():
        return
    if name in found.places or name in links or name in found.odd:
        found.twice.append(name)
        for each in (found.places, links, found.odd):
            each.pop(name, None)
    if member.issym():
        links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
    elif member.islnk():
        links[name] = member.linkname
    elif not member.isreg() or member.issparse():
        found.odd[name] = "it is no plain file"
    elif member.offset_data + member.size > size:
        found.odd[name] = f"truncated: its {member.size:,} bytes reach over the end of the shard"
    else:
        found.places[name] = member.offset_data, member.size


def _resolve(found: Members, links: dict[str, str]) -> None:
    """Give links the places of the plain files that they lead to."""
    places = {posixpath.normpath(name): place for name, place in found.places.items()}
    onward = {posixpath.normpath(name): posixpath.normpath(target) for name, target in links.items()}
    for name in links:
        target, hops = posixpath.normpath(name), 0
        while target in onward and hops < _HOPS:
            target, hops = onward[target], hops + 1
        if target in places:
            found.places[name] = places[target]
        else:
            found.odd[name] = "it is a link to what is not in the shard"
