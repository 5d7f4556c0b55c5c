"""Storage that fails for a while: which errors of an operating system say so, and reading in spite of it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

# The storage is not there now, or does not answer. This says nothing of the file.
FAILING = {
    *(errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EAGAIN),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNRESET, errno.ECONNREFUSED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
DELAYS: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the second attempt, the third ...

Result = TypeVar("Result")


class StorageError(Exception):
    """A file could not be read because storage fails, also after a while. What is in the file is not known."""


def patiently(read: Callable[[], Result], path: object) -> Result:
    """Return what `read` returns, after further attempts where storage fails.

    Args:
        read: Reads a file.
        path: The file, for the message.

    Raises:
        StorageError: Storage fails in every attempt.
        OSError: Another error of the operating system, such as a file that does not exist.
    """
    for delay in (*DELAYS, 0.0):
        try:
            return read()
        except OSError as error:
            if error.errno not in FAILING:
                raise
            cause = error.strerror
        time.sleep(delay)
    raise given_up(path, cause)


def given_up(path: object, cause: object, seconds: float | None = None) -> StorageError:
    """Return the error of a file whose storage has failed in every attempt.

    Args:
        path: The file.
        cause: What the last attempt said.
        seconds: How long all attempts took; None: as long as the pauses between them.
    """
    took = sum(DELAYS) if seconds is None else seconds
    return StorageError(
        f"{path} cannot be read ({cause}), in {len(DELAYS) + 1} attempts within {took:.0f} seconds: its storage "
        "fails, which does not mean that the file is damaged. Start again when the storage is back"
    )
