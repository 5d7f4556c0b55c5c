"""Waiting for shards that storage has lost for a while: a file server that restarts, a folder that is moved.

    lost = LostShards(seconds=300)
    contents = lost.attempt("captions-00017.tar", read)

`read` is repeated, ever more rarely, until it succeeds or until the shard has been missing for that number of seconds.
The time is kept in memory that the data workers of a process share: a shard is waited for once, not once per worker.
"""

from __future__ import annotations

import errno
import logging
import mmap
import struct
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

from data_pipeline.errors import Unavailable
from data_pipeline.shards.shard_cache import shown

FIRST_DELAY, LONGEST_DELAY = 0.2, 5.0  # seconds between two attempts
# What an operating system says of storage that is not there now, and may be again.
PASSING = {
    *(errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EAGAIN),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNRESET, errno.ECONNREFUSED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
_SLOTS = 4096  # shards that are told apart; two in one slot share their time
_SINCE = struct.Struct("d")  # seconds of the system's monotonic clock, the same in all processes; 0: not missing

Result = TypeVar("Result")
logger = logging.getLogger("glmv.data")  # below the run's logger, so that warnings reach its log


class LostShards:
    """The shards that cannot be read now, and since when.

    Args:
        seconds: How long to wait for a shard; 0: not at all.
        give_up: Whether the caller does without a shard that stays lost; otherwise it is an error.
    """

    def __init__(self, seconds: float = 0, *, give_up: bool = True) -> None:
        self.seconds, self.give_up = seconds, give_up
        self._since = mmap.mmap(-1, _SINCE.size * (_SLOTS + 1))  # the last one: when a shard was given up

    def attempt(self, path: str, read: Callable[[bool], Result]) -> Result:
        """Read from a shard, and again while it is unavailable.

        Once a shard is given up, no other is waited for during the same number of seconds: where all storage is gone,
        the wait is not repeated for every shard.

        Args:
            path: The shard, a path or URL.
            read: Reads it. With True it raises Unavailable where another attempt may succeed; with False, the last
                attempt, it raises any other error.
        """
        slot = zlib.crc32(path.encode()) % _SLOTS
        delay = FIRST_DELAY
        while self._may_wait(slot):
            try:
                result = read(True)
            except Unavailable as error:
                self._note(path, slot, error)
                time.sleep(min(delay, max(self._get(slot) + self.seconds - time.monotonic(), 0.0)))
                delay = min(2 * delay, LONGEST_DELAY)
                continue
            self._found(path, slot)
            return result
        result = read(False)
        self._found(path, slot)
        return result

    def is_missing(self, path: str) -> bool:
        """Return whether a shard could not be read when that was tried last."""
        return self._get(zlib.crc32(path.encode()) % _SLOTS) > 0

    def _may_wait(self, slot: int) -> bool:
        now, since, given_up = time.monotonic(), self._get(slot), self._get(_SLOTS)
        if not self.seconds or (given_up and now - given_up < self.seconds):
            return False
        if since and now - since >= self.seconds:
            self._set(_SLOTS, now)
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
            self._set(_SLOTS, 0.0)
            logger.warning("shard %s is back after %.0f seconds", shown(path), time.monotonic() - since)

    def _get(self, slot: int) -> float:
        return _SINCE.unpack_from(self._since, slot * _SINCE.size)[0]

    def _set(self, slot: int, value: float) -> None:
        _SINCE.pack_into(self._since, slot * _SINCE.size, value)
