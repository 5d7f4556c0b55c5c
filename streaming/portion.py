"""The portions of work of a conversion, and what is written down about each that is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PORTION_BLOCKS = 16  # blocks of rows in a portion, or one parameter; what a killed conversion does again

Report = Callable[[int], None]  # takes the bytes that were written since the last call


class Portion(NamedTuple):
    """What one process writes at a time."""

    names: tuple[str, ...]
    nbytes: int


class Job(Protocol):
    """A conversion: portions that any process can write in any order, and what joins them."""

    portions: list[Portion]
    identity: dict[str, Any]  # of what is read and how it is written: another one starts from the beginning

    def begin(self, folder: Path) -> None:
        """Make what portions are written into. Called once."""

    def write(self, number: int, folder: Path, report: Report) -> Any:
        """Write a portion, flush it to disk, and return what `finish` needs to know, as JSON."""

    def finish(self, folder: Path, results: list[Any]) -> None:
        """Write what joins the portions."""


def grouped(sizes: Iterable[tuple[str, int]], most: int) -> Iterator[Portion]:
    """Group names with their bytes, in order, into portions of at most `most` bytes, but at least one name."""
    names: list[str] = []
    total = 0
    for name, nbytes in sizes:
        if names and total + nbytes > most:
            yield Portion(tuple(names), total)
            names, total = [], 0
        names.append(name)
        total += nbytes
    if names:
        yield Portion(tuple(names), total)
