"""How input files are called in reports and records: short, and the same wherever their folder lies."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=64)
def shown_names(paths: tuple[str, ...]) -> dict[str, str]:
    """Path -> its name below the folder that all of them share.

    shown_names(("/data/a/x.jsonl", "/data/b/x.jsonl"))  ->  {"/data/a/x.jsonl": "a/x.jsonl", ...: "b/x.jsonl"}
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    shared = os.path.commonpath([os.path.dirname(path) for path in absolute.values()])
    return {path: Path(os.path.relpath(full, shared)).as_posix() for path, full in absolute.items()}
