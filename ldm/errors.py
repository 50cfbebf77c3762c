"""Errors that a user can mend, and the hint that names what they probably meant."""

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake the user can mend; the message is one line that says how.

    The command line prints it and exits with 2. Every other exception is a bug.
    """


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return ", did you mean X or Y?" with up to `n` of `known` close to `name`, or "" if none is close."""
    spelled: dict[str, str] = {}
    for each in known:
        spelled.setdefault(each.lower(), each)
    close = [spelled[match] for match in get_close_matches(name.lower(), spelled, n=n)]
    return f", did you mean {' or '.join(close)}?" if close else ""


def printable(text: str, encoding: str | None = None) -> str:
    """Return `text` on one line, fit for a terminal: control characters and what is no Unicode text are escaped.

    A file may hold a terminal's control codes in a name, and a name that is not UTF-8 comes as lone surrogates, which
    no encoding takes. Escapes are Python's, such as `\\x1b` and `\\udc83`. `encoding`: of the stream to print to;
    characters that it lacks are escaped too.
    """
    shown = "".join(each.encode("unicode_escape").decode() if _unprintable(each) else each for each in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding) if encoding else shown


def _unprintable(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")
