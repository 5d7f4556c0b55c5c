"""Find the shards that a command is given. `shards/*` may match folders whose builds kept nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards.catalogue import NoShards, find_shards


def shards_of(given: Sequence[str], say: Callable[[str], None]) -> list[Path]:
    """Return the tars of folders, files and patterns, each once.

    Args:
        given: Folders, .tar files and patterns.
        say: Called with a line about every folder that holds no tar.

    Raises:
        DataError: a path or pattern matches nothing, or all folders are empty.
    """
    found: list[Path] = []
    empty: list[str] = []
    for path in given:
        try:
            found += find_shards(path)
        except NoShards as error:
            if not Path(path).is_dir():
                raise
            empty.append(str(error))
    if not found:
        raise DataError("; ".join(empty))
    for line in empty:
        say(line)
    first: dict[Path, Path] = {}  # patterns and folders may overlap
    for tar in found:
        first.setdefault(tar.absolute(), tar)
    return list(first.values())
