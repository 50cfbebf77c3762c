"""CLIP's own cleaning of a text before its tokenizer (Radford et al. 2021, `simple_tokenizer.py`).

CLIP learnt from captions that were cleaned so, and knows no others: a typed apostrophe ("don’t"), full-width letters
or a caption copied from a web page (`&amp;`) are else tokens that it hardly ever saw. See docs/prompts.md.
"""

import html
import re
from collections.abc import Iterable


def clean(text: str, kept: Iterable[str] = ()) -> str:
    """Return the text as CLIP reads it: mended (ftfy), HTML entities undone twice, white space single, lower case.

    kept: words that stay as they are written, in any case: those of textual inversion, whose signs may mean something
    else in HTML, and of which a tokenizer may ask for capitals.
    """
    words = sorted(kept, key=len, reverse=True)  # the longest first, as tokenizers look for them
    if not words:
        return _clean(text)
    pieces = re.split(f"({'|'.join(map(re.escape, words))})", text, flags=re.IGNORECASE)
    return "".join(piece if k % 2 else _clean(piece) for k, piece in enumerate(pieces))


def _clean(text: str) -> str:
    import ftfy  # here, for it takes a while to import

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).lower()  # not stripped: what is next to a kept word stays apart from it
