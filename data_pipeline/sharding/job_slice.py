"""Which part of a build or curation one of several jobs does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline.errors import DataError

Work = TypeVar("Work")


@dataclass(frozen=True)
class JobSlice:
    """The tasks that one of several jobs does: those whose number is `index` modulo `count`. As text "3/8"."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"--part {self.index}/{self.count}: give 1 or more after the slash, as 0/1")
        if not 0 <= self.index < self.count:
            raise DataError(f"--part {self}: the first number is 0 to {self.count - 1}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, tasks: Sequence[Work]) -> Sequence[Work]:
        """Return this slice of `tasks`."""
        return tasks[self.index :: self.count]
