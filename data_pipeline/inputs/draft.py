"""Drafts of samples, and the protocol of all input kinds.

An `Input` is a frozen dataclass of paths and options. It lists its units without reading them. It reads any unit alone,
in any process and any number of times, with the same result. This makes a build parallel, resumable and reproducible.

Everything in an input is accounted for. `given` counts the items of a unit, by level: {"rows": 100}. `read` says of
each item what became of it: it is part of a Draft, of a Rejected or of a NotRead. A build checks that the counts agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from data_pipeline.errors import BadSample

# Metadata of an option that names a folder of material for samples, such as fonts or backgrounds. A build describes
# the files of these folders, so that it is not resumed after they changed.
MATERIAL = {"material": True}

ONE_FILE, ONE_RECORD = {"files": 1}, {"records": 1}  # items of a draft that is all of a file or record


@dataclass(frozen=True)
class Media:
    """One image or video file as a shard will hold it."""

    extension: str  # without the dot, one of shards.members.IMAGE_EXTENSIONS or VIDEO_EXTENSIONS
    data: bytes  # content of the file


@dataclass(frozen=True)
class Draft:
    """A sample before it is checked and written to a shard."""

    record: dict[str, Any]  # becomes KEY.json: `domain`, `text` or `messages`, and other known fields (see domains/)
    images: Sequence[Media] = ()  # in the order of their placeholders
    videos: Sequence[Media] = ()  # in the order of their placeholders
    origin: str = ""  # where it comes from, for reports: "captions.jsonl:17", "paper.pdf#page=3"
    # The items that it is made of, by level: {"rows": 1}, {"members": 3}, {"records": 1, "messages": 4}
    items: Mapping[str, int] = field(default_factory=dict, compare=False)
    # Items at levels that `Input.given` does not count, such as the messages of the record as it was given
    given: Mapping[str, int] = field(default_factory=dict, compare=False)
    # What of its items is in no sample, by name: {"part key detail": 1}
    not_read: Mapping[str, int] = field(default_factory=dict, compare=False)
    # What became of a name of the input that the record does not have: {"column img": "images"}
    read_as: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Rejected:
    """Something that did not become a sample, and why. See errors.BadSample."""

    origin: str  # where it comes from, as in Draft
    reason: str  # a short fixed word to count by
    detail: str  # what exactly is wrong
    items: Mapping[str, int] = field(default_factory=dict, compare=False)  # as in Draft
    given: Mapping[str, int] = field(default_factory=dict, compare=False)  # as in Draft


@dataclass(frozen=True)
class NotRead:
    """Items of an input that its kind does not read, or a named part of them."""

    name: str  # to count by: "member .cls", "column img (binary)"
    count: int = 1
    items: Mapping[str, int] = field(default_factory=dict)  # as in Draft; empty: parts of items that are read


@dataclass(frozen=True)
class Unit:
    """A part of an input that is read alone."""

    path: str  # file or folder
    start: int = 0  # first byte, row, page or list index; each kind says what it counts
    stop: int = 0  # end of the range, exclusive
    bytes: int = 0  # approximate size of its samples in a shard, to cut tasks of equal size
    extra: dict[str, Any] = field(default_factory=dict)  # what else the kind needs to read it


def credited(found: Iterable[Draft | Rejected], items: Mapping[str, int]) -> Iterator[Draft | Rejected]:
    """Yield what was read of some items. The last one accounts for them: what comes before it are parts of theirs."""
    last: Draft | Rejected | None = None
    try:
        for entry in found:
            if last is not None:
                yield last
            last = entry
    except BadSample:
        if last is not None:
            yield last
        raise
    if last is not None:
        yield replace(last, items={**last.items, **items})


@runtime_checkable
class ReadsFirst(Protocol):
    """An input whose units are so large that a dry run must not read one completely."""

    def read_first(self, unit: Unit, count: int) -> Iterator[Draft | Rejected | NotRead]:
        """Yield what `read` yields, of the first `count` items of a unit alone."""
        ...


class Input(Protocol):
    """One kind of input."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the files and folders that it reads."""
        ...

    def units(self) -> Sequence[Unit]:
        """Return all units in order; the same list for the same files.

        Raises:
            DataError: There is nothing to read.
        """
        ...

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the items of a unit by level, without reading its samples: {"rows": 100}."""
        ...

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield the samples of a unit in order. A bad sample is yielded as Rejected, it never raises."""
        ...
