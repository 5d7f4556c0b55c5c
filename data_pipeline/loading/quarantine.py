"""Samples that cannot be used: which sample replaces them, and when there are too many.

The replacement follows a rule, without random numbers. Suppose sample 7 of a source fails, in a segment of 24 tokens,
and padded lengths are

    row             7   8   9  10  11 ...  (7 + NEIGHBOURS; the source's first row follows its last)
    padded length  24  32  16  24  24

Row 10 replaces it: of the neighbours that fit, the longest, and of several equally long ones the nearest. If row 10
fails as well, it is row 11, then row 9; after ATTEMPTS replacements the segment stays padding. If a whole shard is
unreadable, the search begins at the shard after it. Only the index and the failures take part, so every layout, worker
count and resumed run puts the same sample in the same place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import DataError

NEIGHBOURS = 256
ATTEMPTS = 3
UNREADABLE_SHARD = "unreadable_shard"  # the reason that applies to all samples of a shard
TOO_LONG = "too_long"  # the reason of samples that the plan does not use; not a sign of damage
GRACE_SAMPLES = 1000  # the fraction is of at least this many samples, so one bad sample at the start does not end a run


class Neighbours(Protocol):
    """What the rule needs of a source (`source.Source`)."""

    lengths: np.ndarray  # int [samples]
    shard_rows: np.ndarray  # int64 [shards + 1], first row of every shard, then the number of rows


@dataclass(frozen=True)
class Failure:
    """A sample of a source that could not be used."""

    row: int  # of the sample in its source
    reason: str  # as in BadSample


def substitute(source: Neighbours, space: int, segment_multiple: int, failures: Sequence[Failure]) -> int | None:
    """Choose the sample to try in place of one that failed.

    Args:
        source: The source of all of these samples.
        space: Tokens of the segment, a multiple of segment_multiple.
        segment_multiple: Segments are padded to a multiple of this.
        failures: The sample of the plan, then the replacements tried so far.

    Returns:
        A row of the source, or None: leave the segment as padding.
    """
    if len(failures) > ATTEMPTS:
        return None
    unreadable = [_shards_of(source, failure.row) for failure in failures if failure.reason == UNREADABLE_SHARD]
    first = int(source.shard_rows[unreadable[-1] + 1]) if unreadable else failures[0].row + 1
    samples = len(source.lengths)
    rows = (first + np.arange(min(NEIGHBOURS, samples))) % samples
    lengths = -(-source.lengths[rows].astype(np.int64) // segment_multiple) * segment_multiple
    possible = (lengths <= space) & ~np.isin(rows, [failure.row for failure in failures])
    possible &= ~np.isin(_shards_of(source, rows), unreadable)
    if not possible.any():
        return None
    return int(rows[np.where(possible, lengths, -1).argmax()])


def _shards_of(source: Neighbours, rows: np.ndarray | int) -> np.ndarray:
    return np.searchsorted(source.shard_rows, rows, side="right") - 1


@dataclass
class Tally:
    """The samples that a run has read and quarantined so far, over all ranks. Saved with the data state."""

    samples: int = 0  # read or quarantined, replacements included
    reasons: Counter[str] = field(default_factory=Counter)  # quarantined samples by reason, without those too long

    def add(self, delivered: int, quarantined: Iterable[dict[str, Any]]) -> None:
        """Count one step.

        Args:
            delivered: Samples in the global batch.
            quarantined: The lines of quarantine.jsonl of the global batch.
        """
        new = Counter(record["reason"] for record in quarantined if record["reason"] != TOO_LONG)
        self.samples += delivered + new.total()
        self.reasons += new

    def check(self, max_fraction: float, quarantine: str) -> None:
        """Stop a run that quarantines too many samples.

        Args:
            max_fraction: data.max_quarantined_fraction.
            quarantine: The path of quarantine.jsonl, for the message.

        Raises:
            DataError: More than max_fraction of the samples were quarantined.
        """
        quarantined = self.reasons.total()
        if quarantined <= max_fraction * max(self.samples, GRACE_SAMPLES):
            return
        most_common = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(3))
        raise DataError(
            f"{quarantined} of the first {self.samples} samples could not be used ({most_common}), more than "
            f"data.max_quarantined_fraction {max_fraction:g} allows: fix the samples listed in {quarantine}, or raise "
            "data.max_quarantined_fraction"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as JSON types."""
        return {"samples": self.samples, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts from `state_dict`."""
        self.samples, self.reasons = state["samples"], Counter(state["reasons"])
