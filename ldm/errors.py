"""Errors that a user can mend, and the hint that names what they probably meant."""

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
