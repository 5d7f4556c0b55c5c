"""Files that are whole or not there: written under a temporary name, then renamed.

with replacing(folder / "funnel.png") as temporary:
    figure.savefig(temporary)

write_first(folder / "writer", "3/8")  ->  "3/8", or "5/8" if another process was first
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody else uses. What is written under it becomes `path` at the end; if there was an
    error it is removed, and what was at `path` stays."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_first(path: Path, text: str) -> str:
    """Writes a file in UTF-8 unless it is there, and tells what it then holds: of all processes and machines that do
    this at once, one has its way."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, path)  # unlike a rename it leaves what is there, and unlike open(path, "x") it is whole
    except FileExistsError:
        pass
    except OSError:  # no links here (exFAT, a bucket mounted as a folder), and no machines that share it
        if not path.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8")
