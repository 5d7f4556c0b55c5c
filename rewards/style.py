"""Style of a response: what scores 0 whatever the answer is.

    mixed_languages   a paragraph of 50 or more Chinese characters, and one of 200 or more English words
    repetition        the same 50 characters ten times, without overlap
    boxed             a box anywhere in a response where nothing can be verified (data for a reward model)

A run of one short word or character must be 25 times as long as a window, because lists of a few equal words are
normal text. Lines of tables do not count.
"""

from __future__ import annotations

import re

from rewards.answer import has_box
from rewards.verdict import Verdict

CHINESE_CHARACTERS = 50
ENGLISH_WORDS = 200
WINDOW = 50
REPETITIONS = 10
_SHORT_PERIOD = 8  # characters; the sentences of "I see a dog. I see a dog. ..." are longer
_SHORT_REPETITIONS = 25
_MAX_CHARACTERS = 400_000  # that are looked at

REASONS = ("mixed_languages", "repetition", "boxed")

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_ENGLISH = re.compile(r"\b[A-Za-z]{2,}\b")
_PARAGRAPH = re.compile(r"\n\s*\n")
# [^\S\n]: a pattern that crossed lines would look at all empty lines again from each of them
_TABLE_LINE = re.compile(
    r"^[^\S\n]*\|.*\|[^\S\n]*$|^.*(?:\t.*){2,}$|^[^\S\n]*</?t(?:able|head|body|r|d|h)\b.*$", re.MULTILINE
)
_RULE = re.compile(r"([=|~_#*.%\-－█─\s])\1{3,}")


def style_verdict(thought: str, text: str, verifiable: bool = True) -> Verdict | None:
    """Return a score of 0 with its reason, or None if nothing is wrong.

    Args:
        thought: What the model thought.
        text: What follows the thought.
        verifiable: Whether the data has an answer that can be verified: else a box is wrong.
    """
    if not verifiable and (has_box(thought) or has_box(text)):
        return Verdict(0.0, "boxed")
    whole = f"{thought}\n\n{text}"[:_MAX_CHARACTERS]
    if mixes_languages(whole):
        return Verdict(0.0, "mixed_languages")
    return Verdict(0.0, "repetition") if repeats(whole) else None


def mixes_languages(text: str) -> bool:
    """Return whether a text has a long Chinese and a long English paragraph. Quotations do not count."""
    if len(_CHINESE.findall(text)) < CHINESE_CHARACTERS:
        return False
    chinese = english = False
    for paragraph in _PARAGRAPH.split(text):
        words = len(_ENGLISH.findall(paragraph))
        english |= words >= ENGLISH_WORDS and words > len(_CHINESE.findall(paragraph))
        for line in paragraph.splitlines():
            characters = len(_CHINESE.findall(line))
            chinese |= characters >= CHINESE_CHARACTERS and characters > len(_ENGLISH.findall(line))
    return chinese and english


def repeats(text: str) -> bool:
    """Return whether the same window of characters occurs ten times, tables and rules of one character left aside."""
    text = _RULE.sub(r"\1", _TABLE_LINE.sub("", text))
    if len(text) < WINDOW * REPETITIONS:
        return False
    ends: dict[str, int] = {}  # window -> where its last occurrence ends
    counts: dict[str, int] = {}
    for start in range(len(text) - WINDOW + 1):
        window = text[start : start + WINDOW]
        end = ends.get(window)
        if end is None:
            ends[window] = start + WINDOW
        elif start >= end:
            ends[window] = start + WINDOW
            counts[window] = times = counts.get(window, 1) + 1
            if times >= REPETITIONS and (times >= _SHORT_REPETITIONS or not _has_short_period(window)):
                return True
    return False


def _has_short_period(window: str) -> bool:
    return any(window[period:] == window[:-period] for period in range(1, _SHORT_PERIOD + 1))
