"""Waiting for shards that storage has lost for a while: a file server that restarts, a folder that is moved.

    lost = LostShards(seconds=300, shards=["captions-00016.tar", "captions-00017.tar"])
    contents = lost.attempt("captions-00017.tar", read)

`read` is repeated, ever more rarely, until it succeeds, until the shard has been missing for that number of seconds, or
until the run is asked to stop. The time is kept in memory that the data workers of a process share: a shard is waited
for once, not once per worker.
"""

from __future__ import annotations

import errno
import logging
import mmap
import struct
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from xxhash import xxh3_64_intdigest

from common.storage import FAILING
from common.urls import shown
from data_pipeline.errors import Interrupted, Unavailable

FIRST_DELAY, LONGEST_DELAY = 0.2, 5.0  # seconds between two attempts
LOOK = 0.2  # seconds between two looks at whether to stop
PASSING = FAILING | {errno.ENOENT}  # what an operating system says of a file that may be there again
_SINCE = struct.Struct("d")  # seconds of the system's monotonic clock, the same in all processes; 0: not missing

Result = TypeVar("Result")
logger = logging.getLogger("glmv.data")  # below the run's logger, so that warnings reach its log


class LostShards:
    """The shards that cannot be read now, and since when.

    Args:
        seconds: How long to wait for a shard; 0: not at all.
        shards: Paths and URLs of those that are waited for.
        give_up: Whether the caller does without a shard that stays lost; otherwise it is an error.
    """

    def __init__(self, seconds: float = 0, shards: Iterable[str] = (), *, give_up: bool = True) -> None:
        self.seconds, self.give_up = seconds, give_up
        self._names = np.unique(np.array([_name(path) for path in shards], np.uint64))
        # A time per shard, then when a shard was given up, then when the run was asked to stop.
        self._since = mmap.mmap(-1, _SINCE.size * (len(self._names) + 2))
        self._given_up, self._stopped = len(self._names), len(self._names) + 1

    def stop_waiting(self) -> None:
        """End the present waits of all processes that share this memory, and all later ones, with Interrupted."""
        self._set(self._stopped, time.monotonic())

    def attempt(self, path: str, read: Callable[[bool], Result]) -> Result:
        """Read from a shard, and again while it is unavailable.

        Once a shard is given up, no other is waited for during the same number of seconds: where all storage is gone,
        the wait is not repeated for every shard.

        Args:
            path: The shard, a path or URL.
            read: Reads it. With True it raises Unavailable where another attempt may succeed; with False, the last
                attempt, it raises any other error.

        Raises:
            Interrupted: The shard is unavailable, and the run was asked to stop.
        """
        slot = self._slot(path)
        if slot is None:
            return read(False)
        delay = FIRST_DELAY
        while self._may_wait(slot):
            try:
                result = read(True)
            except Unavailable as error:
                self._note(path, slot, error)
                self._sleep(min(delay, self._get(slot) + self.seconds - time.monotonic()), path)
                delay = min(2 * delay, LONGEST_DELAY)
                continue
            self._found(path, slot)
            return result
        result = read(False)
        self._found(path, slot)
        return result

    def is_missing(self, path: str) -> bool:
        """Return whether a shard could not be read when that was tried last."""
        slot = self._slot(path)
        return slot is not None and self._get(slot) > 0

    def _slot(self, path: str) -> int | None:
        """Return where the time of a shard is kept; None where it is not waited for."""
        if not self.seconds:
            return None
        name = np.uint64(_name(path))
        slot = int(np.searchsorted(self._names, name))
        return slot if slot < len(self._names) and self._names[slot] == name else None

    def _sleep(self, seconds: float, path: str) -> None:
        until = time.monotonic() + seconds
        while not self._get(self._stopped) and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK))
        if self._get(self._stopped):
            raise Interrupted(f"shard {shown(path)} was not waited for any longer, because the run was asked to stop")

    def _may_wait(self, slot: int) -> bool:
        now, since, given_up = time.monotonic(), self._get(slot), self._get(self._given_up)
        if given_up and now - given_up < self.seconds:
            return False
        if since and now - since >= self.seconds:
            self._set(self._given_up, now)
            return False
        return True

    def _note(self, path: str, slot: int, error: Unavailable) -> None:
        if not self._get(slot):
            self._set(slot, time.monotonic())
            logger.warning(
                "shard %s cannot be read (%s); trying again for up to %g seconds (data.retry_seconds)",
                *(shown(path), error, self.seconds),
            )

    def _found(self, path: str, slot: int) -> None:
        if since := self._get(slot):
            self._set(slot, 0.0)
            self._set(self._given_up, 0.0)
            logger.warning("shard %s is back after %.0f seconds", shown(path), time.monotonic() - since)

    def _get(self, slot: int) -> float:
        return _SINCE.unpack_from(self._since, slot * _SINCE.size)[0]

    def _set(self, slot: int, value: float) -> None:
        _SINCE.pack_into(self._since, slot * _SINCE.size, value)


def _name(path: str) -> int:
    """Return the number under which a shard is known. It has 64 bits, so that no two shards of a run share one."""
    return xxh3_64_intdigest(path.encode())
