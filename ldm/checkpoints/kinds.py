"""What a file of weights is, by its first bytes: names and endings are given by people, and promise nothing."""

import zipfile
from pathlib import Path
from typing import Literal

from ldm.checkpoints.paths import must_be_file, readable
from ldm.errors import UserError
from ldm.foreign import foreign

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_LARGEST_HEADER = 100_000_000  # bytes, of a safetensors file: the library's own bound
_OTHERS = {
    b"GGUF": "a GGUF file, for llama.cpp and its kin",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"RIFF": "a RIFF file: a picture, sound or film",
    b"GIF8": "a picture (GIF)",
    b"%PDF": "a PDF document",
}


def weights_kind(path: str | Path) -> Literal["safetensors", "pickle"]:
    """Return how the weights in a file are written, whatever the file's name says.

    Raises:
        UserError: no such file, an empty one, or one of another kind, which is named.
    """
    path = Path(path)
    must_be_file(path)
    with readable(path), path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path} is cut short or corrupt, get it again (it is empty)")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "pickle"
    if head.startswith(b"PK\x03\x04"):
        _must_hold_a_pickle(path)
        return "pickle"
    if what := _named(head):
        raise UserError(f"{path} holds no weights: it is {what}")
    if path.suffix in PICKLES:  # the oldest pickles have no mark of their own
        return "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise UserError(
        f"{path}: weights are read from .safetensors or {', '.join(PICKLES)} files only, and this is neither"
    )


def _named(head: bytes) -> str:
    """What a file with this beginning is; "" where that can't be told."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        page = b"<html" in text.lower() or b"<!doctype" in text.lower()
        kind = "a web page (HTML)" if page else "a text with tags (XML or HTML)"
        return f"{kind}, often of a login or of terms to accept: get the file itself"
    if text[:1] in (b"{", b"["):
        return f"JSON text, often a server's message: {text[:80].decode(errors='replace')!r}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if not head.strip(b"\0"):
        return "nothing but zeros at its beginning, a download that was not finished: get it again"
    return next((what for sign, what in _OTHERS.items() if head.startswith(sign)), "")


def _must_hold_a_pickle(path: Path) -> None:
    """Raise UserError for a whole zip archive that torch did not write; one that is cut short is torch's to judge."""
    with foreign(path, "is cut short or corrupt, get it again"):
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if not any(name.endswith("data.pkl") for name in names):
        some = ", ".join(names[:3]) or "nothing"
        raise UserError(
            f"{path} is a zip archive with {some} in it, and no checkpoint of PyTorch: unpack it first"
        )
