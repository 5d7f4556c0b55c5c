"""Drafts of samples, and the protocol of all input kinds.

An `Input` is a frozen dataclass of paths and options. It lists its units without reading them. It reads any unit alone,
in any process and any number of times, with the same result. This makes a build parallel, resumable and reproducible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

# Metadata of an option that names a folder of material for samples, such as fonts or backgrounds. A build describes
# the files of these folders, so that it is not resumed after they changed.
MATERIAL = {"material": True}


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


@dataclass(frozen=True)
class Rejected:
    """Something that did not become a sample, and why. See errors.BadSample."""

    origin: str  # where it comes from, as in Draft
    reason: str  # a short fixed word to count by
    detail: str  # what exactly is wrong


@dataclass(frozen=True)
class Unit:
    """A part of an input that is read alone."""

    path: str  # file or folder
    start: int = 0  # first byte, row, page or list index; each kind says what it counts
    stop: int = 0  # end of the range, exclusive
    bytes: int = 0  # approximate size of its samples in a shard, to cut tasks of equal size
    extra: dict[str, Any] = field(default_factory=dict)  # what else the kind needs to read it


class Input(Protocol):
    """One kind of input."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def units(self) -> Sequence[Unit]:
        """Return all units in order; the same list for the same files.

        Raises:
            DataError: There is nothing to read.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the samples of a unit in order. A bad sample is yielded as Rejected, it never raises."""
        ...
