"""What a filter is: a dataclass whose fields are its options, which answers keep (None) or a counted reason (a Drop).

A `Filter` judges one sample by itself. A `SetFilter` compares samples: it takes a small feature of each, and decides
when all features are there. One's own filter is a few lines, named in a recipe as `my_filters:Loud`:

    @dataclass
    class Loud(Filter):
        max_marks: int = 3

        def __call__(self, sample: Candidate) -> Drop | None:
            marks = sample.text.count("!")
            return Drop("loud", f"{marks} exclamation marks") if marks > self.max_marks else None
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from data_pipeline.curation.candidate import Candidate
from data_pipeline.errors import BadSample


@dataclass(frozen=True)
class Drop:
    """Why a sample goes. reason: a short fixed word to count by; detail: what exactly is wrong with this sample."""

    reason: str
    detail: str


@dataclass
class _Options(ABC):  # noqa: B024 - its two kinds have the abstract methods
    """What every filter can be told."""

    domains: list[str] = field(default_factory=list)  # the domains that are judged; empty: all
    report_only: bool = False  # what it would drop is listed and counted, but kept

    def check(self) -> None:  # noqa: B027 - most need none
        """Raises DataError for options that cannot work, before the first sample is read."""

    def judges(self, sample: Candidate) -> bool:
        return not self.domains or sample.domain in self.domains


@dataclass
class Filter(_Options):
    """Judges one sample by itself. What it learns of `check` or keeps between samples is its own affair: every process
    has its own copy, made from the options alone."""

    @abstractmethod
    def __call__(self, sample: Candidate) -> Drop | None:
        """None to keep the sample. A BadSample raised here drops it under its own reason."""

    def judge(self, samples: Sequence[Candidate]) -> list[Drop | None]:
        """The same for several samples at once; overridden where that is faster."""
        return [answer(self, sample) for sample in samples]


def answer(judge: Filter, sample: Candidate) -> Drop | None:
    """What a filter says of a sample, one that cannot be read counted like any other."""
    try:
        return judge(sample) if judge.judges(sample) else None
    except BadSample as error:
        return Drop(error.reason, error.detail)


class Survivors(Protocol):
    """The samples that reached a SetFilter, in order: shard by shard as they were given, as they lie in each."""

    def chunks(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        """(rows int64 [m] in ascending order, their features [m]), a shard at a time. Samples without a feature, which
        the filter does not judge, are left out."""
        ...

    def name(self, row: int) -> str:
        """SHARD/KEY of a sample."""
        ...

    def text(self, row: int) -> str:
        """Candidate.text of a sample, read again from its shard."""
        ...


@dataclass
class SetFilter(_Options):
    """Judges samples by comparing them, in one process, with the features of all. Where samples repeat each other, the
    first of them is kept, so that the outcome depends on the order of samples alone."""

    # What Arrow stores of a sample.
    feature_type: ClassVar[pa.DataType]

    @abstractmethod
    def feature(self, sample: Candidate) -> Any:
        """What must be known of a sample; None if there is nothing to compare. A BadSample drops the sample."""

    @abstractmethod
    def decide(self, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
        """The rows that go."""
