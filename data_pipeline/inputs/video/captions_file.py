"""Which file beside a video has its captions.

street.mp4 with street.srt, street.vtt or street.txt: the first that exists
street.mp4 with street.en.vtt or street.zh-Hans.srt: the only language, or the one that is asked for
"""

from __future__ import annotations

import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from data_pipeline.errors import BadSample
from data_pipeline.inputs.names import beside
from data_pipeline.inputs.video.subtitles import NOT_READ, SUFFIXES

CAPTION_SUFFIXES = (*SUFFIXES, ".txt")  # the first file that exists is used
# A language as BCP 47 writes it, with what programs add to it: en, zh-Hans, pt_BR, en-orig, en.forced
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][a-z0-9]{2,8})*(?:\.(?:forced|sdh|cc|hi|auto|default))?", re.IGNORECASE)


def choose_captions(video: Path, language: str) -> Path:
    """Return the caption file of a video.

    Args:
        video: Its path.
        language: Of its subtitles; empty: NAME.srt and the like, or the only language.

    Raises:
        BadSample: missing_caption or several_languages.
    """
    own = beside(video, CAPTION_SUFFIXES)
    if own is not None and not language:
        return own
    languages = _languages(video)
    found = {name: path for name, path in languages.items() if _is(name, language)}
    exact = next((path for name, path in found.items() if name == language.lower()), None)
    if exact is not None or len(found) == 1:
        return exact or next(iter(found.values()))
    if found:
        options = " or ".join(f"--set language={name}" for name in sorted(found))
        raise BadSample("several_languages", f"subtitles of {video.name}: choose one with {options}")
    if language:
        others = [*([own.name] if own is not None else []), *(path.name for path in languages.values())]
        beside_it = f"; beside it: {', '.join(sorted(others))}" if others else ""
        raise BadSample("missing_caption", f"no {video.stem}.{language}.srt or .vtt is beside the video{beside_it}")
    unread = beside(video, NOT_READ)
    hint = f"; {unread.name} is not read: ffmpeg -i {unread.name} {video.stem}.srt" if unread is not None else ""
    raise BadSample("missing_caption", f"no {video.stem}{' or '.join(CAPTION_SUFFIXES)} is beside the video{hint}")


def _is(name: str, language: str) -> bool:
    wanted = language.lower()
    return not wanted or name == wanted or name.startswith((f"{wanted}-", f"{wanted}_", f"{wanted}."))


def _languages(video: Path) -> dict[str, Path]:
    """Return the subtitles NAME.LANGUAGE.srt and .vtt of a video by their language, in lower case."""
    named = _subtitles(str(video.parent), os.stat(video.parent).st_mtime_ns).get(_composed(video.stem), {})
    return {language: video.parent / name for language, name in named.items()}


@lru_cache(maxsize=8)
def _subtitles(folder: str, _changed: int) -> dict[str, dict[str, str]]:
    """Return the subtitles of a folder by the name before their language, and by their language."""
    found: dict[str, dict[str, str]] = {}
    for suffix in SUFFIXES:
        for name in sorted(os.listdir(folder)):
            if not name.lower().endswith(suffix):
                continue
            stem = _composed(name[: -len(suffix)])
            for dot in (match.start() for match in re.finditer(r"\.", stem)):
                if _LANGUAGE.fullmatch(language := stem[dot + 1 :]):
                    found.setdefault(stem[:dot], {}).setdefault(language.lower(), name)
    return found


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
