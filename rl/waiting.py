"""Waiting for processes that draw or score for longer than a collective may take, without being taken to hang.

Those that work note their progress themselves: one of them that hangs is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

TIMEOUT = timedelta(hours=12)  # in which the slowest process has done its share
LOOK_SECONDS = 0.02  # between two looks at whether all have arrived


def patient_group() -> dist.ProcessGroup:
    """Return a gloo group of all processes, in which one may be waited for as long as TIMEOUT. Collective."""
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert group is not None
    return group


def wait_for_all(group: dist.ProcessGroup, on_wait: Callable[[], None]) -> None:
    """Wait until all processes of a group have come here. Collective.

    Args:
        group: from `patient_group`.
        on_wait: called again and again, so that the process that waits shows signs of progress.
    """
    arrival = dist.barrier(group=group, async_op=True)
    assert arrival is not None
    while not arrival.is_completed():
        on_wait()
        time.sleep(LOOK_SECONDS)
    arrival.wait()
