"""Texts as verifiers compare them: Unicode's composed form, and a short answer without what says nothing.

"The Eiffel  Tower."   ->   "eiffel tower"         case, article, space, final stop
"**Paris**", "“Paris”" ->   "paris"                marks around the whole answer
"Ｂ"                   ->   "b"                    full-width letters, digits and signs
"""

from __future__ import annotations

import re
import unicodedata

MAX_MARKS = 30  # combining marks on one letter, as in Unicode's Stream-Safe Text Format
MAX_AROUND = 3  # marks inside marks: **"Paris"**
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_QUOTES = {ord(quote): "'" for quote in "‘’‛′`´"} | {ord(quote): '"' for quote in "“”„«»″"}
_AROUND = re.compile(r"([\"'*_$]{1,3})(.+)\1", re.DOTALL)  # quotes, Markdown's emphasis, LaTeX's $
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.IGNORECASE)
_STOPS = ".。!！,，;；:："


def has_many_marks(text: str) -> bool:
    """Return whether more than MAX_MARKS combining marks stand in a row.

    Unicode's normal forms take time that is quadratic in their number: 3 seconds of one core for 40,000 pairs of marks.
    """
    if text.isascii():
        return False
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MAX_MARKS:
            return True
    return False


def composed(text: str) -> str:
    """Return a text in NFC; as it is if it has many marks in a row."""
    return text if text.isascii() or has_many_marks(text) else unicodedata.normalize("NFC", text)


def half_width(text: str) -> str:
    """Return a text with ASCII for full-width forms: "［１，２］" -> "[1,2]"."""
    return text if text.isascii() else text.translate(_FULL_WIDTH)


def trimmed(text: str) -> str:
    """Return a short text without leading article, final stops, marks around it and superfluous space."""
    bare = half_width(composed(text)).translate(_QUOTES)
    bare = " ".join(bare.split()).rstrip(_STOPS + " ")
    for _ in range(MAX_AROUND):
        if not (found := _AROUND.fullmatch(bare)):
            break
        bare = found[2].strip().rstrip(_STOPS + " ")
    return bare[found.end() :] if (found := _ARTICLE.match(bare)) else bare


def plain(text: str) -> str:
    """Return `trimmed` without case."""
    return trimmed(text).casefold()
