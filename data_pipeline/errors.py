"""Errors about data, and the record of one sample that was not used."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

REJECTED = "rejected.jsonl"  # written beside shards by `build` and `index`


class DataError(ValueError):
    """The data as a whole cannot be used. The message names the file or key and says how to fix it."""


class BadSample(DataError):
    """One sample cannot be used. It is counted under `reason`; a build rejects it, a training run quarantines it.

    Attributes:
        reason: A short fixed word to count by (`unreadable_image`, `extreme_aspect`, `media_mismatch` ...).
        detail: What exactly is wrong with this sample.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        # The default would call BadSample(message) with one argument when unpickled in another process.
        return type(self), (self.reason, self.detail)


class LostShard(BadSample):
    """A shard cannot be opened or read at all: no sample of it can be used."""


class Interrupted(DataError):
    """Something was not waited for any longer, because the run was asked to stop: a lost shard, or rollouts."""


class Unavailable(Exception):
    """A shard cannot be read now, but another attempt may succeed. The message says why."""


@dataclass(frozen=True)
class UnusedSample:
    """One sample that was not used: a line of rejected.jsonl, filtered.jsonl (and reported.jsonl) or quarantine.jsonl.

    A sample comes either from an input file (`origin`) or from a shard (`shard` and `key`).
    """

    reason: str  # a short fixed word to count by, as in BadSample
    detail: str  # what exactly is wrong with this sample
    origin: str | None = None  # its place in the input of a build: "captions.jsonl:17"
    shard: str | None = None  # its tar
    key: str | None = None  # its key in that tar; "" where the damage belongs to no key
    filter: str | None = None  # the filter of the recipe that removed or reported it
    step: int | None = None  # the training step that asked for it
    replaced_by: str | None = None  # the sample that took its place, "shard.tar/KEY"; "" if padding did

    def as_json(self) -> dict[str, Any]:
        """Return the line as a JSON object. Fields that are None are omitted."""
        return {name: value for name, value in asdict(self).items() if value is not None}
