"""The texts in picture files: PNG's chunks, and the EXIF of JPEG, WebP and AVIF."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.foreign import foreign, read_plain
from ldm.pictures import open_raster
from pipelines.infotext.texts import infotext_in
from pipelines.infotext.values import Infotext

_LONGEST = 2**22  # characters of one text: graphs of ComfyUI have a tenth of it
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")
_EXIF, _COMMENT = 0x8769, 0x9286  # the tags of EXIF's own part, and of UserComment in it
_MAKE, _MODEL = 0x010F, 0x0110  # where ComfyUI has "workflow:{...}" and "prompt:{...}"
_UNICODE = b"UNICODE\0"


def read_infotext(path: str | Path) -> Infotext:
    """Return what a picture says of how it was made. Raises UserError where it says nothing, or can't be read."""
    found = infotext_in(texts_of(path), path)
    if found is None:
        raise UserError(f"{path} says nothing of how it was made that is known here")
    return found


def texts_of(path: str | Path) -> dict[str, str]:
    """Return the texts in a picture file by keyword; of EXIF its UserComment is called `parameters`.

    Raises UserError for what is no picture of these kinds, or for a text of more than 4 million characters.
    """
    with foreign(path, "is no picture that can be read"):
        try:
            content = read_plain(path)
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file") from error
        picture = open_raster(content, _FORMATS)
        if picture.format == "PNG":
            picture.load()  # texts may also stand behind the pixels
        texts = {str(key): each for key, each in picture.info.items() if isinstance(each, str)}
        exif = picture.getexif()
        comment, tags = exif.get_ifd(_EXIF).get(_COMMENT), {tag: exif.get(tag) for tag in (_MAKE, _MODEL)}
    texts = _in_exif(comment, tags) | texts
    for key, text in texts.items():
        if len(text) > _LONGEST:
            raise UserError(
                f"{path}: its text {key[:40]!r} has {len(text):,} characters, where {_LONGEST:,} are the most"
            )
    return texts


def exif_of(text: str) -> bytes:
    """Return EXIF that holds a text as UserComment, in which JPEG and WebP have AUTOMATIC1111's parameters.

    To be saved with: `image.save(path, exif=exif_of(text))`. Raises UserError for what is no Unicode.
    """
    from PIL import Image

    try:
        encoded = text.encode("utf-16-be")
    except UnicodeEncodeError as error:
        raise UserError(f"the text {text[:60]!r} is not valid Unicode") from error
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_COMMENT] = _UNICODE + encoded
    return exif.tobytes()


def _in_exif(comment: Any, tags: Mapping[int, Any]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for each in tags.values():
        key, colon, text = each.partition(":") if isinstance(each, str) else ("", "", "")
        if colon and key.lower() in ("prompt", "workflow"):
            texts[key.lower()] = text
    if isinstance(comment, str):
        texts["parameters"] = comment
    elif isinstance(comment, bytes) and (text := _comment(comment)):
        texts["parameters"] = text
    return texts


def _comment(content: bytes) -> str:
    """The text of a UserComment: eight bytes that name its encoding, and what is encoded."""
    name, body = content[:8], content[8:]
    if name != _UNICODE:
        return (
            (body if name in (b"ASCII\0\0\0", bytes(8)) else content).decode("utf-8", "replace").strip("\0")
        )
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return body.decode("utf-16", "replace").strip("\0")
    # EXIF doesn't say which byte comes first. Of most texts the high bytes are zeros.
    little = body[1::2].count(0) > body[::2].count(0)
    return body.decode("utf-16-le" if little else "utf-16-be", "replace").strip("\0")
