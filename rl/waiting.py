"""Waiting for processes that draw or score for longer than a collective may take, without being taken to hang.

Those that work note their progress themselves: one of them that hangs is noticed. What takes long also ends where the
run is asked to stop: `on_wait` raises Interrupted then, on each process at a moment of its own. So the processes agree
where they wait for each other: all give up what one of them has not finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import Interrupted

TIMEOUT = timedelta(hours=12)  # in which the slowest process has done its share
LOOK_SECONDS = 0.02  # between two looks at whether all have arrived
Result = TypeVar("Result")


def patient_group() -> dist.ProcessGroup:
    """Return a gloo group of all processes, in which one may be waited for as long as TIMEOUT. Collective."""
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert group is not None
    return group


def work_together(group: dist.ProcessGroup, work: Callable[[], Result], on_wait: Callable[[], None]) -> Result:
    """Do this process's share of some work, and wait until all processes of a group have done theirs. Collective.

    Args:
        group: from `patient_group`.
        work: the share.
        on_wait: called again and again while the others work, so that this process shows signs of progress. That it
            raises Interrupted changes nothing any more.

    Returns:
        What `work` returns here.

    Raises:
        Interrupted: a process was asked to stop before its share was done. Raised on all processes.
    """
    done: list[Result] = []
    with suppress(Interrupted):
        done.append(work())
    arrival = dist.barrier(group=group, async_op=True)
    assert arrival is not None
    while not arrival.is_completed():
        with suppress(Interrupted):
            on_wait()
        time.sleep(LOOK_SECONDS)
    arrival.wait()
    unfinished = torch.tensor(int(not done), device="cpu")
    dist.all_reduce(unfinished, op=dist.ReduceOp.MAX, group=group)
    if unfinished:
        raise Interrupted("the run was asked to stop")
    return done[0]
