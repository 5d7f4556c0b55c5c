"""Say why a file could not be written, for error messages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PROBE_BYTES = 2**24


def free_space(path: Path) -> str:
    """Return "12.3 GB free at FOLDER" for the nearest existing folder of `path`."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    return f"{shutil.disk_usage(folder).free / 10**9:,.1f} GB free at {folder}"


def why_not_writable(folder: Path) -> str:
    """Return the cause that the system gives for not writing a file of 16 MiB into `folder`.

    For libraries that report a failed write without its cause.
    """
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        probe.unlink(missing_ok=True)
    return "a file could not be written"
