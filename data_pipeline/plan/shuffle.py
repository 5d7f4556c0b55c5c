"""The order of a source's samples: shards in a drawn order, and rows in a drawn order within a few shards at a time.

With SHARDS_TOGETHER = 2, five shards a b c d e might come as  d b | e a | c : first all rows of d and b, mixed, then
all rows of e and a, mixed, then those of c. So reads stay within a few shards at any time, and no more than the rows
of a few shards are ever held in memory.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np

SHARDS_TOGETHER = 16


class Shuffle:
    """An endless stream of rows, epoch after epoch; a function of seed, name and the shards' rows alone.

    shard_rows: int [shards + 1], the first row of every shard, and the number of rows. The name, not the source's place
    among others, is drawn with: adding a source leaves the order of the others alone.
    """

    def __init__(self, shard_rows: np.ndarray, *, seed: int, name: str):
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self._seed = (seed, zlib.crc32(name.encode()))
        self.epoch_length = int(self._shard_rows[-1])
        # The orders of an epoch and of a group are asked for again and again while they are read through.
        self._groups = lru_cache(maxsize=2)(self._draw_groups)
        self._rows = lru_cache(maxsize=2)(self._draw_rows)

    def rows(self, start: int, count: int) -> np.ndarray:
        """int64 [count]: rows number start, start + 1 ... of the stream."""
        parts = [np.empty(0, np.int64)]
        while count:
            epoch, place = divmod(start, self.epoch_length)
            _, begins = self._groups(epoch)
            group = int(np.searchsorted(begins, place, side="right")) - 1
            begin = place - int(begins[group])
            taken = self._rows(epoch, group)[begin : begin + count]
            parts.append(taken)
            start, count = start + len(taken), count - len(taken)
        return np.concatenate(parts)

    def _draw_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the place in the epoch at which every group of them begins."""
        shards = self._random(epoch).permutation(len(self._shard_rows) - 1)
        ends = np.cumsum(np.diff(self._shard_rows)[shards])
        begins = np.concatenate([[0], ends[SHARDS_TOGETHER - 1 :: SHARDS_TOGETHER]])
        return shards, begins

    def _draw_rows(self, epoch: int, group: int) -> np.ndarray:
        shards = self._groups(epoch)[0][group * SHARDS_TOGETHER : (group + 1) * SHARDS_TOGETHER]
        rows = np.concatenate([np.arange(self._shard_rows[shard], self._shard_rows[shard + 1]) for shard in shards])
        return self._random(epoch, 1 + group).permutation(rows)

    def _random(self, *place: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([*self._seed, *place]))
