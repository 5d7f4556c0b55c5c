"""Wait for input from another process."""

from __future__ import annotations

import math
import select


def is_readable(descriptor: int, seconds: float) -> bool:
    """Return whether a file descriptor has input, or its end, within a time.

    select.select would do the same, but fails where the process has more than 1,023 files open.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(seconds * 1000))))
