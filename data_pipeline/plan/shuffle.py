"""The order of a source's samples: shards in random order, and rows in random order within a few shards at a time.

With SHARDS_TOGETHER = 2, the five shards a b c d e may be ordered  d b | e a | c : first all rows of d and b, mixed,
then all rows of e and a, mixed, then the rows of c. So reads stay within a few shards at any time, and memory holds the
row numbers of only a few shards.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np

SHARDS_TOGETHER = 16


class Shuffle:
    """An endless stream of rows, epoch after epoch; a function of seed, name and the shards' rows only.

    The random numbers depend on the source's name, not on its position in the mixture. So adding a source does not
    change the order of the others.

    Attributes:
        epoch_length: Rows per epoch.
    """

    def __init__(self, shard_rows: np.ndarray, *, seed: int, name: str) -> None:
        """Prepare the stream; nothing is shuffled yet.

        Args:
            shard_rows: int [shards + 1], the first row of every shard, then the number of rows.
            seed: Of the run.
            name: Of the source.
        """
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self._seed = (seed, zlib.crc32(name.encode()))
        self.epoch_length = int(self._shard_rows[-1])
        # While an epoch is read, the same two orders are asked for repeatedly.
        self._groups = lru_cache(maxsize=2)(self._shuffle_groups)
        self._rows = lru_cache(maxsize=2)(self._shuffle_rows)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Return int64 [count]: rows number start, start + 1 ... of the stream."""
        stretches = [np.empty(0, np.int64)]
        while count:
            epoch, offset = divmod(start, self.epoch_length)
            _, begins = self._groups(epoch)
            group = int(np.searchsorted(begins, offset, side="right")) - 1
            begin = offset - int(begins[group])
            stretch = self._rows(epoch, group)[begin : begin + count]
            stretches.append(stretch)
            start, count = start + len(stretch), count - len(stretch)
        return np.concatenate(stretches)

    def _shuffle_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's order of shards, and the offset in the epoch at which every group of them begins."""
        shards = self._rng(epoch).permutation(len(self._shard_rows) - 1)
        ends = np.cumsum(np.diff(self._shard_rows)[shards])
        begins = np.concatenate([[0], ends[SHARDS_TOGETHER - 1 :: SHARDS_TOGETHER]])
        return shards, begins

    def _shuffle_rows(self, epoch: int, group: int) -> np.ndarray:
        shards = self._groups(epoch)[0][group * SHARDS_TOGETHER : (group + 1) * SHARDS_TOGETHER]
        rows = np.concatenate([np.arange(self._shard_rows[shard], self._shard_rows[shard + 1]) for shard in shards])
        return self._rng(epoch, 1 + group).permutation(rows)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([*self._seed, *key]))
