"""A sample on its way into a shard, and what every kind of input answers.

An `Input` is a frozen dataclass of paths and options. It lists its units without reading them, and reads any of them
alone, in any process and as often as is asked, always with the same outcome: that is what makes sharding parallel,
resumable and reproducible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

# Metadata of an option that names a folder of what samples are made with: fonts, backgrounds. A build describes its
# files, so that one that goes on after they were changed is refused.
MATERIAL = {"material": True}


@dataclass(frozen=True)
class Media:
    """One picture or clip as it will lie in the shard. extension: `jpg`, `png`, `mp4` ... (shards.IMAGE_EXTENSIONS)."""

    extension: str
    data: bytes


@dataclass(frozen=True)
class Draft:
    """record: what becomes KEY.json (`domain`, `text` or `messages`, whatever else is known; see domains/).
    origin: where it comes from, for reports and provenance: "captions.jsonl:17", "paper.pdf#page=3"."""

    record: dict[str, Any]
    images: Sequence[Media] = ()
    videos: Sequence[Media] = ()
    origin: str = ""


@dataclass(frozen=True)
class Rejected:
    """Something that did not become a sample, and why: see errors.BadSample."""

    origin: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Unit:
    """A part of an input that is read alone. What start and stop count is the input's affair: bytes, rows, pages,
    places in a list. bytes: roughly what its samples will take in a shard, to cut tasks of equal size."""

    path: str
    start: int = 0
    stop: int = 0
    bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Input(Protocol):
    """One kind of input."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def units(self) -> Sequence[Unit]:
        """All units in order; the same list for the same files. Raises DataError if there is nothing to read."""
        ...

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """The samples of a unit in order. What is wrong with one of them is a Rejected, never an exception."""
        ...
