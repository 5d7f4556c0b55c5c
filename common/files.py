"""Files that are complete or absent: written under a temporary name, flushed to disk, then renamed.

with replacing(folder / "funnel.png") as temporary:
    figure.savefig(temporary)

write_first(folder / "writer", "3/8")  ->  "3/8", or "5/8" if another process was first
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_WRITE_FAILED = (*FULL_DISK, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, and rename what was written there to `path` at the end.

    A reader sees the old file or the complete new one, also after a power cut. After an error the temporary file is
    removed and the old file stays. An error of a full disk, which has no file name of its own, gets that of `path`.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        name_file(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left of files in a folder that nobody writes to now."""
    for temporary in folder.glob("*.tmp"):
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, completely or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def name_file(error: OSError, path: Path) -> None:
    """Give an error of writing `path` its name, if it has none: write() alone does not know it."""
    if error.errno in _WRITE_FAILED and error.filename is None:
        error.filename = str(path)


def write_first(path: Path, text: str) -> str:
    """Write `text` to `path` in UTF-8 unless the file exists, and return what the file then holds.

    Of several processes and machines that call this at once, exactly one writes the file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync_file(temporary)
        os.link(temporary, path)  # unlike a rename it never replaces, and unlike open(path, "x") the file is complete
    except FileExistsError:
        pass
    except OSError:  # no hard links (exFAT, a bucket mounted as a folder): such a folder is not shared by machines
        if not path.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return path.read_text(encoding="utf-8")


def sync_file(path: Path) -> None:
    """Flush the content of a file to disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, so that a rename survives a power cut."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
