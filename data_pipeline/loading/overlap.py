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
    """Count the samples of `first` whose record, images and videos are, byte by byte, those of a sample of `second`.

    The larger set should be the second: its checksums are read part by part.
    """
    wanted = np.concatenate([np.zeros(0, np.uint64), *(part for source in first for part in source.checksums())])
    distinct, inverse = np.unique(wanted, return_inverse=True)
    found = np.zeros(len(distinct), bool)
    for source in second:
        for part in source.checksums():
            found |= np.isin(distinct, part)
    return int(found[inverse].sum())
