"""Input files: how they are found, and their names in reports and records, independent of the absolute path."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from data_pipeline.errors import DataError

SKIPPED_FOLDERS = ("hidden folder", "link to a folder")  # counted, but their files are not


@lru_cache(maxsize=64)
def shown_names(paths: tuple[str, ...]) -> dict[str, str]:
    """Return the name of each path relative to the deepest folder that contains all of them.

    shown_names(("/data/a/x.jsonl", "/data/b/x.jsonl"))  ->  {"/data/a/x.jsonl": "a/x.jsonl", ...: "b/x.jsonl"}
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    shared = os.path.commonpath([os.path.dirname(path) for path in absolute.values()])
    return {path: printable(Path(os.path.relpath(full, shared)).as_posix()) for path, full in absolute.items()}


def printable(text: str) -> str:
    """Return text that UTF-8 can encode: surrogates, and bytes of a file name that are not UTF-8, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_stored(path: str) -> str:
    """Return a path as the disk spells it, or the path itself if it does not exist.

    An accented letter such as é is one character in NFC and two in NFD, which macOS writes.
    """
    if path.isascii():
        return path
    spellings = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
    return next(filter(os.path.lexists, spellings), path)


def beside(path: Path, suffixes: Sequence[str]) -> Path | None:
    """Return the first existing file with the name of `path` and one of the suffixes (.txt, .TXT or .Txt), or None."""
    spelled = (written for suffix in suffixes for written in (suffix, suffix.upper(), suffix.title()))
    named = (Path(as_stored(str(path.with_suffix(suffix)))) for suffix in spelled)
    return next(filter(Path.is_file, named), None)


def files_below(path: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, hidden ones excepted. Links to folders are not followed.

    Raises:
        DataError: A folder may not be read.
    """
    for folder, folders, files in os.walk(path, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def skipped_below(path: str) -> Counter[str]:
    """Count the folders and files that `files_below` does not yield: SKIPPED_FOLDERS and "hidden file"."""
    skipped: Counter[str] = Counter()
    for folder, folders, files in os.walk(path, onerror=_raise):
        shown = [name for name in folders if not name.startswith(".")]
        skipped["hidden folder"] += len(folders) - len(shown)
        skipped["link to a folder"] += sum(os.path.islink(os.path.join(folder, name)) for name in shown)
        skipped["hidden file"] += sum(name.startswith(".") for name in files)
        folders[:] = shown
    return +skipped


def _raise(error: OSError) -> None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):  # the caller says what is wrong with its path
        return
    raise DataError(f"{error.filename} cannot be read ({error.strerror}): allow it, or move the folder away") from error


def count_by_suffix(files: Iterable[Path]) -> dict[str, int]:
    """Count files as accounts name them: {"file .log": 3, "file LICENSE": 1}."""
    return dict(sorted(Counter(f"file {path.suffix.lower() or path.name}" for path in files).items()))
