"""The shards that a command is given: `shards/*` may have folders among them whose builds kept nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards.catalogue import NoShards, find_shards


def shards_of(given: Sequence[str], say: Callable[[str], None]) -> list[Path]:
    """The tars of folders, files and patterns; `say` is told of every folder that holds none. Raises DataError if a
    path or pattern stands for nothing, or all folders are empty."""
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
    return found
