"""Subtitle files: SubRip (.srt) and WebVTT (.vtt), and rolling captions.

Live captions, such as those that YouTube makes, roll: a cue repeats the lines before it and adds one.

    0.00 - 1.50   so today we                    0.00 - 1.50   so today we
    1.50 - 1.51   so today we             ->
    1.51 - 3.00   so today we / look at tar      1.51 - 3.00   look at tar
    3.00 - 3.01   look at tar
    3.01 - 4.90   look at tar / files and more   3.01 - 4.90   files and more
"""

from __future__ import annotations

import codecs
import html
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from data_pipeline.errors import BadSample

SUFFIXES = (".srt", ".vtt")
NOT_READ = (".ass", ".ssa", ".ttml", ".dfxp", ".sbv", ".lrc", ".sub", ".smi")  # subtitles that FFmpeg converts to .srt

_ARROW = "-->"
_TIME = re.compile(r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,6}))?(?!\d)")
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|<[\d:.]+>|\{\\[^{}]*\}")  # <i>, <c.yellow>, <v Bob>, <00:00:01.000>, {\an8}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
ADJACENT = 0.1  # seconds at most from the end of a rolling cue to the next one, which may begin before

Cue = dict[str, Any]  # "start" and "end" in seconds (None: cannot be read), "text"


def read_subtitles(data: bytes, suffix: str) -> list[Cue]:
    """Return the cues of a file in order, without markup: [{"start": seconds, "end": seconds, "text": str}, ...].

    Nothing is checked: a cue may end before it starts, and its text may be empty.

    Args:
        data: The subtitle file, in UTF-8, or in UTF-16 with a byte order mark.
        suffix: One of SUFFIXES.

    Raises:
        BadSample: bad_subtitles.
    """
    lines = [line.rstrip() if line.strip() else line for line in re.split(r"\r\n|\r|\n", _decoded(data, suffix))]
    starts = [number for number, line in enumerate(lines) if _ARROW in line]
    cues: list[Cue] = []
    for start, following in pairwise([*starts, len(lines)]):
        text = lines[start + 1 : following]
        if suffix == ".vtt":  # what follows an empty line is the next cue's identifier, a note or a style
            text = text[: text.index("")] if "" in text else text
        elif following < len(lines) and text and text[-1].strip().isdecimal():  # the number of the next cue
            text = text[:-1]
        begin, _, end = lines[start].partition(_ARROW)
        plain = html.unescape(_MARKUP.sub("", "\n".join(text)))
        cues.append({"start": _seconds(begin), "end": _seconds(end), "text": plain.strip()})
    return cues


def unrolled(cues: Sequence[Cue]) -> tuple[list[Cue], int]:
    """Return each phrase of rolling captions once, and the number of cues that only repeat the one before.

    Cues that do not roll are returned unchanged: words may be said twice.
    """
    previous: list[str] = []
    new: list[list[str]] = []
    repeating = following = rolling = 0
    for number, cue in enumerate(cues):
        lines = [" ".join(line.split()) for line in cue["text"].split("\n") if line.strip()]
        added = _added(previous, lines)
        if number and _adjacent(cues[number - 1], cue):
            following += 1
            repeating += added != lines
            rolling += bool(added) and added != lines
        elif not added:  # the same words, some time later
            added = lines
        new.append(added)
        previous = lines
    if not rolling or 2 * repeating < following:
        return list(cues), 0
    kept = [{**cue, "text": "\n".join(added)} for cue, added in zip(cues, new, strict=True) if added or not cue["text"]]
    return kept, len(cues) - len(kept)


def _decoded(data: bytes, suffix: str) -> str:
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_subtitles", f"{suffix} is not UTF-8, nor UTF-16 with its mark: {error}") from error
    if "\0" in text:
        raise BadSample("bad_subtitles", f"{suffix} has NUL characters: convert it to UTF-8")
    return text


def _seconds(written: str) -> float | None:
    """Return the seconds of a time such as 01:02:03,5 or 02:03.500; None if there is none."""
    found = _TIME.match(written.strip())
    if found is None:
        return None
    hours, minutes, seconds, fraction = found.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction or 0}")


def _adjacent(cue: Cue, following: Cue) -> bool:
    end, start = cue["end"], following["start"]
    return end is not None and start is not None and start - end <= ADJACENT


def _added(previous: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Return what a cue adds to the lines of the one before it: lines, or words at the end of its last line."""
    for repeated in range(min(len(previous), len(lines)), 0, -1):
        if list(previous[-repeated:]) == list(lines[:repeated]):
            return list(lines[repeated:])
    last = len(previous) - 1
    grows = 0 <= last < len(lines) and list(previous[:last]) == list(lines[:last])
    if grows and lines[last].startswith(f"{previous[last]} "):
        return [lines[last][len(previous[last]) + 1 :], *lines[last + 1 :]]
    return list(lines)
