"""Input files: which there are, and how they are called in reports and records, wherever their folder lies."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=64)
def shown_names(paths: tuple[str, ...]) -> dict[str, str]:
    """Path -> its name below the folder that all of them share.

    shown_names(("/data/a/x.jsonl", "/data/b/x.jsonl"))  ->  {"/data/a/x.jsonl": "a/x.jsonl", ...: "b/x.jsonl"}
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    shared = os.path.commonpath([os.path.dirname(path) for path in absolute.values()])
    return {path: printable(Path(os.path.relpath(full, shared)).as_posix()) for path, full in absolute.items()}


def printable(text: str) -> str:
    """Text that can be written as UTF-8: bytes of a file name that are none, and halves of surrogate pairs, escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_stored(path: str) -> str:
    """A path as the disk spells it: é may be one character (NFC) or, as macOS stores names, two (NFD). The path
    itself if there is neither."""
    if path.isascii():
        return path
    spellings = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
    return next(filter(os.path.lexists, spellings), path)


def beside(path: Path, suffixes: Sequence[str]) -> Path | None:
    """The first file that is called as `path` is but for its suffix, which may be .txt, .TXT or .Txt."""
    spelled = (written for suffix in suffixes for written in (suffix, suffix.upper(), suffix.title()))
    named = (Path(as_stored(str(path.with_suffix(suffix)))) for suffix in spelled)
    return next(filter(Path.is_file, named), None)


def files_below(path: Path) -> Iterator[Path]:
    """All files in a folder and its folders that are not hidden. Links to folders are not followed."""
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))
