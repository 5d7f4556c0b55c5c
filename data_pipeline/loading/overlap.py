"""Which shards and samples two sets of sources share, from their indexes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.loading.source import Source


class SharedShard(NamedTuple):
    """A shard that is in two sets of sources, perhaps under two names."""

    name: str  # in the first set
    other_name: str  # in the second set
    other_source: str  # label of the source in the second set


def shared_shards(first: Sequence[Source], second: Sequence[Source]) -> list[SharedShard]:
    """Return the shards of `first` that are also in `second`, wherever they lie and whatever their names are."""
    others = {shard.header.tar_fingerprint: (shard.name, source.label) for source in second for shard in source.shards}
    return [
        SharedShard(shard.name, *others[shard.header.tar_fingerprint])
        for source in first
        for shard in source.shards
        if shard.header.tar_fingerprint in others
    ]


def shared_samples(first: Sequence[Source], second: Sequence[Source]) -> int:
    """Count the samples of `first` whose record, or one of whose images or videos, is also in `second`, byte by byte.

    The larger set should be the second: its checksums are read part by part.
    """
    parts = [part for source in first for part in source.checksums()]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *(checksums for checksums, _ in parts)]))
    if not len(wanted):
        return 0
    found = np.zeros(len(wanted), bool)
    for source in second:
        for checksums, _ in source.checksums():
            place = np.searchsorted(wanted, checksums).clip(max=len(wanted) - 1)
            found[place[wanted[place] == checksums]] = True
    count = 0
    for checksums, begins in parts:
        before = np.concatenate([[0], np.cumsum(found[np.searchsorted(wanted, checksums)])])
        count += int((np.diff(before[begins]) > 0).sum())
    return count
