"""Collect Python's garbage after the same steps on all processes.

Python collects when enough objects were made, so each process stops at another moment, and all others wait for it at
the next collective. With an interval they stop together, and never in between.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collected_every(interval: int) -> Iterator[GarbageCollection]:
    """Collect now, and within the body only where `after_step` does; with an interval of 0 change nothing.

    Args:
        interval: steps between collections, `train.gc_interval`.
    """
    was_enabled = gc.isenabled()
    if interval:
        gc.disable()
        gc.collect()
    try:
        yield GarbageCollection(interval)
    finally:
        if interval and was_enabled:
            gc.enable()


class GarbageCollection:
    """Collects after every `interval`-th step."""

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def after_step(self, step: int) -> None:
        """Collect if it is time, which depends on the number of the step alone."""
        if self._interval and step % self._interval == 0:
            gc.collect()
