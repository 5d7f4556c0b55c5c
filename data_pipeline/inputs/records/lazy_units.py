"""Units that are listed when they are asked for, so that the first one of a large file is there at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import overload

from data_pipeline.inputs.draft import Unit


class LazyUnits(Sequence[Unit]):
    """A sequence of units over an iterator. Its length, and indexing, list all of them."""

    def __init__(self, units: Iterator[Unit]) -> None:
        self._rest = units
        self._listed: list[Unit] = []
        self._list_one()  # what is wrong with the first file is raised at once

    def __iter__(self) -> Iterator[Unit]:
        """Yield the units in order, any number of times."""
        number = 0
        while number < len(self._listed) or self._list_one():
            yield self._listed[number]
            number += 1

    def __len__(self) -> int:
        """Return the number of all units."""
        self._listed.extend(self._rest)
        return len(self._listed)

    @overload
    def __getitem__(self, index: int) -> Unit: ...

    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...

    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        """Return one or several of all units."""
        self._listed.extend(self._rest)
        return self._listed[index]

    def _list_one(self) -> bool:
        """List one more unit. Returns whether there was one."""
        before = len(self._listed)
        self._listed.extend(islice(self._rest, 1))
        return len(self._listed) > before
