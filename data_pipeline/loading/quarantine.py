"""Samples that cannot be used: what takes their place, and when there are too many.

Replacement is a rule, not a draw. Where sample 7 of a source fails in room for 24 tokens, with padded lengths

    row             7   8   9  10  11 ...  (7 + NEIGHBOURS; the source's first row follows its last)
    padded length  24  32  16  24  24

row 10 takes its place: of the neighbours that fit, the longest, and of several equally long ones the nearest. If it
fails as well it is row 11, then row 9, and after ATTEMPTS of them the room stays padding. When a whole shard is
unreadable the search begins at the shard after it. Nothing but the index and the failures takes part, so every layout,
worker count and resumed run puts the same sample in the same place.
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
UNREADABLE_SHARD = "unreadable_shard"  # the reason that speaks of all samples of a shard
TOO_LONG = "too_long"  # the reason of samples that the plan has refused: not a sign of damage

# The rate is taken over at least so many samples, so that one bad sample at the start of a run does not end it.
GRACE_SAMPLES = 1000


class Neighbours(Protocol):
    """What the rule needs of a source (`source.Source`)."""

    lengths: np.ndarray  # int [samples]
    shard_rows: np.ndarray  # int64 [shards + 1]: first row of every shard


@dataclass(frozen=True)
class Failure:
    """A row of a source that could not be used."""

    row: int
    reason: str


def substitute(source: Neighbours, room: int, segment_multiple: int, failures: Sequence[Failure]) -> int | None:
    """The row to try in the place of failures[0], the later ones having been tried; None: leave the room as padding.

    room: tokens, a multiple of segment_multiple.
    """
    if len(failures) > ATTEMPTS:
        return None
    unreadable = [_shards_of(source, failure.row) for failure in failures if failure.reason == UNREADABLE_SHARD]
    first = int(source.shard_rows[unreadable[-1] + 1]) if unreadable else failures[0].row + 1
    samples = len(source.lengths)
    rows = (first + np.arange(min(NEIGHBOURS, samples))) % samples
    lengths = -(-source.lengths[rows].astype(np.int64) // segment_multiple) * segment_multiple
    possible = (lengths <= room) & ~np.isin(rows, [failure.row for failure in failures])
    possible &= ~np.isin(_shards_of(source, rows), unreadable)
    if not possible.any():
        return None
    return int(rows[np.where(possible, lengths, -1).argmax()])


def _shards_of(source: Neighbours, rows: np.ndarray | int) -> np.ndarray:
    return np.searchsorted(source.shard_rows, rows, side="right") - 1


def quarantine_record(reason: str, shard: str, key: str, detail: str, replaced_by: str = "") -> dict[str, Any]:
    """A line of quarantine.jsonl. replaced_by: "shard.tar/KEY", or nothing where padding took the place."""
    return {"reason": reason, "shard": shard, "key": key, "detail": detail, "replaced_by": replaced_by}


@dataclass
class Tally:
    """What a run has met so far, over all ranks. Part of the data state, so it survives a restart.

    samples: read or quarantined, substitutes included. reasons: quarantined ones by reason, those that the plan refused
    for their length left out.
    """

    samples: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, delivered: int, quarantined: Iterable[dict[str, Any]]) -> None:
        """delivered: samples of a global batch; quarantined: its lines of the quarantine."""
        new = Counter(record["reason"] for record in quarantined if record["reason"] != TOO_LONG)
        self.samples += delivered + new.total()
        self.reasons += new

    def check(self, max_fraction: float, quarantine: str) -> None:
        """Raises DataError when more than max_fraction of the samples were quarantined."""
        quarantined = self.reasons.total()
        if quarantined <= max_fraction * max(self.samples, GRACE_SAMPLES):
            return
        commonest = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(3))
        raise DataError(
            f"{quarantined} of the first {self.samples} samples could not be used ({commonest}), more than "
            f"data.max_quarantined_fraction {max_fraction:g} allows: mend what {quarantine} names, or allow more"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self.reasons = state["samples"], Counter(state["reasons"])
