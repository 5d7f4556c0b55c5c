"""Cost of a piece of work: CPU time, which other programs disturb little, and wall time."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds that a piece of work took."""

    cpu: float  # user and system time of this process and of the children that it waited for
    wall: float


def cost(work: Callable[[], object]) -> Cost:
    """Run `work` once and return its cost."""
    began, wall = _cpu_seconds(), time.perf_counter()
    work()
    return Cost(_cpu_seconds() - began, time.perf_counter() - wall)


def cheapest(work: Callable[[], object], repetitions: int) -> Cost:
    """Return the cost of the run with the least CPU time: disturbances can only add to it."""
    return min((cost(work) for _ in range(repetitions)), key=lambda run: run.cpu)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
