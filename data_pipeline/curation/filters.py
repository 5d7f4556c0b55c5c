"""The two types of filters. A filter is a dataclass whose fields are its options. It keeps a sample or gives a reason.

A `Filter` judges one sample alone. A `SetFilter` compares samples: it takes a small feature of each, and decides when
all features are known. A user's own filter is a few lines, named in a recipe as `my_filters:Loud`:

    @dataclass
    class Loud(Filter):
        max_marks: int = 3

        def __call__(self, sample: Candidate) -> Filtered | None:
            marks = sample.text.count("!")
            return Filtered("loud", f"{marks} exclamation marks") if marks > self.max_marks else None
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from data_pipeline.curation.candidate import Candidate
from data_pipeline.errors import BadSample, DataError


@dataclass(frozen=True)
class Filtered:
    """Why a sample is filtered."""

    reason: str  # a short fixed word to count by
    detail: str  # what exactly is wrong with this sample


@dataclass
class _Options(ABC):  # noqa: B024 - Filter and SetFilter have the abstract methods
    """The options of every filter."""

    domains: list[str] = field(default_factory=list)  # the domains that are judged; empty: all
    report_only: bool = False  # list and count samples, but keep them

    def check(self) -> None:  # noqa: B027 - most filters have nothing to check
        """Raise DataError for options that cannot work, before the first sample is read."""

    def judges(self, sample: Candidate) -> bool:
        """Return whether the filter judges samples of this domain."""
        return not self.domains or sample.domain in self.domains


def check_shares(name: str, shares: Mapping[str, float]) -> None:
    """Raise DataError unless every one of a filter's options is a share: 30 for 30% would filter nothing, or all."""
    for option, share in shares.items():
        if not 0 <= share <= 1:
            raise DataError(f"{name}.{option} is {share:g}: give a share from 0 to 1")


@dataclass
class Filter(_Options):
    """Judges one sample alone.

    A filter may keep values between samples; each process has its own copy, made from the options alone.
    """

    @abstractmethod
    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None to keep it. A BadSample filters it under its own reason."""

    def judge(self, samples: Sequence[Candidate]) -> list[Filtered | None]:
        """Judge several samples. Override this where it is faster for many at once."""
        return [judge_sample(self, sample) for sample in samples]


def judge_sample(judge: Filter, sample: Candidate) -> Filtered | None:
    """Return a filter's answer about a sample. A BadSample becomes a Filtered."""
    try:
        return judge(sample) if judge.judges(sample) else None
    except BadSample as error:
        return Filtered(error.reason, error.detail)


class RemainingSamples(Protocol):
    """The samples that reached a SetFilter, in order: shard by shard as given, and as stored in each shard."""

    def chunks(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        """Yield (rows int64 [m], ascending; features [m]) of one shard at a time.

        Samples without a feature, which the filter does not judge, are not included.
        """
        ...

    def name(self, row: int) -> str:
        """Return SHARD/KEY of a sample."""
        ...

    def text(self, row: int) -> str:
        """Return the text of a sample (Candidate.text), read again from its shard."""
        ...


@dataclass
class SetFilter(_Options):
    """Judges samples by comparing them, in one process, by the features of all samples.

    Of samples that repeat each other the first one is kept, so the result depends on the order of samples alone.
    """

    feature_type: ClassVar[pa.DataType]  # Arrow's type of a feature

    @abstractmethod
    def feature(self, sample: Candidate) -> Any:
        """Return the feature of a sample, or None if there is nothing to compare. A BadSample filters the sample."""

    @abstractmethod
    def decide(self, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
        """Yield the rows to filter, with reasons."""
